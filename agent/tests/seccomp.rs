// SPDX-License-Identifier: Apache-2.0
//! seccomp profiles on running containers.

mod common;

use bulkhead_agent_protocol::oci;
use common::*;
use ttrpc::Code;

fn syscalls(names: &[&str], action: &str, errno: Option<u32>) -> oci::Syscall {
    oci::Syscall {
        names: names.iter().map(|name| (*name).into()).collect(),
        action: action.into(),
        errno_ret: errno,
        ..Default::default()
    }
}

fn allow_but(list: Vec<oci::Syscall>) -> oci::Seccomp {
    oci::Seccomp {
        default_action: "SCMP_ACT_ALLOW".into(),
        architectures: vec!["SCMP_ARCH_X86_64".into(), "SCMP_ARCH_X86".into()],
        syscalls: list,
        ..Default::default()
    }
}

async fn run(profile: oci::Seccomp, script: &str, no_new_privileges: bool) -> Outcome {
    let rig = Rig::start().await;
    let mut spec = rig.spec("c", &["sh", "-c", script]);
    spec.process.mut_or_insert_default().no_new_privileges = no_new_privileges;
    spec.linux.mut_or_insert_default().seccomp = Some(profile).into();
    rig.run("c", spec).await
}

#[tokio::test]
async fn a_forbidden_call_fails_with_its_errno() {
    for no_new_privileges in [true, false] {
        let profile = allow_but(vec![syscalls(
            &["chmod", "fchmodat"],
            "SCMP_ACT_ERRNO",
            Some(28),
        )]);
        let script = "grep Seccomp: /proc/self/status; chmod 700 /tmp";
        let outcome = run(profile, script, no_new_privileges).await;
        assert_eq!(outcome.stdout, "Seccomp:\t2\n");
        assert!(
            outcome.stderr.contains("No space left on device"),
            "{outcome:?}"
        );
        assert_eq!(outcome.status, 1);
    }
}

#[tokio::test]
async fn arguments_are_compared() {
    // kill(pid, 10) only.
    let mut forbidden = syscalls(&["kill"], "SCMP_ACT_ERRNO", None);
    forbidden.args = vec![oci::SyscallArg {
        index: 1,
        value: 10,
        op: "SCMP_CMP_EQ".into(),
        ..Default::default()
    }];
    let script = "sleep 10 & kill -10 $! && echo ten; kill -12 $! && echo twelve";
    let outcome = run(allow_but(vec![forbidden]), script, true).await;
    assert_eq!(outcome.stdout, "twelve\n");
    assert!(
        outcome.stderr.contains("Operation not permitted"),
        "{outcome:?}"
    );
}

#[tokio::test]
async fn a_killed_process_says_so() {
    let profile = allow_but(vec![syscalls(&["uname"], "SCMP_ACT_KILL_PROCESS", None)]);
    // The shell itself asks, sooner or later.
    let outcome = run(profile, "uname -r", true).await;
    // 128 + SIGSYS
    assert_eq!(outcome.status, 159, "{outcome:?}");
}

#[tokio::test]
async fn an_exec_is_filtered_too() {
    let rig = Rig::start().await;
    let mut spec = rig.spec("c", &["sleep", "100"]);
    spec.linux.mut_or_insert_default().seccomp = Some(allow_but(vec![syscalls(
        &["chmod", "fchmodat"],
        "SCMP_ACT_ERRNO",
        None,
    )]))
    .into();
    rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    let streams = rig
        .exec("c", "e", process(&["chmod", "700", "/tmp"]))
        .await
        .unwrap();
    let outcome = rig.outcome("c", "e", streams).await;
    assert_eq!(outcome.status, 1);
    assert!(
        outcome.stderr.contains("Operation not permitted"),
        "{outcome:?}"
    );
}

#[tokio::test]
async fn a_wrong_profile_is_refused() {
    let rig = Rig::start().await;
    for (profile, wanted) in [
        (
            oci::Seccomp {
                default_action: "ALLOW".into(),
                ..Default::default()
            },
            "linux.seccomp.defaultAction",
        ),
        (
            allow_but(vec![syscalls(&["read"], "SCMP_ACT_NOTIFY", None)]),
            "SCMP_ACT_NOTIFY",
        ),
    ] {
        let mut spec = rig.spec("c", &["true"]);
        spec.linux.mut_or_insert_default().seccomp = Some(profile).into();
        let (code, text) = status(rig.create("c", spec).await.map(drop));
        assert_eq!(code, Code::INVALID_ARGUMENT);
        assert!(text.contains(wanted), "{text}");
    }
}
