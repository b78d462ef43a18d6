// SPDX-License-Identifier: Apache-2.0
//! Hooks that run in the guest: createContainer and startContainer.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Instant;

use bulkhead_agent_protocol::oci;
use common::*;
use tokio::time::Duration;
use ttrpc::Code;

/// A hook in the container: a shell script.
fn script(text: &str) -> oci::Hook {
    oci::Hook {
        path: "/bin/sh".into(),
        args: ["sh", "-c", text].map(String::from).to_vec(),
        ..Default::default()
    }
}

/// A hook that the runtime has shared with the guest.
fn shared(rig: &Rig, name: &str, text: &str) -> oci::Hook {
    let path = rig.directory.path().join(name);
    alone(|| fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap());
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    oci::Hook {
        path: path.to_str().unwrap().into(),
        ..Default::default()
    }
}

fn hooks(spec: &mut oci::Spec, create: Vec<oci::Hook>, start: Vec<oci::Hook>) {
    spec.bundle = "/run/the bundle".into();
    spec.annotations.insert("a".into(), "b\"c".into());
    spec.hooks = Some(oci::Hooks {
        create_container: create,
        start_container: start,
        ..Default::default()
    })
    .into();
}

#[tokio::test]
async fn each_runs_in_its_turn_and_place() {
    let rig = Rig::start().await;
    let mut spec = rig.spec("c", &["sh", "-c", "cat /run/started; echo $$ program"]);
    let log = rig.directory.path().join("created");
    let log = log.to_str().unwrap();
    // Sees the guest's files, from the container's namespaces.
    let create = shared(
        &rig,
        "create",
        &format!("(readlink /proc/self/ns/mnt; echo \"$HOME.\"; cat) > {log}"),
    );
    // Sees the container's files.
    let start = |name: &str| {
        script(&format!(
            "(echo {name} $GIVEN $PATH; cat; echo; readlink /proc/self/fd/1) >> /run/started"
        ))
    };
    let mut second = start("second");
    second.env = vec!["GIVEN=yes".into(), "PATH=/bin".into()];
    hooks(&mut spec, vec![create], vec![start("first"), second]);
    let streams = rig.create("c", spec).await.unwrap();
    let written = fs::read_to_string(log).unwrap();
    let lines: Vec<&str> = written.lines().collect();
    let namespace = fs::read_link(format!("/proc/{}/ns/mnt", streams.pid)).unwrap();
    assert_eq!(lines[0], namespace.to_str().unwrap());
    // No environment is none.
    assert_eq!(lines[1], ".");
    let state = |status: &str| {
        format!(
            "{{\"ociVersion\":\"1.1.0\",\"id\":\"c\",\"bundle\":\"/run/the bundle\",\
             \"annotations\":{{\"a\":\"b\\\"c\"}},\"status\":\"{status}\",\"pid\":1}}"
        )
    };
    assert_eq!(lines[2], state("creating"));
    let root = rig.rootfs("c");
    assert!(!root.join("run/started").exists());
    rig.start_container("c").await.unwrap();
    let printed = rig.outcome("c", "", streams).await.success();
    let created = state("created");
    // An environment that is not given is the container's.
    let wanted = format!(
        "first /bin:/usr/bin\n{created}\n/run/started\nsecond yes /bin\n{created}\n/run/started\n1 program\n"
    );
    assert_eq!(printed, wanted);
}

