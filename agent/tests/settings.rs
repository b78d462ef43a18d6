// SPDX-License-Identifier: Apache-2.0
//! What a specification sets of a process besides its user: scheduling,
//! priorities, processors, personality, kernel parameters; of a container's
//! first process and of further ones.

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use bulkhead_agent_protocol::oci;
use common::*;
use ttrpc::Code;

/// What an exec in container `c` prints.
async fn exec_script(
    rig: &Rig,
    id: &str,
    script: &str,
    change: impl FnOnce(&mut oci::Process),
) -> String {
    let mut exec = process(&["sh", "-c", script]);
    change(&mut exec);
    let streams = rig.exec("c", id, exec).await.unwrap();
    rig.outcome("c", id, streams).await.success()
}

/// Nice value and policy, I/O priority, machine, the OOM killer's score.
const TRAITS: &str = "busybox cut -d' ' -f19,41 /proc/self/stat; busybox ionice -p $$; \
    busybox uname -m; cat /proc/self/oom_score_adj; ulimit -n";

#[tokio::test]
async fn scheduling_and_the_like_are_inherited_by_execs() {
    let rig = Rig::start().await;
    let mut spec = rig.spec("c", &["sh", "-c", &format!("{TRAITS}; sleep 100")]);
    let first = spec.process.mut_or_insert_default();
    first.scheduler = Some(oci::Scheduler {
        policy: "SCHED_BATCH".into(),
        nice: 5,
        ..Default::default()
    })
    .into();
    first.io_priority = Some(oci::IoPriority {
        class: "IOPRIO_CLASS_BE".into(),
        priority: 6,
        ..Default::default()
    })
    .into();
    first.oom_score_adj = Some(300);
    first.rlimits = vec![oci::Rlimit {
        type_: "RLIMIT_NOFILE".into(),
        soft: 77,
        hard: 77,
        ..Default::default()
    }];
    spec.linux.mut_or_insert_default().personality = Some(oci::Personality {
        domain: "LINUX32".into(),
        ..Default::default()
    })
    .into();
    let mut streams = rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    let wanted = "5 3\nbest-effort: prio 6\ni686\n300\n77\n";
    let printed = read_until(streams.stdout.as_mut().unwrap(), "77\n").await;
    assert_eq!(printed, wanted);
    assert_eq!(exec_script(&rig, "same", TRAITS, |_| {}).await, wanted);
    let printed = exec_script(&rig, "own", TRAITS, |exec| {
        exec.scheduler = Some(oci::Scheduler {
            policy: "SCHED_OTHER".into(),
            nice: 7,
            ..Default::default()
        })
        .into();
        exec.io_priority = Some(oci::IoPriority {
            class: "IOPRIO_CLASS_IDLE".into(),
            ..Default::default()
        })
        .into();
        exec.oom_score_adj = Some(400);
    })
    .await;
    assert_eq!(printed, "7 0\nidle\ni686\n400\n77\n");
}

#[tokio::test]
async fn an_exec_has_its_own_user_groups_umask_and_processors() {
    let rig = Rig::start().await;
    let spec = rig.spec("c", &["sleep", "100"]);
    rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    let show = "id -u; id -G; umask; grep Cpus_allowed_list /proc/self/status";
    let affinity = |initial: &str, last: &str| {
        Some(oci::CpuAffinity {
            initial: initial.into(),
            final_: last.into(),
            ..Default::default()
        })
        .into()
    };
    let printed = exec_script(&rig, "a", show, |exec| {
        exec.user = Some(oci::User {
            uid: 1000,
            gid: 1000,
            umask: Some(0o077),
            additional_gids: vec![7, 2000],
            ..Default::default()
        })
        .into();
        exec.exec_cpu_affinity = affinity("0-1", "0");
    })
    .await;
    assert_eq!(printed, "1000\n1000 7 2000\n0077\nCpus_allowed_list:\t0\n");
    let mut exec = process(&["true"]);
    exec.exec_cpu_affinity = affinity("", "1023");
    let (code, text) = status(rig.exec("c", "b", exec).await.map(drop));
    assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
    assert!(text.contains("process.execCPUAffinity"), "{text}");
}

#[tokio::test]
async fn sysctls_of_its_own_namespaces() {
    let rig = Rig::start().await;
    let outside = fs::read_to_string("/proc/sys/kernel/shmmni").unwrap();
    let files = "/proc/sys/kernel/shmmni /proc/sys/kernel/msgmax /proc/sys/fs/mqueue/msg_max";
    let script = format!("cat {files} /proc/sys/kernel/domainname");
    let mut spec = rig.spec("c", &["sh", "-c", &script]);
    spec.linux.mut_or_insert_default().sysctl = [
        ("kernel.shmmni", "77"),
        ("kernel/msgmax", "9999"),
        ("fs.mqueue.msg_max", "11"),
        ("kernel.domainname", "example"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into();
    let printed = rig.run("c", spec).await.success();
    assert_eq!(printed, "77\n9999\n11\nexample\n");
    assert_eq!(
        fs::read_to_string("/proc/sys/kernel/shmmni").unwrap(),
        outside
    );
}

#[tokio::test]
async fn devices_are_meant_by_their_names() {
    let rig = Rig::start().await;
    let device = |name: &str, optional| oci::Device {
        path: "/dev/given".into(),
        type_: "c".into(),
        // What the host says, which is another device here.
        major: 240,
        minor: 17,
        name: name.into(),
        optional,
        ..Default::default()
    };
    let rule = |allow, kind: &str, name: &str| oci::DeviceRule {
        allow,
        type_: kind.into(),
        major: (!name.is_empty()).then_some(240),
        minor: (!name.is_empty()).then_some(17),
        access: "rwm".into(),
        name: name.into(),
        ..Default::default()
    };
    let run = async |devices: Vec<oci::Device>, allowed: &str| {
        let script = "stat -c '%t:%T' /dev/given; : </dev/given && echo open";
        let mut spec = rig.spec("c", &["sh", "-c", script]);
        let linux = spec.linux.mut_or_insert_default();
        linux.devices = devices;
        let rules = vec![rule(false, "a", ""), rule(true, "c", allowed)];
        linux.resources.mut_or_insert_default().devices = rules;
        rig.run("c", spec).await
    };
    // None of those that every container has.
    let found = ["fuse", "net/tun", "loop-control"]
        .into_iter()
        .find_map(|name| {
            let meta = fs::metadata(Path::new("/dev").join(name)).ok()?;
            Some((name, meta.rdev()))
        });
    let Some((name, number)) = found else {
        println!("SKIPPED: devices_are_meant_by_their_names: no device of this machine serves");
        return;
    };
    let (major, minor) = (libc::major(number), libc::minor(number));
    let outcome = run(vec![device(name, false)], name).await;
    let wanted = format!("{major:x}:{minor:x}\nopen\n");
    assert_eq!(outcome.stdout, wanted, "{outcome:?}");
    let outcome = run(vec![device(name, false)], "nosuch").await;
    assert!(
        outcome.stderr.contains("Operation not permitted"),
        "{outcome:?}"
    );
    let outcome = run(vec![device("nosuch", true)], name).await;
    assert!(outcome.stderr.contains("No such file"), "{outcome:?}");
    let mut spec = rig.spec("c", &["true"]);
    spec.linux.mut_or_insert_default().devices = vec![device("nosuch", false)];
    let (code, text) = status(rig.create("c", spec).await.map(drop));
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.contains("linux.devices: /dev/given"), "{text}");
}
