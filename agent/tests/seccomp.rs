// SPDX-License-Identifier: Apache-2.0
//! seccomp profiles on running containers.

mod common;

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

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
            "linux.seccomp.listenerPath",
        ),
    ] {
        let mut spec = rig.spec("c", &["true"]);
        spec.linux.mut_or_insert_default().seccomp = Some(profile).into();
        let (code, text) = status(rig.create("c", spec).await.map(drop));
        assert_eq!(code, Code::INVALID_ARGUMENT);
        assert!(text.contains(wanted), "{text}");
    }
}

/// What a listener gets: the descriptor, and the state as JSON.
fn receive(listener: &std::os::unix::net::UnixListener) -> (OwnedFd, String) {
    let (stream, _) = listener.accept().unwrap();
    let mut bytes = vec![0u8; 16 * 1024];
    let mut control = [0u64; 8];
    // SAFETY: every pointer is to a live buffer of the length that is given;
    // the one descriptor that comes is taken once.
    let (count, fd) = unsafe {
        let mut iov = libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        };
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &mut iov;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        let count = libc::recvmsg(stream.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC);
        let header = libc::CMSG_FIRSTHDR(&message);
        assert!(count > 0 && !header.is_null(), "no descriptor");
        let fd = std::ptr::read_unaligned(libc::CMSG_DATA(header).cast::<i32>());
        (count as usize, OwnedFd::from_raw_fd(fd))
    };
    bytes.truncate(count);
    (fd, String::from_utf8(bytes).unwrap())
}

/// Answers one call with an errno (seccomp_unotify(2)); the call's number.
fn refuse_one(fd: &OwnedFd, errno: i32) -> i32 {
    // _IOWR('!', 0, struct seccomp_notif) and _IOWR('!', 1, struct seccomp_notif_resp).
    const RECV: libc::c_ulong = 0xc050_2100;
    const SEND: libc::c_ulong = 0xc018_2101;
    // SAFETY: both structures are plain integers, and alive.
    unsafe {
        let mut asked: libc::seccomp_notif = std::mem::zeroed();
        assert_eq!(libc::ioctl(fd.as_raw_fd(), RECV, &mut asked), 0);
        let mut answer: libc::seccomp_notif_resp = std::mem::zeroed();
        answer.id = asked.id;
        answer.error = -errno;
        assert_eq!(libc::ioctl(fd.as_raw_fd(), SEND, &mut answer), 0);
        asked.data.nr
    }
}

fn notifying(path: &Path) -> oci::Seccomp {
    oci::Seccomp {
        listener_path: path.display().to_string(),
        listener_metadata: "for \"us\"".into(),
        flags: vec!["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV".into()],
        ..allow_but(vec![syscalls(
            &["chmod", "fchmodat"],
            "SCMP_ACT_NOTIFY",
            None,
        )])
    }
}

#[tokio::test]
async fn a_listener_decides_about_calls() {
    for no_new_privileges in [true, false] {
        let rig = Rig::start().await;
        let path = rig.directory.path().join("x".repeat(120)).join("listener");
        std::fs::create_dir(path.parent().unwrap()).unwrap();
        // A path that is too long for an address.
        let near = rig.directory.path().join("near");
        let listener = std::os::unix::net::UnixListener::bind(&near).unwrap();
        std::fs::rename(&near, &path).unwrap();
        let listening = std::thread::spawn(move || {
            // That of the container, then that of the further process.
            [1, 2].map(|_| {
                let (fd, state) = receive(&listener);
                let call = refuse_one(&fd, libc::ENOTBLK);
                (state, call)
            })
        });
        let mut spec = rig.spec("c", &["sh", "-c", "chmod 700 /tmp; sleep 100"]);
        spec.version = "1.2.0".into();
        spec.process.mut_or_insert_default().no_new_privileges = no_new_privileges;
        spec.linux.mut_or_insert_default().seccomp = Some(notifying(&path)).into();
        let init = rig.create("c", spec).await.unwrap();
        rig.start_container("c").await.unwrap();
        let mut further = process(&["chmod", "700", "/tmp"]);
        further.no_new_privileges = no_new_privileges;
        let streams = rig.exec("c", "e", further).await.unwrap();
        let pid = streams.pid;
        let outcome = rig.outcome("c", "e", streams).await;
        assert!(
            outcome.stderr.contains("Block device required"),
            "{outcome:?}"
        );
        let told = tokio::task::spawn_blocking(|| listening.join().unwrap());
        let told = told.await.unwrap();
        for ((state, call), (pid, status)) in told
            .into_iter()
            .zip([(init.pid, "creating"), (pid, "running")])
        {
            assert!(
                [libc::SYS_chmod, libc::SYS_fchmodat].contains(&i64::from(call)),
                "call {call}"
            );
            let wanted = format!(
                r#"{{"ociVersion":"1.2.0","fds":["seccompFd"],"pid":{pid},"metadata":"for \"us\"","state":{{"ociVersion":"1.2.0","id":"c","bundle":"","status":"{status}","pid":{}}}}}"#,
                init.pid
            );
            assert_eq!(state, wanted);
        }
    }
}

#[tokio::test]
async fn a_container_without_its_listener_is_not_made() {
    let rig = Rig::start().await;
    let path = rig.directory.path().join("nobody");
    let mut spec = rig.spec("c", &["true"]);
    spec.linux.mut_or_insert_default().seccomp = Some(notifying(&path)).into();
    let (code, text) = status(rig.create("c", spec).await.map(drop));
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.contains("linux.seccomp.listenerPath"), "{text}");
    let outcome = rig.run("c", rig.spec("c", &["true"])).await;
    assert_eq!(outcome.status, 0, "nothing was left behind");
}
