// SPDX-License-Identifier: Apache-2.0
//! User namespaces with id mappings, time namespaces, and a pid namespace that
//! containers share.

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Command;

use bulkhead_agent_protocol::oci;
use common::*;
use ttrpc::Code;

/// The first id outside of those inside.
const FIRST: u32 = 100_000;

fn namespace(spec: &mut oci::Spec, kind: &str) {
    let linux = spec.linux.mut_or_insert_default();
    linux.namespaces.push(oci::Namespace {
        type_: kind.into(),
        ..Default::default()
    });
}

/// A container with ids of its own, whose root file system has them.
fn mapped(rig: &Rig, args: &[&str]) -> oci::Spec {
    let mut spec = rig.spec("c", args);
    let owner = format!("{FIRST}:{FIRST}");
    let root = rig.rootfs("c");
    let mut chown = Command::new("chown");
    chown.args(["-R", "-h", &owner]).arg(root);
    let mut child = alone(|| chown.spawn().unwrap());
    assert!(child.wait().unwrap().success());
    namespace(&mut spec, "user");
    let range = oci::IdMapping {
        host_id: FIRST,
        size: 65536,
        ..Default::default()
    };
    let linux = spec.linux.mut_or_insert_default();
    linux.uid_mappings = vec![range.clone()];
    linux.gid_mappings = vec![range];
    spec
}

#[tokio::test]
async fn a_user_namespace_has_its_own_ids() {
    let rig = Rig::start().await;
    let script = "id -u; cat /proc/self/uid_map /proc/self/gid_map | tr -s ' '; touch /made; \
                  stat -c '%u %g' /made; stat -c '%t:%T' /dev/null; echo > /dev/null; \
                  cat /proc/self/setgroups; ls /sys/class >/dev/null; cat /proc/1/comm; \
                  touch /sys/x 2>/dev/null || echo refused; cat /private/file";
    let mut spec = mapped(&rig, &["sh", "-c", script]);
    // Of a user that the container has not.
    let private = rig.directory.path().join("private");
    fs::create_dir(&private).unwrap();
    fs::write(private.join("file"), "seen\n").unwrap();
    spec.mounts
        .push(bind(&private, "/private", &["bind", "ro"]));
    let printed = rig.run("c", spec).await.success();
    assert_eq!(
        printed,
        " 0 100000 65536\n".repeat(2).replacen(" 0", "0\n 0", 1)
            + "0 0\n1:3\nallow\nsh\nrefused\nseen\n"
    );
    let made = fs::metadata(rig.rootfs("c").join("made")).unwrap();
    assert_eq!((made.uid(), made.gid()), (FIRST, FIRST));
}

#[tokio::test]
async fn a_user_of_a_user_namespace() {
    let rig = Rig::start().await;
    let mut spec = mapped(
        &rig,
        &[
            "sh",
            "-c",
            "id -u; id -G; echo again > /dev/stdout; sleep 100",
        ],
    );
    spec.hostname = "inside".into();
    let first = spec.process.mut_or_insert_default();
    first.user = Some(oci::User {
        uid: 1000,
        gid: 1000,
        additional_gids: vec![2000],
        ..Default::default()
    })
    .into();
    let mut streams = rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    let printed = read_until(streams.stdout.as_mut().unwrap(), "again\n").await;
    assert_eq!(printed, "1000\n1000 2000\nagain\n");
    let outside = fs::metadata(format!("/proc/{}", streams.pid)).unwrap();
    assert_eq!(outside.uid(), FIRST + 1000);
    // As root in there: what the namespaces of its own allow, and no more.
    let script = "id -u; hostname; hostname changed && hostname; \
                  chmod 600 /private 2>/dev/null || echo refused; readlink /proc/self/ns/user";
    let mut exec = process(&["sh", "-c", script]);
    let sets = exec.capabilities.mut_or_insert_default();
    for set in [&mut sets.bounding, &mut sets.effective, &mut sets.permitted] {
        set.push("CAP_SYS_ADMIN".into());
    }
    let exec_streams = rig.exec("c", "e", exec).await.unwrap();
    let printed = rig.outcome("c", "e", exec_streams).await.success();
    let theirs = fs::read_link(format!("/proc/{}/ns/user", streams.pid)).unwrap();
    let ours = fs::read_link("/proc/self/ns/user").unwrap();
    assert_ne!(theirs, ours);
    let wanted = format!("0\ninside\nchanged\nrefused\n{}\n", theirs.display());
    assert_eq!(printed, wanted);
}

