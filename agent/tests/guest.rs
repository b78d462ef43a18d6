// SPDX-License-Identifier: Apache-2.0
//! What the agent tells of the guest as a whole, and what it runs there.

mod common;

use std::fs;

use bulkhead_agent_protocol::agent;
use common::*;
use ttrpc::Code;

#[tokio::test]
async fn figures_of_the_machine() {
    let rig = Rig::start().await;
    let reply = rig
        .client
        .stats_guest(rig.context(), &agent::Empty::new())
        .await
        .unwrap();
    let total = reply.memory.iter().find(|figure| figure.name == "MemTotal");
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let kib: u64 = text.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert_eq!(total.unwrap().bytes, kib << 10);
    assert_eq!(reply.load_thousandths.len(), 3);
    assert!(reply.threads > 0);
    assert!(
        reply.disks.iter().any(|disk| disk.read_bytes > 0),
        "{reply:?}"
    );
}

#[tokio::test]
async fn the_kernels_log_in_parts() {
    let rig = Rig::start().await;
    let ask = async |from: u64, max_bytes: u32| {
        let request = agent::KernelLogRequest {
            from,
            max_bytes,
            ..Default::default()
        };
        rig.client
            .kernel_log(rig.context(), &request)
            .await
            .unwrap()
    };
    let (mut from, mut lines) = (0, Vec::new());
    for _ in 0..1000 {
        let reply = ask(from, 4096).await;
        let bytes: usize = reply.lines.iter().map(String::len).sum();
        assert!(bytes <= 4096 || reply.lines.len() == 1, "{bytes}");
        assert!(reply.next >= from);
        from = reply.next;
        lines.extend(reply.lines);
        if !reply.more {
            break;
        }
    }
    assert!(!lines.is_empty());
    assert!(lines.iter().all(|line| line.starts_with('[')));
    // The parts are the whole, each line once.
    let last = ask(from - 1, 1).await;
    assert_eq!(last.lines.first(), lines.last());
    assert_eq!(last.next, from);
}

#[tokio::test]
async fn a_process_of_the_guest_itself_must_be_allowed() {
    let rig = Rig::start().await;
    let (stdio, _pending) = rig.streams(false);
    let request = agent::ExecProcessRequest {
        container_id: "c".into(),
        exec_id: "e".into(),
        process: Some(process(&["/bin/true"])).into(),
        stdio: Some(stdio).into(),
        ..Default::default()
    };
    let refused = rig.client.exec_guest(rig.context(), &request).await;
    let (code, text) = status(refused);
    assert_eq!(code, Code::PERMISSION_DENIED, "{text}");
    assert!(text.contains("ExecGuest"), "{text}");
}

#[tokio::test]
async fn a_process_of_the_guest_itself() {
    let rig = Rig::start_with(&["--test-rpcs", "+ExecGuest"]).await;
    let spec = rig.spec("c", &["sleep", "1000"]);
    rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    let run = async |id: &str, script: &str| {
        let (stdio, pending) = rig.streams(false);
        let request = agent::ExecProcessRequest {
            container_id: "c".into(),
            exec_id: id.into(),
            process: Some(process(&["/bin/sh", "-c", script])).into(),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        let reply = rig
            .client
            .exec_guest(rig.context(), &request)
            .await
            .unwrap();
        pending.arrive(reply.pid).await
    };
    let streams = run(
        "a",
        "readlink /proc/self/ns/mnt /proc/self/ns/pid; cat /proc/self/cgroup",
    )
    .await;
    let printed = rig.outcome("c", "a", streams).await.success();
    for name in ["mnt", "pid"] {
        let own = fs::read_link(format!("/proc/{}/ns/{name}", rig.agent_pid())).unwrap();
        assert!(printed.contains(own.to_str().unwrap()), "{printed}");
    }
    assert!(printed.contains("/guest-c\n"), "{printed}");
    // It goes with the container, and all that it has started.
    let mut streams = run("b", "sleep 1000 & echo $!; sleep 1000").await;
    let first = read_until(streams.stdout.as_mut().unwrap(), "\n").await;
    rig.signal("c", "", libc::SIGKILL, false).await.unwrap();
    rig.wait("c", "").await.unwrap();
    assert_eq!(rig.wait("c", "b").await.unwrap().exit_status, 137);
    rig.delete("c").await.unwrap();
    assert!(!fs::exists(format!("/proc/{}/exe", first.trim())).unwrap());
    let other = rig.cgroup_of("x").with_file_name("..").join("guest-c");
    assert!(!other.exists());
}
