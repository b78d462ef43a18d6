// SPDX-License-Identifier: Apache-2.0
//! Many containers, many processes, much output, and those that are stuck. The
//! numbers are small so that all of it takes seconds;
//! `BULKHEAD_AGENT_LOAD=full` (`make test-agent-load`) makes them what a guest
//! has to stand.

mod common;

use std::fs;
use std::future::Future;
use std::pin::Pin;
use std::time::Instant;

use bulkhead_agent_protocol::{agent, oci};
use common::*;
use tokio::io::AsyncReadExt;
use tokio::time::{sleep, timeout, Duration};

/// The whole number, or one that takes no time.
fn number(full: usize, quick: usize) -> usize {
    match std::env::var("BULKHEAD_AGENT_LOAD").as_deref() {
        Ok("full") => full,
        _ => quick,
    }
}

/// Work to be done beside other work.
type Job<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

/// Descriptors that the agent has open.
fn descriptors(rig: &Rig) -> usize {
    let path = format!("/proc/{}/fd", rig.agent_pid());
    fs::read_dir(path).unwrap().count()
}

/// The agent's resident memory in KiB.
fn resident(rig: &Rig) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", rig.agent_pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let words = line.unwrap().split_whitespace().nth(1);
    words.unwrap().parse().unwrap()
}

/// Waits until the agent has as few descriptors as it had.
async fn back_to(rig: &Rig, before: usize) {
    let back = async {
        while descriptors(rig) > before {
            sleep(Duration::from_millis(20)).await;
        }
    };
    let back = timeout(PATIENCE, back).await;
    assert!(
        back.is_ok(),
        "{before} descriptors before, {} now",
        descriptors(rig)
    );
}

async fn check(rig: &Rig) {
    rig.client
        .check(rig.context(), &agent::Empty::new())
        .await
        .unwrap();
}

async fn forget(rig: &Rig, id: &str, exec_id: &str) {
    let request = agent::ProcessRequest {
        container_id: id.into(),
        exec_id: exec_id.into(),
        ..Default::default()
    };
    rig.client
        .delete_process(rig.context(), &request)
        .await
        .unwrap();
}

/// A container that stays, and is gone with the rig.
async fn stay(rig: &Rig, id: &str) {
    let streams = rig
        .create(id, rig.spec("root", &["sleep", "9999"]))
        .await
        .unwrap();
    drop(streams);
    rig.start_container(id).await.unwrap();
}