#[tokio::test]
async fn limits_that_take_privileges_in_a_user_namespace() {
    let rig = Rig::start().await;
    let show = "ulimit -n; ulimit -Hn; \
                busybox cut -d' ' -f19 /proc/self/stat; cat /proc/self/oom_score_adj";
    let mut spec = mapped(&rig, &["sh", "-c", &format!("{show}; sleep 100")]);
    let first = spec.process.mut_or_insert_default();
    first.rlimits = vec![oci::Rlimit {
        type_: "RLIMIT_NOFILE".into(),
        soft: 70,
        hard: 77,
        ..Default::default()
    }];
    first.scheduler = Some(oci::Scheduler {
        policy: "SCHED_OTHER".into(),
        nice: -5,
        ..Default::default()
    })
    .into();
    first.oom_score_adj = Some(100);
    let mut streams = rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    let wanted = "70\n77\n-5\n100\n";
    let printed = read_until(streams.stdout.as_mut().unwrap(), "100\n").await;
    assert_eq!(printed, wanted);
    let exec = rig.exec("c", "e", process(&["sh", "-c", show])).await;
    let printed = rig.outcome("c", "e", exec.unwrap()).await.success();
    assert_eq!(printed, wanted);
}

#[tokio::test]
async fn a_user_namespace_with_the_pods_other_namespaces() {
    let rig = Rig::start().await;
    let script = "touch /sys/fs/cgroup/x 2>/dev/null || echo refused; hostname";
    let mut spec = mapped(&rig, &["sh", "-c", script]);
    let linux = spec.linux.mut_or_insert_default();
    linux
        .namespaces
        .retain(|namespace| namespace.type_ != "cgroup");
    for namespace in &mut linux.namespaces {
        if namespace.type_ == "uts" {
            namespace.path = "/proc/1/ns/uts".into();
        }
    }
    let printed = rig.run("c", spec).await.success();
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    assert_eq!(printed, format!("refused\n{name}"));
}

#[tokio::test]
async fn an_unmapped_user_is_refused_and_leaves_nothing() {
    let rig = Rig::start().await;
    let mut spec = mapped(&rig, &["true"]);
    spec.process
        .mut_or_insert_default()
        .user
        .mut_or_insert_default()
        .uid = 70_000;
    let (_, text) = status(rig.create("c", spec).await.map(drop));
    assert!(text.contains("set user"), "{text}");
    // Two ranges of one id.
    let mut spec = mapped(&rig, &["true"]);
    let linux = spec.linux.mut_or_insert_default();
    linux.uid_mappings.push(linux.uid_mappings[0].clone());
    let (_, text) = status(rig.create("c", spec).await.map(drop));
    assert!(text.contains("uid_map"), "{text}");
    assert!(!rig.cgroup_of("c").exists());
}

