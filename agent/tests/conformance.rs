// SPDX-License-Identifier: Apache-2.0
//! Cases of opencontainers/runtime-tools' validation and of youki's contest
//! that no other test of the agent shows. `CONFORMANCE.md` has the whole list.

mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use bulkhead_agent_protocol::oci;
use common::*;
use nix::sys::stat::{makedev, mknod, Mode, SFlag};
use ttrpc::Code;

/// A specification and its root file system.
fn prepared(rig: &Rig, args: &[&str]) -> (oci::Spec, PathBuf) {
    let spec = rig.spec("c", args);
    let root = PathBuf::from(&spec.root.path);
    (spec, root)
}

/// A directory with a directory in it, files in both, and one beside them.
fn nested(root: &Path) -> [String; 5] {
    fs::create_dir_all(root.join("d/sub")).unwrap();
    for file in ["f", "d/f", "d/sub/f"] {
        fs::write(root.join(file), "secret").unwrap();
    }
    ["/d", "/f", "/d/sub", "/d/f", "/d/sub/f"].map(String::from)
}

fn nodes(root: &Path) -> [&'static str; 3] {
    for (name, kind, number) in [
        ("block", SFlag::S_IFBLK, makedev(7, 200)),
        ("char", SFlag::S_IFCHR, makedev(1, 5)),
        ("fifo", SFlag::S_IFIFO, 0),
    ] {
        mknod(
            &root.join(name),
            kind,
            Mode::from_bits_truncate(0o666),
            number,
        )
        .unwrap();
    }
    ["/block", "/char", "/fifo"]
}

// masked_paths, linux_masked_paths

#[tokio::test]
async fn masked_paths_below_one_another() {
    let rig = Rig::start().await;
    let (mut spec, root) = prepared(&rig, &["sh", "-c", "ls -A /d; cat /f; cat /d/sub/f"]);
    spec.linux.mut_or_insert_default().masked_paths = nested(&root).to_vec();
    let outcome = rig.run("c", spec).await;
    assert_eq!(outcome.stdout, "", "{outcome:?}");
    assert!(outcome.stderr.contains("No such file"), "{outcome:?}");
}

#[tokio::test]
async fn masked_nodes_are_the_null_device() {
    let rig = Rig::start().await;
    let show = "stat -c '%F %t:%T' /block /char /fifo; cat /block /char /fifo | wc -c";
    let (mut spec, root) = prepared(&rig, &["sh", "-c", show]);
    let linux = spec.linux.mut_or_insert_default();
    linux.masked_paths = nodes(&root).map(String::from).to_vec();
    let printed = rig.run("c", spec).await.success();
    let null = "character special file 1:3\n";
    assert_eq!(printed, format!("{null}{null}{null}0\n"));
}

// readonly_paths, linux_readonly_paths

#[tokio::test]
async fn read_only_paths_below_one_another_and_nodes() {
    let rig = Rig::start().await;
    let script = "for f in /f /d/f /d/sub/f /d/new /d/sub/new; do \
        (: > $f) 2>/dev/null && echo $f; done; cat /d/sub/f; \
        for n in /block /char /fifo; do chmod 600 $n 2>/dev/null && echo $n; done; true";
    let (mut spec, root) = prepared(&rig, &["sh", "-c", script]);
    let linux = spec.linux.mut_or_insert_default();
    linux.readonly_paths = nested(&root).to_vec();
    linux.readonly_paths.extend(nodes(&root).map(String::from));
    assert_eq!(rig.run("c", spec).await.success(), "secret");
}

#[tokio::test]
async fn relative_and_endless_paths_are_refused() {
    let rig = Rig::start().await;
    for (field, path, code, words) in [
        (
            "maskedPaths",
            "../x",
            Code::INVALID_ARGUMENT,
            "linux.maskedPaths: \"../x\" is not absolute",
        ),
        (
            "readonlyPaths",
            "x",
            Code::INVALID_ARGUMENT,
            "linux.readonlyPaths: \"x\" is not absolute",
        ),
        ("maskedPaths", "/loop", Code::INTERNAL, "/loop"),
        ("readonlyPaths", "/loop", Code::INTERNAL, "/loop"),
    ] {
        let (mut spec, root) = prepared(&rig, &["true"]);
        if !root.join("loop").is_symlink() {
            symlink("../loop", root.join("loop")).unwrap();
        }
        let linux = spec.linux.mut_or_insert_default();
        match field {
            "maskedPaths" => linux.masked_paths.push(path.into()),
            _ => linux.readonly_paths.push(path.into()),
        }
        let (told, text) = status(rig.create("c", spec).await.map(drop));
        assert_eq!(told, code, "{field} {path}: {text}");
        assert!(text.contains(words), "{field} {path}: {text}");
    }
}

// killsig, kill_container, kill_no_effect