/// A request without streams.
fn silent(id: &str, spec: oci::Spec) -> agent::CreateContainerRequest {
    agent::CreateContainerRequest {
        container_id: id.into(),
        spec: Some(spec).into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_container_that_is_stuck_blocks_no_other() {
    let rig = Rig::start().await;
    // Its hook never ends, so its create does not either.
    let mut spec = rig.spec("root", &["true"]);
    let pid_file = rig.directory.path().join("pid");
    let text = format!("echo $$ > {}; exec sleep 9999", pid_file.display());
    spec.hooks = Some(oci::Hooks {
        create_container: vec![oci::Hook {
            path: "/bin/busybox".into(),
            args: ["sh", "-c", &text].map(String::from).to_vec(),
            env: vec!["PATH=/bin".into()],
            ..Default::default()
        }],
        ..Default::default()
    })
    .into();
    let request = silent("stuck", spec);
    let mut stuck = Box::pin(rig.client.create_container(rig.context(), &request));
    let others = async {
        while !fs::read_to_string(&pid_file).is_ok_and(|pid| pid.ends_with('\n')) {
            sleep(Duration::from_millis(5)).await;
        }
        for turn in 0..3 {
            let id = format!("other-{turn}");
            let outcome = rig.run(&id, rig.spec("root", &["echo", "fine"])).await;
            assert_eq!(outcome.success(), "fine\n");
        }
        // One that is frozen, and refuses to be run in, neither.
        stay(&rig, "frozen").await;
        let frozen = rig.container("frozen");
        rig.client
            .pause_container(rig.context(), &frozen)
            .await
            .unwrap();
        let (code, _) = status(rig.exec("frozen", "e", process(&["true"])).await);
        assert_eq!(code, ttrpc::Code::FAILED_PRECONDITION);
        let outcome = rig.run("after", rig.spec("root", &["echo", "fine"])).await;
        assert_eq!(outcome.success(), "fine\n");
        rig.signal("frozen", "", libc::SIGKILL, true).await.unwrap();
        assert_eq!(rig.wait("frozen", "").await.unwrap().exit_status, 137);
        rig.delete("frozen").await.unwrap();
        // What is stuck can be ended.
        rig.signal("stuck", "", libc::SIGKILL, true).await.unwrap();
    };
    let ended = async {
        let both = async { tokio::join!(&mut stuck, others) };
        timeout(PATIENCE, both).await.expect("in time").0
    };
    let (_, text) = status(ended.await);
    assert!(!text.is_empty());
    // Nothing is left of it.
    let (code, _) = status(rig.delete("stuck").await);
    assert_eq!(code, ttrpc::Code::NOT_FOUND);
    assert!(!rig.cgroup_of("stuck").exists());
}

#[tokio::test]
async fn many_containers_at_once() {
    let rig = Rig::start().await;
    rig.run("first", rig.spec("root", &["true"]))
        .await
        .success();
    let (count, before, memory) = (number(500, 60), descriptors(&rig), resident(&rig));
    let id = |number: usize| format!("c{number}");
    let begin = Instant::now();
    for number in 0..count {
        let request = silent(&id(number), rig.spec("root", &["sleep", "9999"]));
        rig.client
            .create_container(rig.context(), &request)
            .await
            .unwrap();
        rig.start_container(&id(number)).await.unwrap();
    }
    println!(
        "{count} containers in {:?}; {} KiB of the agent's memory for each",
        begin.elapsed(),
        resident(&rig).saturating_sub(memory) / count
    );
    // Each of them is there and answers by itself.
    for number in [0, count / 2, count - 1] {
        let streams = rig
            .exec(&id(number), "e", process(&["echo", "here"]))
            .await
            .unwrap();
        assert_eq!(
            rig.outcome(&id(number), "e", streams).await.success(),
            "here\n"
        );
    }
    for number in 0..count {
        let list = rig.container(&id(number));
        let list = rig
            .client
            .list_processes(rig.context(), &list)
            .await
            .unwrap();
        assert_eq!(list.processes.len(), 1, "{number}");
    }
    // All of them end at once, and none is lost.
    let mut jobs: Vec<Job<'_>> = Vec::new();
    for number in 0..count {
        let (rig, id) = (&rig, id(number));
        jobs.push(Box::pin(async move {
            let wait = async { rig.wait(&id, "").await.unwrap().exit_status };
            let kill = async { rig.signal(&id, "", libc::SIGKILL, true).await.unwrap() };
            assert_eq!(tokio::join!(wait, kill).0, 137);
            rig.delete(&id).await.unwrap();
            assert!(!rig.cgroup_of(&id).exists());
        }));
    }
    join_all(jobs).await;
    back_to(&rig, before).await;
}

#[tokio::test]
async fn many_execs_one_after_another() {
    let rig = Rig::start().await;
    stay(&rig, "c").await;
    let turn = async |number: usize| {
        let id = format!("e{number}");
        let script = format!("echo {number}; exit {}", number % 100);
        let streams = rig
            .exec("c", &id, process(&["sh", "-c", &script]))
            .await
            .unwrap();
        let outcome = rig.outcome("c", &id, streams).await;
        assert_eq!(outcome.stdout, format!("{number}\n"));
        assert_eq!(outcome.status as usize, number % 100);
        forget(&rig, "c", &id).await;
    };
    for number in 0..50 {
        turn(number).await;
    }
    let (before, memory) = (descriptors(&rig), resident(&rig));
    let (count, begin) = (number(2000, 150), Instant::now());
    for number in 0..count {
        turn(number).await;
    }
    println!("{count} execs in {:?}", begin.elapsed());
    back_to(&rig, before).await;
    // Nothing is kept of a process that was forgotten.
    let more = resident(&rig).saturating_sub(memory);
    assert!(more < 1024, "{more} KiB more after {count} execs");
}

#[tokio::test]
async fn many_execs_at_once() {
    let rig = Rig::start().await;
    stay(&rig, "c").await;
    let before = descriptors(&rig);
    let mut jobs: Vec<Job<'_>> = Vec::new();
    for number in 0..100 {
        let rig = &rig;
        jobs.push(Box::pin(async move {
            let id = format!("e{number}");
            let script = format!("cat; echo {number} >&2; exit {number}");
            let streams = rig
                .exec("c", &id, process(&["sh", "-c", &script]))
                .await
                .unwrap();
            let outcome = rig.outcome("c", &id, streams).await;
            assert_eq!(outcome.status, number);
            assert_eq!(outcome.stderr, format!("{number}\n"));
            forget(rig, "c", &id).await;
        }));
    }
    join_all(jobs).await;
    back_to(&rig, before).await;
}

#[tokio::test]
async fn many_streams_with_one_that_nobody_reads() {
    const STREAMS: usize = 20;
    let rig = Rig::start().await;
    // Megabytes of each stream: in full, ten seconds' worth of 50 MB/s.
    let each = number(25, 2);
    let line = format!("dd if=/dev/zero bs=65536 count={} 2>/dev/null", each * 16);
    let mut running = Vec::new();
    for number in 0..STREAMS {
        let id = format!("c{number}");
        let spec = rig.spec("root", &["sh", "-c", &line]);
        running.push((rig.create(&id, spec).await.unwrap(), id));
    }
    let begin = Instant::now();
    let (unread, unread_id) = running.pop().unwrap();
    rig.start_container(&unread_id).await.unwrap();
    let mut jobs: Vec<Job<'_>> = Vec::new();
    for (streams, id) in running {
        let rig = &rig;
        jobs.push(Box::pin(async move {
            rig.start_container(&id).await.unwrap();
            let mut stdout = streams.stdout.unwrap();
            let (mut buffer, mut total) = (vec![0; 1 << 18], 0);
            loop {
                let count = timeout(PATIENCE, stdout.read(&mut buffer))
                    .await
                    .unwrap()
                    .unwrap();
                if count == 0 {
                    break;
                }
                assert!(buffer[..count].iter().all(|byte| *byte == 0));
                total += count;
            }
            assert_eq!(total, each << 20);
            assert_eq!(rig.wait(&id, "").await.unwrap().exit_status, 0);
        }));
    }
    // Calls are answered meanwhile.
    let rig_ref = &rig;
    jobs.push(Box::pin(async move {
        for _ in 0..20 {
            check(rig_ref).await;
        }
    }));
    join_all(jobs).await;
    let took = begin.elapsed().as_secs_f64();
    println!(
        "{:.0} MB/s",
        (((STREAMS - 1) * each) << 20) as f64 / 1e6 / took
    );
    // The one waits for its reader, who gets all of it.
    let list = rig.container(&unread_id);
    let list = rig
        .client
        .list_processes(rig.context(), &list)
        .await
        .unwrap();
    assert!(
        !list.processes.is_empty(),
        "it has gone on without its reader"
    );
    assert_eq!(read_all(unread.stdout).await.len(), each << 20);
    assert_eq!(rig.wait(&unread_id, "").await.unwrap().exit_status, 0);
}