/// Seconds since the boot that processes of container `c` see.
async fn uptime(rig: &Rig, id: &str) -> f64 {
    let streams = rig.exec("c", id, process(&["cat", "/proc/uptime"])).await;
    let printed = rig.outcome("c", id, streams.unwrap()).await.success();
    printed.split(' ').next().unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_time_namespace_has_its_offsets() {
    let rig = Rig::start().await;
    let mut spec = rig.spec("c", &["sh", "-c", "cat /proc/uptime; sleep 100"]);
    namespace(&mut spec, "time");
    for (clock, secs) in [("boottime", 7_000_000), ("monotonic", 1_000_000)] {
        let offset = oci::TimeOffset {
            secs,
            nanosecs: 5,
            ..Default::default()
        };
        let linux = spec.linux.mut_or_insert_default();
        linux.time_offsets.insert(clock.into(), offset);
    }
    let mut streams = rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    let printed = read_until(streams.stdout.as_mut().unwrap(), "\n").await;
    let inside: f64 = printed.split(' ').next().unwrap().parse().unwrap();
    let text = fs::read_to_string("/proc/uptime").unwrap();
    let outside: f64 = text.split(' ').next().unwrap().parse().unwrap();
    assert!((inside - outside - 7e6).abs() < 60.0, "{inside} {outside}");
    assert!((uptime(&rig, "e").await - inside).abs() < 60.0);
    // Before the boot of the machine there was nothing.
    let mut spec = rig.spec("d", &["true"]);
    namespace(&mut spec, "time");
    let offset = oci::TimeOffset {
        secs: -1_000_000_000,
        ..Default::default()
    };
    let linux = spec.linux.mut_or_insert_default();
    linux.time_offsets.insert("boottime".into(), offset);
    let (code, text) = status(rig.create("d", spec).await.map(drop));
    assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
    assert!(text.contains("linux.timeOffsets"), "{text}");
}

#[tokio::test]
async fn time_and_user_namespaces_together() {
    let rig = Rig::start().await;
    let mut spec = mapped(&rig, &["cat", "/proc/uptime"]);
    namespace(&mut spec, "time");
    let offset = oci::TimeOffset {
        secs: 9_000_000,
        ..Default::default()
    };
    let linux = spec.linux.mut_or_insert_default();
    linux.time_offsets.insert("boottime".into(), offset);
    let printed = rig.run("c", spec).await.success();
    let inside: f64 = printed.split(' ').next().unwrap().parse().unwrap();
    assert!(inside > 9e6, "{inside}");
}

/// A container in the pid namespace of another.
fn neighbour(rig: &Rig, of: &str, args: &[&str]) -> oci::Spec {
    let mut spec = rig.spec("c", args);
    for namespace in &mut spec.linux.mut_or_insert_default().namespaces {
        if namespace.type_ == "pid" {
            namespace.container_id = of.into();
        }
    }
    spec
}

#[tokio::test]
async fn containers_that_share_a_pid_namespace() {
    let rig = Rig::start().await;
    let pause = rig.spec("pause", &["sleep", "100"]);
    let pause = rig.create("pause", pause).await.unwrap().pid;
    rig.start_container("pause").await.unwrap();
    let script = "cat /proc/1/comm; readlink /proc/self/ns/pid; sleep 100";
    let spec = neighbour(&rig, "pause", &["sh", "-c", script]);
    let mut streams = rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    let theirs = fs::read_link(format!("/proc/{pause}/ns/pid")).unwrap();
    let wanted = format!("sleep\n{}\n", theirs.display());
    let printed = read_until(streams.stdout.as_mut().unwrap(), "]\n").await;
    assert_eq!(printed, wanted);
    // An exec is there too, and sees both.
    let script = "until [ $(cat /proc/[0-9]*/comm 2>/dev/null | grep -cx sleep) = 2 ]; \
                  do true; done; kill -9 1; echo alive";
    let show = process(&["sh", "-c", script]);
    let exec = rig.exec("c", "e", show).await.unwrap();
    let printed = rig.outcome("c", "e", exec).await.success();
    assert_eq!(printed, "alive\n");
    // The end of one is not the other's, unless it is the namespace's first.
    rig.signal("c", "", libc::SIGKILL, false).await.unwrap();
    assert_eq!(rig.wait("c", "").await.unwrap().exit_status, 137);
    rig.delete("c").await.unwrap();
    let spec = neighbour(&rig, "pause", &["sleep", "100"]);
    rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    rig.signal("pause", "", libc::SIGKILL, false).await.unwrap();
    assert_eq!(rig.wait("c", "").await.unwrap().exit_status, 137);
    rig.delete("c").await.unwrap();
    let spec = neighbour(&rig, "pause", &["true"]);
    let (code, text) = status(rig.create("c", spec).await.map(drop));
    assert_eq!(code, Code::FAILED_PRECONDITION, "{text}");
    let spec = neighbour(&rig, "nobody", &["true"]);
    let (code, text) = status(rig.create("c", spec).await.map(drop));
    assert_eq!(code, Code::NOT_FOUND, "{text}");
    assert!(text.contains("nobody"), "{text}");
}

#[tokio::test]
async fn containers_that_share_pid_and_user_namespaces() {
    let rig = Rig::start().await;
    let pause = mapped(&rig, &["sleep", "100"]);
    let pause = rig.create("pause", pause).await.unwrap().pid;
    rig.start_container("pause").await.unwrap();
    let script = "cat /proc/1/comm; id -u; readlink /proc/self/ns/user; hostname; \
                  touch /made; stat -c '%u' /made; sleep 100";
    let with = |script: &str, of: &str| {
        let mut spec = mapped(&rig, &["sh", "-c", script]);
        for namespace in &mut spec.linux.mut_or_insert_default().namespaces {
            if ["pid", "user"].contains(&namespace.type_.as_str()) {
                namespace.container_id = of.into();
            }
        }
        spec.hostname = "inside".into();
        spec
    };
    let mut streams = rig.create("c", with(script, "pause")).await.unwrap();
    rig.start_container("c").await.unwrap();
    let users = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/user")).unwrap();
    let theirs = users(pause);
    let wanted = format!("sleep\n0\n{}\ninside\n0\n", theirs.display());
    let printed = read_until(streams.stdout.as_mut().unwrap(), "inside\n0\n").await;
    assert_eq!(printed, wanted);
    assert_eq!(users(streams.pid), theirs);
    assert_ne!(theirs, fs::read_link("/proc/self/ns/user").unwrap());
    // An exec is where its container is.
    let show = process(&["sh", "-c", "cat /proc/1/comm; hostname; id -u"]);
    let exec = rig.exec("c", "e", show).await.unwrap();
    let printed = rig.outcome("c", "e", exec).await.success();
    assert_eq!(printed, "sleep\ninside\n0\n");
    rig.signal("c", "", libc::SIGKILL, false).await.unwrap();
    assert_eq!(rig.wait("c", "").await.unwrap().exit_status, 137);
    rig.delete("c").await.unwrap();
    // Of who has none there is none to join.
    let plain = rig.spec("plain", &["sleep", "100"]);
    rig.create("plain", plain).await.unwrap();
    let (code, text) = status(rig.create("c", with("true", "plain")).await.map(drop));
    assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
    assert!(text.contains("has no user namespace"), "{text}");
}

#[tokio::test]
async fn the_guests_processes_in_a_user_namespace() {
    let rig = Rig::start().await;
    let script = "readlink /proc/self/ns/pid; touch /proc/sys/x 2>/dev/null || echo refused";
    let mut spec = mapped(&rig, &["sh", "-c", script]);
    let linux = spec.linux.mut_or_insert_default();
    linux
        .namespaces
        .retain(|namespace| namespace.type_ != "pid");
    let printed = rig.run("c", spec).await.success();
    let ours = fs::read_link("/proc/self/ns/pid").unwrap();
    assert_eq!(printed, format!("{}\nrefused\n", ours.display()));
}

#[tokio::test]
async fn times_of_access_in_a_user_namespace() {
    let rig = Rig::start().await;
    let script = "grep -E ' /(no|strict|plain) ' /proc/self/mountinfo | cut -d' ' -f5,6 | sort";
    let mut spec = mapped(&rig, &["sh", "-c", script]);
    let source = rig.directory.path().join("source");
    fs::create_dir(&source).unwrap();
    for (place, options) in [
        ("/no", &["bind", "noatime", "nodiratime", "ro"][..]),
        ("/plain", &["bind", "nosuid"]),
        ("/strict", &["rbind", "rstrictatime", "nodev"]),
    ] {
        spec.mounts.push(bind(&source, place, options));
    }
    let printed = rig.run("c", spec.clone()).await.success();
    let lines: Vec<&str> = printed.lines().collect();
    assert_eq!(lines[0], "/no ro,noatime,nodiratime", "{printed}");
    assert!(lines[1].starts_with("/plain rw,nosuid"), "{printed}");
    assert_eq!(lines[2], "/strict rw,nodev", "{printed}");
    // What cannot be opened is told as ever.
    let gone = rig.directory.path().join("gone");
    spec.mounts.push(bind(&gone, "/gone", &["bind", "noatime"]));
    let (_, text) = status(rig.create("c", spec).await.map(drop));
    assert!(text.contains("open mount source"), "{text}");
    assert!(text.contains("gone"), "{text}");
    assert!(!rig.cgroup_of("c").exists());
}

#[tokio::test]
async fn the_private_directory_of_a_volume_stays_private() {
    let rig = Rig::start().await;
    let mut spec = mapped(
        &rig,
        &["sh", "-c", "ls /private 2>/dev/null || echo refused"],
    );
    let private = rig.directory.path().join("private");
    fs::create_dir(&private).unwrap();
    fs::set_permissions(&private, fs::Permissions::from_mode(0o700)).unwrap();
    spec.mounts.push(bind(&private, "/private", &["bind"]));
    assert_eq!(rig.run("c", spec).await.success(), "refused\n");
}

#[tokio::test]
async fn a_terminal_in_a_user_namespace() {
    let rig = Rig::start().await;
    let script = "tty; stat -c '%u %g' $(tty); stty size; ls /dev/console";
    let mut spec = mapped(&rig, &["sh", "-c", script]);
    let first = spec.process.mut_or_insert_default();
    first.user.mut_or_insert_default().uid = 1000;
    first.terminal = true;
    first.console_size = Some(oci::Box {
        height: 33,
        width: 77,
        ..Default::default()
    })
    .into();
    let mut streams = rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    let printed = read_until(streams.stdin.as_mut().unwrap(), "console\r\n").await;
    assert_eq!(printed, "/dev/pts/0\r\n1000 5\r\n33 77\r\n/dev/console\r\n");
    assert_eq!(rig.wait("c", "").await.unwrap().exit_status, 0);
}
