// SPDX-License-Identifier: Apache-2.0
//! The list of calls that are answered.

mod common;

use std::fs;

use bulkhead_agent_protocol::agent;
use common::*;
use ttrpc::Code;

#[tokio::test]
async fn only_the_calls_that_are_allowed_are_answered() {
    let rig = Rig::start_with(&["--test-rpcs", "Check,StatsContainer"]).await;
    let empty = agent::Empty::new();
    rig.client.check(rig.context(), &empty).await.unwrap();
    let (code, text) = status(rig.create("c", rig.spec("c", &["true"])).await);
    assert_eq!(code, Code::PERMISSION_DENIED);
    assert_eq!(
        text,
        "CreateContainer is not among the calls of bulkhead.rpcs"
    );
    let (code, _) = status(rig.client.shutdown(rig.context(), &empty).await);
    assert_eq!(code, Code::PERMISSION_DENIED);
    // One that is allowed goes its way.
    let c = rig.container("c");
    let (code, _) = status(rig.client.stats_container(rig.context(), &c).await);
    assert_eq!(code, Code::NOT_FOUND);
}

#[test]
fn an_unknown_call_is_no_list() {
    let arguments = ["socket", "streams", "cgroup"].map(|name| format!("--test-{name}"));
    let directory = tempfile::tempdir().unwrap();
    let group = cgroup_root().join(format!("bulkhead-test-list-{}", std::process::id()));
    let places = [
        directory.path().join("rpc"),
        directory.path().join("streams"),
        group.clone(),
    ];
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_bulkhead-agent"));
    for (argument, place) in arguments.iter().zip(places) {
        command.arg(argument).arg(place);
    }
    command.args(["--test-rpcs", "Check,Chekc"]);
    let output = alone(|| command.output().unwrap());
    for below in ["pod", ""] {
        let _ = fs::remove_dir(group.join(below));
    }
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("bulkhead.rpcs: there is no call"), "{text}");
}