#[tokio::test]
async fn every_signal_is_the_one_that_was_sent() {
    let rig = Rig::start().await;
    let script = "for s in TERM USR1 USR2; do trap \"echo $s; exit 3\" $s; done; echo ready; \
        while true; do sleep 0.05; done";
    let signals = [
        ("TERM", libc::SIGTERM),
        ("USR1", libc::SIGUSR1),
        ("USR2", libc::SIGUSR2),
    ];
    for (name, number) in signals {
        let spec = rig.spec("c", &["sh", "-c", script]);
        let mut streams = rig.create("c", spec).await.unwrap();
        rig.start_container("c").await.unwrap();
        let stdout = streams.stdout.as_mut().unwrap();
        read_until(stdout, "ready\n").await;
        rig.signal("c", "", number, false).await.unwrap();
        assert_eq!(read_until(stdout, "\n").await, format!("{name}\n"));
        assert_eq!(rig.wait("c", "").await.unwrap().exit_status, 3);
        rig.delete("c").await.unwrap();
    }
}

#[tokio::test]
async fn a_created_container_can_be_killed_and_a_stopped_one_not() {
    let rig = Rig::start().await;
    let spec = rig.spec("c", &["sh", "-c", "echo ran"]);
    let streams = rig.create("c", spec).await.unwrap();
    rig.signal("c", "", libc::SIGKILL, false).await.unwrap();
    let outcome = rig.outcome("c", "", streams).await;
    assert_eq!((outcome.status, outcome.stdout.as_str()), (137, ""));
    let before = rig.wait("c", "").await.unwrap();
    let again = rig.signal("c", "", libc::SIGKILL, false).await;
    assert_eq!(status(again).0, Code::NOT_FOUND);
    assert_eq!(rig.wait("c", "").await.unwrap(), before);
    rig.delete("c").await.unwrap();
    assert_eq!(
        status(rig.signal("c", "", libc::SIGKILL, false).await).0,
        Code::NOT_FOUND
    );
}

// process_user, process_rlimits_fail, devices

#[tokio::test]
async fn groups_that_are_named_twice() {
    let rig = Rig::start().await;
    let (mut spec, _) = prepared(&rig, &["grep", "Groups", "/proc/self/status"]);
    spec.process.mut_or_insert_default().user = Some(oci::User {
        additional_gids: vec![500, 600, 500],
        ..Default::default()
    })
    .into();
    let printed = rig.run("c", spec).await.success();
    // setgroups(2) keeps them.
    let groups: Vec<&str> = printed.split_whitespace().skip(1).collect();
    assert_eq!(groups, ["500", "500", "600"]);
}

#[tokio::test]
async fn an_unknown_limit_is_refused() {
    let rig = Rig::start().await;
    let (mut spec, _) = prepared(&rig, &["true"]);
    spec.process.mut_or_insert_default().rlimits = vec![oci::Rlimit {
        type_: "RLIMIT_TEST".into(),
        soft: 1024,
        hard: 1024,
        ..Default::default()
    }];
    let (code, text) = status(rig.create("c", spec).await.map(drop));
    assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
    assert!(text.contains("RLIMIT_TEST"), "{text}");
}

#[tokio::test]
async fn devices_of_all_kinds_and_without_permissions() {
    let rig = Rig::start().await;
    let show = "stat -c '%n %F %t:%T %a %u:%g' /dev/c /dev/b /dev/p /dev/plain";
    let (mut spec, _) = prepared(&rig, &["sh", "-c", show]);
    let device = |path: &str, kind: &str, mode: Option<u32>| oci::Device {
        path: path.into(),
        type_: kind.into(),
        major: 10,
        minor: 229,
        file_mode: mode,
        uid: 2,
        gid: 3,
        ..Default::default()
    };
    spec.linux.mut_or_insert_default().devices = vec![
        device("/dev/c", "c", Some(0o600)),
        device("/dev/b", "b", Some(0o640)),
        device("/dev/p", "p", Some(0o622)),
        device("/dev/plain", "u", None),
    ];
    let printed = rig.run("c", spec).await.success();
    let wanted = "/dev/c character special file a:e5 600 2:3\n\
        /dev/b block special file a:e5 640 2:3\n/dev/p fifo 0:0 622 2:3\n\
        /dev/plain character special file a:e5 666 2:3\n";
    assert_eq!(printed, wanted);
}

// exec: mount_test, cgroup_test

#[tokio::test]
async fn an_exec_changes_no_mount() {
    let rig = Rig::start().await;
    let (mut spec, root) = prepared(
        &rig,
        &["sh", "-c", "cat /proc/self/mountinfo; echo .; sleep 100"],
    );
    fs::create_dir(root.join("hidden")).unwrap();
    spec.root.mut_or_insert_default().readonly = true;
    spec.linux
        .mut_or_insert_default()
        .masked_paths
        .push("/hidden".into());
    let mut streams = rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    let first = read_until(streams.stdout.as_mut().unwrap(), "\n.\n").await;
    for id in ["a", "b"] {
        let exec = process(&["sh", "-c", "cat /proc/self/mountinfo; echo ."]);
        let streams = rig.exec("c", id, exec).await.unwrap();
        assert_eq!(rig.outcome("c", id, streams).await.success(), first);
    }
    assert_eq!(first.matches(" /hidden ").count(), 1, "{first}");
}

