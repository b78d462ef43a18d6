// SPDX-License-Identifier: Apache-2.0
//! Limits, on a machine whose cgroup v2 hierarchy has controllers: a guest,
//! or a host without cgroup v1.

mod common;

use std::fs;

use bulkhead_agent_protocol::{agent, oci};
use common::*;

/// Whether `controller` can be used here; says so when not.
fn available(test: &str, controller: &str) -> bool {
    let list = fs::read_to_string(cgroup_root().join("cgroup.controllers")).unwrap_or_default();
    let there = list.split_whitespace().any(|name| name == controller);
    if !there {
        println!("SKIPPED: {test}: this machine's cgroup v2 has no {controller} controller");
    }
    there
}

fn limited(rig: &Rig, script: &str, resources: oci::Resources) -> oci::Spec {
    let mut spec = rig.spec("c", &["sh", "-c", script]);
    spec.linux.mut_or_insert_default().resources = Some(resources).into();
    spec
}

fn memory(limit: i64) -> oci::Resources {
    oci::Resources {
        memory: Some(oci::Memory {
            limit: Some(limit),
            swap: Some(limit),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_container_that_takes_too_much_memory() {
    if !available("a_container_that_takes_too_much_memory", "memory") {
        return;
    }
    let rig = Rig::start().await;
    // A file in memory counts; a variable that doubles is the program's own.
    let script = "x=xxxxxxxxxxxxxxxx; while true; do x=$x$x; done";
    let spec = limited(&rig, script, memory(16 << 20));
    rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    let exit = rig.wait("c", "").await.unwrap();
    assert!(exit.oom_killed, "{exit:?}");
    assert_eq!(exit.exit_status, 137);
    let stats = rig
        .client
        .stats_container(rig.context(), &rig.container("c"))
        .await
        .unwrap();
    assert_eq!(stats.memory.usage_limit, 16 << 20);
    assert!(stats.memory_events.oom_kill > 0, "{stats:?}");
    assert!(stats.memory.max_usage > 8 << 20, "{stats:?}");
    rig.delete("c").await.unwrap();
}

#[tokio::test]
async fn a_fork_bomb_stays_small() {
    if !available("a_fork_bomb_stays_small", "pids") {
        return;
    }
    let rig = Rig::start().await;
    let resources = oci::Resources {
        pids_limit: Some(5),
        ..Default::default()
    };
    let script = "for i in 1 2 3 4 5 6 7 8 9; do sleep 100 & done; echo all";
    let spec = limited(&rig, script, resources);
    let mut streams = rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    // The shell gives up when it cannot fork.
    let stderr = streams.stderr.as_mut().unwrap();
    read_until(stderr, "fork").await;
}

#[tokio::test]
async fn limits_are_in_the_files_and_can_be_changed() {
    let name = "limits_are_in_the_files_and_can_be_changed";
    if !["cpu", "memory", "pids", "cpuset"]
        .iter()
        .all(|controller| available(name, controller))
    {
        return;
    }
    let rig = Rig::start().await;
    let resources = oci::Resources {
        cpu: Some(oci::Cpu {
            shares: Some(1024),
            quota: Some(20_000),
            period: Some(100_000),
            cpus: "0,77".into(),
            ..Default::default()
        })
        .into(),
        pids_limit: Some(33),
        unified: [("memory.high".to_owned(), "33554432".to_owned())].into(),
        ..memory(64 << 20)
    };
    let spec = limited(&rig, "sleep 100", resources);
    rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    let file = |name: &str| {
        let text = fs::read_to_string(rig.cgroup_of("c").join(name)).unwrap();
        text.trim().to_owned()
    };
    for (name, wanted) in [
        ("cpu.weight", "100"),
        ("cpu.max", "20000 100000"),
        ("cpuset.cpus", "0"),
        ("memory.max", "67108864"),
        ("memory.high", "33554432"),
        ("pids.max", "33"),
    ] {
        assert_eq!(file(name), wanted, "{name}");
    }
    let request = agent::UpdateContainerRequest {
        container_id: "c".into(),
        resources: Some(oci::Resources {
            pids_limit: Some(-1),
            ..memory(128 << 20)
        })
        .into(),
        ..Default::default()
    };
    rig.client
        .update_container(rig.context(), &request)
        .await
        .unwrap();
    assert_eq!(file("memory.max"), "134217728");
    assert_eq!(file("pids.max"), "max");
    assert_eq!(file("cpu.max"), "20000 100000");
    let stats = rig
        .client
        .stats_container(rig.context(), &rig.container("c"))
        .await
        .unwrap();
    assert!(
        stats.memory.usage > 0 && stats.memory.stat.contains_key("anon"),
        "{stats:?}"
    );
    assert_eq!((stats.pids.current, stats.pids.limit), (1, u64::MAX));
}

#[tokio::test]
async fn devices_outside_the_rules_are_refused() {
    let rig = Rig::start().await;
    let rule = |allow, access: &str, number: Option<(i64, i64)>| oci::DeviceRule {
        allow,
        type_: if number.is_some() { "c" } else { "a" }.into(),
        major: number.map(|(major, _)| major),
        minor: number.map(|(_, minor)| minor),
        access: access.into(),
        ..Default::default()
    };
    let resources = oci::Resources {
        // Deny all, then allow one that no driver has, for reading: a refusal
        // and a missing driver are different errors.
        devices: vec![rule(false, "rwm", None), rule(true, "r", Some((250, 77)))],
        ..Default::default()
    };
    let script = "mknod /dev/mem c 1 1 && mknod /dev/none c 250 77; \
        cat /dev/mem; cat /dev/none; (: > /dev/none); head -c 1 /dev/zero | wc -c";
    let spec = limited(&rig, script, resources);
    let outcome = rig.run("c", spec).await;
    assert_eq!(outcome.stdout, "1\n");
    let errors: Vec<&str> = outcome.stderr.lines().collect();
    assert_eq!(errors.len(), 3, "{outcome:?}");
    assert!(
        errors[0].ends_with("Operation not permitted"),
        "{outcome:?}"
    );
    assert!(errors[1].contains("No such device"), "{outcome:?}");
    assert!(
        errors[2].ends_with("Operation not permitted"),
        "{outcome:?}"
    );
}

#[tokio::test]
async fn an_exec_joins_the_containers_group() {
    let rig = Rig::start().await;
    let spec = rig.spec("c", &["sleep", "100"]);
    rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    let exec = process(&["cat", "/proc/self/cgroup"]);
    let streams = rig.exec("c", "e", exec).await.unwrap();
    let printed = rig.outcome("c", "e", streams).await.success();
    assert!(printed.lines().any(|line| line == "0::/"), "{printed}");
}