#[tokio::test]
async fn a_failure_ends_the_create_or_the_start() {
    let rig = Rig::start().await;
    let mut spec = rig.spec("c", &["true"]);
    let broken = shared(&rig, "broken", "echo out of order >&2; exit 3");
    let touched = rig.directory.path().join("touched");
    let never = shared(&rig, "never", &format!("touch {}", touched.display()));
    hooks(&mut spec, vec![broken, never], vec![]);
    let (code, text) = status(rig.create("c", spec).await.map(drop));
    assert_eq!(code, Code::INTERNAL);
    assert!(text.starts_with("hooks.createContainer[0] "), "{text}");
    assert!(
        text.ends_with("exit status 3; it said: out of order"),
        "{text}"
    );
    assert!(!touched.exists());
    assert!(!rig.cgroup_of("c").exists());

    for (hook, why) in [
        (script("exit 4"), "exit status 4"),
        (script("kill -9 $$"), "SIGKILL"),
        (
            oci::Hook {
                path: "/no/such".into(),
                ..Default::default()
            },
            "exit status 127; it said: No such file",
        ),
    ] {
        let mut spec = rig.spec("c", &["touch", "/ran"]);
        hooks(&mut spec, vec![], vec![hook]);
        rig.create("c", spec).await.unwrap();
        let (_, text) = status(rig.start_container("c").await);
        assert!(
            text.contains("hooks.startContainer[0] ") && text.contains(why),
            "{text}"
        );
        assert_eq!(rig.wait("c", "").await.unwrap().exit_status, 127);
        rig.delete("c").await.unwrap();
        assert!(!rig.rootfs("c").join("ran").exists());
    }
}

#[tokio::test]
async fn a_timeout_ends_a_hook_and_the_start() {
    let rig = Rig::start().await;
    let mut spec = rig.spec("c", &["true"]);
    let mut slow = script("echo slow >&2; sleep 100 & wait");
    slow.timeout = Some(1);
    hooks(&mut spec, vec![], vec![slow]);
    rig.create("c", spec).await.unwrap();
    let begin = Instant::now();
    let (_, text) = status(rig.start_container("c").await);
    assert!(begin.elapsed() < Duration::from_secs(20));
    assert!(
        text.ends_with("killed after its timeout; it said: slow"),
        "{text}"
    );
}

#[tokio::test]
async fn a_hook_of_the_container_is_its_user() {
    let rig = Rig::start().await;
    let mut spec = rig.spec("c", &["cat", "/tmp/who"]);
    let first = spec.process.mut_or_insert_default();
    first.user.mut_or_insert_default().uid = 1000;
    hooks(&mut spec, vec![], vec![script("id -u > /tmp/who")]);
    assert_eq!(rig.run("c", spec).await.success(), "1000\n");
}

#[tokio::test]
async fn a_long_state_and_long_words_hold_nothing_up() {
    let rig = Rig::start().await;
    let mut spec = rig.spec("c", &["cat", "/run/size"]);
    let hook = script("seq 1 100000 >&2; cat | wc -c > /run/size");
    hooks(&mut spec, vec![], vec![hook]);
    spec.annotations.insert("long".into(), "x".repeat(300_000));
    let printed = rig.run("c", spec).await.success();
    assert!(
        printed.trim().parse::<usize>().unwrap() > 300_000,
        "{printed}"
    );
}

#[tokio::test]
async fn a_profile_that_knows_no_clone3_does_not_stop_hooks() {
    let rig = Rig::start().await;
    for no_new_privileges in [true, false] {
        let mut spec = rig.spec("c", &["cat", "/run/ran"]);
        let first = spec.process.mut_or_insert_default();
        first.no_new_privileges = no_new_privileges;
        hooks(&mut spec, vec![], vec![script("echo ran > /run/ran")]);
        spec.linux.mut_or_insert_default().seccomp = Some(oci::Seccomp {
            default_action: "SCMP_ACT_ALLOW".into(),
            syscalls: vec![oci::Syscall {
                names: ["clone3", "pidfd_open", "waitid"]
                    .map(String::from)
                    .to_vec(),
                action: "SCMP_ACT_ERRNO".into(),
                errno_ret: Some(libc::ENOSYS as u32),
                ..Default::default()
            }],
            ..Default::default()
        })
        .into();
        assert_eq!(rig.run("c", spec).await.success(), "ran\n");
    }
}
