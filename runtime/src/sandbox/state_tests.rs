// SPDX-License-Identifier: Apache-2.0

use tokio::sync::mpsc::{unbounded_channel, UnboundedReceiver};

use super::*;
use crate::resource::journal::{Journal, Resource};

fn pod() -> (Pod, UnboundedReceiver<Event>) {
    let scratch = tempfile::tempdir().unwrap();
    let journal = Journal::create(scratch.path()).unwrap();
    let entry = journal
        .record(Resource::Directory {
            path: scratch.path().join("x"),
        })
        .unwrap();
    let (events, told) = unbounded_channel();
    let container = Container {
        bundle: "/b".into(),
        phase: Phase::Exists,
        frozen: Frozen::No,
        init: Process::new(false, StdioPaths::default()),
        execs: BTreeMap::from([("e".into(), Process::new(false, StdioPaths::default()))]),
        hooks: None,
        mirrors: Vec::new(),
        entry,
        limits: crate::oci::Limits::default(),
    };
    let pod = Pod {
        containers: BTreeMap::from([("c".into(), container)]),
        ended: None,
        closing: false,
        events,
        history: Arc::new(History::new("n", "s", 8)),
        pid: 7,
        extra: Extra::default(),
    };
    (pod, told)
}

fn told(events: &mut UnboundedReceiver<Event>) -> Vec<String> {
    let mut list = Vec::new();
    while let Ok(event) = events.try_recv() {
        list.push(match event {
            Event::Started { exec, .. } => format!("started {}", exec.unwrap_or_default()),
            Event::Exited { exec, status, .. } => {
                format!("exited {} {status}", exec.unwrap_or_default())
            }
            Event::Oom { .. } => "oom".into(),
            other => format!("{other:?}"),
        });
    }
    list
}

fn exit(status: u32) -> Exit {
    Exit {
        status,
        at: SystemTime::now(),
    }
}

fn set(pod: &mut Pod, exec: Option<&str>, stage: Stage) {
    pod.process("c", exec).unwrap().stage = stage;
}

#[test]
fn an_exit_is_told_after_the_start() {
    let (mut pod, mut events) = pod();
    set(&mut pod, None, Stage::Starting);
    pod.exited("c", None, exit(3), true);
    assert!(told(&mut events).is_empty());
    pod.started("c", None);
    assert_eq!(told(&mut events), ["started ", "oom", "exited  3"]);
    assert_eq!(pod.state("c", None).unwrap().status, Status::Stopped);
    // Once.
    pod.exited("c", None, exit(4), false);
    pod.machine_ended("x".into());
    assert!(told(&mut events).is_empty());
    assert_eq!(pod.state("c", None).unwrap().exit_status, 3);
}

#[test]
fn a_containers_exit_is_told_after_its_further_processes() {
    let (mut pod, mut events) = pod();
    set(&mut pod, None, Stage::Running);
    set(&mut pod, Some("e"), Stage::Running);
    pod.exited("c", None, exit(0), false);
    assert!(pod.end_is_held("c"));
    assert!(told(&mut events).is_empty());
    pod.exited("c", Some("e"), exit(137), false);
    assert_eq!(told(&mut events), ["exited e 137", "exited  0"]);
}

#[test]
fn further_processes_that_never_report_are_given_up() {
    let (mut pod, mut events) = pod();
    set(&mut pod, None, Stage::Running);
    set(&mut pod, Some("e"), Stage::Starting);
    pod.exited("c", None, exit(5), false);
    pod.give_up_on_execs("c");
    assert_eq!(told(&mut events), ["exited e 137", "exited  5"]);
}

#[test]
fn the_machines_end_ends_what_was_alive() {
    let (mut pod, mut events) = pod();
    set(&mut pod, None, Stage::Running);
    pod.machine_ended("power cut".into());
    // The further process was never started: it has not exited.
    assert_eq!(told(&mut events), ["exited  137"]);
    assert!(matches!(pod.accepts(), Err(Error::VmEnded(why)) if why == "power cut"));
}

#[test]
fn a_start_that_failed_is_no_news() {
    let (mut pod, mut events) = pod();
    set(&mut pod, None, Stage::Starting);
    pod.start_failed("c", None, 127);
    assert!(told(&mut events).is_empty());
    let state = pod.state("c", None).unwrap();
    assert_eq!((state.status, state.exit_status), (Status::Stopped, 127));
}

#[test]
fn a_container_killed_before_its_start_has_an_exit() {
    let (mut pod, mut events) = pod();
    pod.exited("c", None, exit(137), false);
    assert_eq!(told(&mut events), ["exited  137"]);
}