#[tokio::test]
async fn an_exec_goes_where_a_container_has_its_processes() {
    let rig = Rig::start().await;
    let script = "mkdir /sys/fs/cgroup/sub && echo 1 > /sys/fs/cgroup/sub/cgroup.procs && \
        echo moved && read x && echo +$x > /sys/fs/cgroup/cgroup.subtree_control; echo on; sleep 100";
    let (mut spec, _) = prepared(&rig, &["sh", "-c", script]);
    for mount in &mut spec.mounts {
        let cgroups = mount.type_ == "cgroup";
        mount.options.retain(|option| !cgroups || option != "ro");
    }
    let mut streams = rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    let stdout = streams.stdout.as_mut().unwrap();
    read_until(stdout, "moved\n").await;
    let group = async |id: &str| {
        let exec = process(&["cat", "/proc/self/cgroup"]);
        let streams = rig.exec("c", id, exec).await.unwrap();
        let printed = rig.outcome("c", id, streams).await.success();
        let line = printed.lines().find(|line| line.starts_with("0::"));
        line.unwrap().to_owned()
    };
    assert_eq!(group("before").await, "0::/");
    let file = |name: &str| fs::read_to_string(rig.cgroup_of("c").join(name)).unwrap();
    let all = file("cgroup.controllers");
    let domain = |name: &&str| ["memory", "io", "hugetlb"].contains(name);
    let Some(controller) = all.split_whitespace().find(domain) else {
        println!(
            "SKIPPED: an_exec_goes_where_a_container_has_its_processes: its second half: this \
             machine's cgroup v2 has no controllers; e2e cgroup_cases_of_the_conformance_suites has it"
        );
        return;
    };
    write(streams.stdin.as_mut().unwrap(), &format!("{controller}\n")).await;
    read_until(stdout, "on\n").await;
    assert_eq!(file("cgroup.subtree_control").trim(), controller);
    // Groups that hand controllers on have no processes of their own.
    assert_eq!(group("after").await, "0::/sub");
}

// mounts_recursive: those that mounts.rs does not show

#[tokio::test]
async fn recursive_times_of_access_and_links() {
    let rig = Rig::start().await;
    for (options, wanted) in [
        (&["rnoatime"][..], "noatime"),
        (&["rnoatime", "ratime"], "relatime"),
        (&["rrelatime"], "relatime"),
        (&["rnorelatime"], "relatime"),
        (&["rstrictatime"], ""),
        (&["rstrictatime", "rnostrictatime"], "relatime"),
        (&["rnodiratime"], "nodiratime,relatime"),
        (&["rnodiratime", "rdiratime"], "relatime"),
        (&["rnosymfollow"], "relatime,nosymfollow"),
        (&["rnosymfollow", "rsymfollow"], "relatime"),
    ] {
        let (mut spec, _) = prepared(&rig, &["cat", "/proc/self/mountinfo"]);
        let all: Vec<&str> = ["rbind", "rrw", "rsuid", "rdev", "rexec"]
            .iter()
            .chain(options)
            .copied()
            .collect();
        spec.mounts.push(bind(Path::new("/sys"), "/both", &all));
        let printed = rig.run("c", spec).await.success();
        let found: Vec<&str> = printed
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>())
            .filter(|fields| fields[4] == "/both" || fields[4].starts_with("/both/"))
            .map(|fields| fields[5])
            .collect();
        assert!(found.len() > 1, "nothing is mounted below /sys: {printed}");
        let wanted = ["rw", wanted].join(",");
        for each in found {
            assert_eq!(each, wanted.trim_end_matches(','), "{options:?}");
        }
    }
}

// io_priority, scheduler

#[tokio::test]
async fn every_class_and_policy() {
    let rig = Rig::start().await;
    let show = "busybox ionice -p $$; busybox cut -d' ' -f41 /proc/self/stat";
    for (class, priority, policy, wanted) in [
        ("IOPRIO_CLASS_RT", 1, "SCHED_OTHER", "realtime: prio 1\n0\n"),
        (
            "IOPRIO_CLASS_BE",
            2,
            "SCHED_BATCH",
            "best-effort: prio 2\n3\n",
        ),
        ("IOPRIO_CLASS_IDLE", 0, "SCHED_IDLE", "idle\n5\n"),
    ] {
        let (mut spec, _) = prepared(&rig, &["sh", "-c", show]);
        let process = spec.process.mut_or_insert_default();
        process.io_priority = Some(oci::IoPriority {
            class: class.into(),
            priority,
            ..Default::default()
        })
        .into();
        process.scheduler = Some(oci::Scheduler {
            policy: policy.into(),
            ..Default::default()
        })
        .into();
        assert_eq!(
            rig.run("c", spec).await.success(),
            wanted,
            "{class} {policy}"
        );
    }
}
