// SPDX-License-Identifier: Apache-2.0
//! Processes: exit codes, streams, terminals, exec, signals, reaping.

mod common;

use common::*;
use tokio::io::AsyncWriteExt;
use tokio::time::{timeout, Duration, Instant};
use ttrpc::Code;

#[tokio::test]
async fn hello() {
    let rig = Rig::start().await;
    let spec = rig.spec("c", &["echo", "hello"]);
    assert_eq!(rig.run("c", spec).await.success(), "hello\n");
}

#[tokio::test]
async fn exit_codes() {
    let rig = Rig::start().await;
    for code in [0, 1, 42, 255] {
        let id = format!("c{code}");
        let spec = rig.spec(&id, &["sh", "-c", &format!("exit {code}")]);
        assert_eq!(rig.run(&id, spec).await.status, code);
    }
}

#[tokio::test]
async fn stdout_and_stderr_are_kept_apart() {
    let rig = Rig::start().await;
    let spec = rig.spec("c", &["sh", "-c", "echo out; echo err >&2"]);
    let outcome = rig.run("c", spec).await;
    assert_eq!(
        (outcome.stdout.as_str(), outcome.stderr.as_str()),
        ("out\n", "err\n")
    );
}

#[tokio::test]
async fn stdin_until_end_of_file() {
    let rig = Rig::start().await;
    let spec = rig.spec("c", &["cat"]);
    let mut streams = rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    let mut stdin = streams.stdin.take().unwrap();
    let text = "line\n".repeat(50_000);
    let (_, outcome) = tokio::join!(
        async {
            write(&mut stdin, &text).await;
            stdin.shutdown().await.unwrap();
        },
        rig.outcome("c", "", streams)
    );
    assert!(outcome.success() == text);
}

#[tokio::test]
async fn a_hundred_megabytes_through_stdout() {
    let rig = Rig::start().await;
    let script = "seq 1 14000000 | head -c 104857600 | tee /dev/stderr";
    let mut spec = rig.spec("c", &["sh", "-c", script]);
    spec.process.mut_or_insert_default().args[2] =
        "seq 1 14000000 | head -c 104857600; echo done >&2".into();
    let streams = rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    let outcome = rig.outcome("c", "", streams).await;
    assert_eq!((outcome.status, outcome.stderr.as_str()), (0, "done\n"));
    assert_eq!(outcome.stdout.len(), 104_857_600);
    let mut wanted = String::with_capacity(105_000_000);
    for number in 1.. {
        if wanted.len() >= 104_857_600 {
            break;
        }
        wanted.push_str(&number.to_string());
        wanted.push('\n');
    }
    assert!(outcome.stdout == wanted[..104_857_600], "the bytes differ");
}

#[tokio::test]
async fn dev_stdout_can_be_opened_again_by_a_user() {
    let rig = Rig::start().await;
    let mut spec = rig.spec("c", &["sh", "-c", "echo again > /dev/stdout"]);
    spec.process.mut_or_insert_default().user = Some(bulkhead_agent_protocol::oci::User {
        uid: 1000,
        gid: 1000,
        ..Default::default()
    })
    .into();
    assert_eq!(rig.run("c", spec).await.success(), "again\n");
}

#[tokio::test]
async fn a_terminal_with_resize() {
    let rig = Rig::start().await;
    let mut spec = rig.spec("c", &["sh"]);
    let process = spec.process.mut_or_insert_default();
    process.terminal = true;
    process.console_size = Some(bulkhead_agent_protocol::oci::Box {
        height: 24,
        width: 80,
        ..Default::default()
    })
    .into();
    let mut streams = rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    let terminal = streams.stdin.as_mut().unwrap();
    write(
        terminal,
        "stty size; tty; test -c /dev/console && echo console''ok\n",
    )
    .await;
    let text = read_until(terminal, "consoleok").await;
    assert!(text.contains("24 80"), "{text}");
    assert!(text.contains("/dev/pts/0"), "{text}");
    let resize = bulkhead_agent_protocol::agent::ResizePtyRequest {
        container_id: "c".into(),
        width: 132,
        height: 43,
        ..Default::default()
    };
    rig.client.resize_pty(rig.context(), &resize).await.unwrap();
    write(terminal, "stty size\n").await;
    read_until(terminal, "43 132").await;
    write(terminal, "exit 7\n").await;
    let all = read_all(streams.stdin.take()).await;
    assert!(String::from_utf8_lossy(&all).contains("exit 7"));
    assert_eq!(rig.wait("c", "").await.unwrap().exit_status, 7);
}

#[tokio::test]
async fn no_terminal_no_resize() {
    let rig = Rig::start().await;
    let spec = rig.spec("c", &["sleep", "100"]);
    rig.create("c", spec).await.unwrap();
    let resize = bulkhead_agent_protocol::agent::ResizePtyRequest {
        container_id: "c".into(),
        width: 1,
        height: 1,
        ..Default::default()
    };
    let (code, _) = status(rig.client.resize_pty(rig.context(), &resize).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
}

#[tokio::test]
async fn exec_with_its_own_user_environment_and_exit_code() {
    let rig = Rig::start().await;
    let spec = rig.spec("c", &["sleep", "100"]);
    rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    let mut exec = process(&[
        "sh",
        "-c",
        "id -u; id -G; pwd; echo $WHAT $HOME; cat /proc/1/comm; exit 9",
    ]);
    exec.env.push("WHAT=this".into());
    exec.cwd = "/tmp".into();
    exec.user = Some(bulkhead_agent_protocol::oci::User {
        uid: 1000,
        gid: 1000,
        additional_gids: vec![2000],
        ..Default::default()
    })
    .into();
    let streams = rig.exec("c", "e", exec).await.unwrap();
    let outcome = rig.outcome("c", "e", streams).await;
    assert_eq!(outcome.stderr, "");
    assert_eq!(
        outcome.stdout,
        "1000\n1000 2000\n/tmp\nthis /home/user\nsleep\n"
    );
    assert_eq!(outcome.status, 9);

    // Still known, until it is deleted.
    assert_eq!(rig.wait("c", "e").await.unwrap().exit_status, 9);
    let request = bulkhead_agent_protocol::agent::ProcessRequest {
        container_id: "c".into(),
        exec_id: "e".into(),
        ..Default::default()
    };
    rig.client
        .delete_process(rig.context(), &request)
        .await
        .unwrap();
    assert_eq!(status(rig.wait("c", "e").await).0, Code::NOT_FOUND);
}

#[tokio::test]
async fn exec_with_a_terminal() {
    let rig = Rig::start().await;
    let spec = rig.spec("c", &["sleep", "100"]);
    rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    let mut exec = process(&["sh", "-c", "tty; read line; echo got:$line"]);
    exec.terminal = true;
    let mut streams = rig.exec("c", "e", exec).await.unwrap();
    let terminal = streams.stdin.as_mut().unwrap();
    read_until(terminal, "/dev/pts/0").await;
    write(terminal, "word\n").await;
    read_until(terminal, "got:word").await;
    assert_eq!(rig.wait("c", "e").await.unwrap().exit_status, 0);
}

#[tokio::test]
async fn commands_that_cannot_run() {
    let rig = Rig::start().await;
    let cases = [
        (
            "nosuch",
            "exec: \"nosuch\": executable file not found in $PATH",
        ),
        (
            "/nosuch",
            "exec: \"/nosuch\": stat /nosuch: no such file or directory",
        ),
        ("/etc/passwd", "exec: \"/etc/passwd\": permission denied"),
        ("/etc", "exec: \"/etc\": is a directory"),
    ];
    for (command, wanted) in cases {
        let spec = rig.spec("c", &[command]);
        let (code, text) = status(rig.create("c", spec).await.map(drop));
        assert_eq!((code, text.as_str()), (Code::INVALID_ARGUMENT, wanted));
        assert!(!rig.cgroup_of("c").exists(), "the cgroup is left");
    }
    // The name is free again, and an exec fails the same way.
    let spec = rig.spec("c", &["sleep", "100"]);
    rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    for (command, wanted) in cases {
        let (code, text) = status(rig.exec("c", "e", process(&[command])).await.map(drop));
        assert_eq!((code, text.as_str()), (Code::INVALID_ARGUMENT, wanted));
    }
}

#[tokio::test]
async fn a_file_that_is_no_program_fails_at_start() {
    let rig = Rig::start().await;
    let spec = rig.spec("c", &["/junk"]);
    let path = rig.directory.path().join("c/junk");
    std::fs::write(&path, [0x7f, 1, 2, 3]).unwrap();
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    rig.create("c", spec).await.unwrap();
    let (code, text) = status(rig.start_container("c").await);
    assert_eq!(
        (code, text.as_str()),
        (Code::INVALID_ARGUMENT, "exec /junk: exec format error")
    );
    assert_eq!(rig.wait("c", "").await.unwrap().exit_status, 127);
    rig.delete("c").await.unwrap();
}

#[tokio::test]
async fn signals_and_waiters() {
    let rig = Rig::start().await;
    let script = "trap 'echo term; exit 3' TERM; echo ready; while true; do sleep 0.05; done";
    let spec = rig.spec("c", &["sh", "-c", script]);
    let mut streams = rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    read_until(streams.stdout.as_mut().unwrap(), "ready").await;
    let waiters = async {
        let (a, b, c) = tokio::join!(rig.wait("c", ""), rig.wait("c", ""), rig.wait("c", ""));
        [a, b, c].map(|reply| reply.unwrap().exit_status)
    };
    let kill = rig.signal("c", "", libc::SIGTERM, false);
    let (statuses, killed) = tokio::join!(waiters, kill);
    killed.unwrap();
    assert_eq!(statuses, [3, 3, 3]);
    assert_eq!(read_all(streams.stdout.take()).await, b"term\n");
    // One who comes late is told at once, and there is nobody left to signal.
    assert_eq!(rig.wait("c", "").await.unwrap().exit_status, 3);
    assert_eq!(
        status(rig.signal("c", "", libc::SIGTERM, false).await).0,
        Code::NOT_FOUND
    );
}

#[tokio::test]
async fn killed_is_137() {
    let rig = Rig::start().await;
    for (id, all) in [("one", false), ("all", true)] {
        let spec = rig.spec(id, &["sh", "-c", "sleep 100 & sleep 100"]);
        rig.create(id, spec).await.unwrap();
        rig.start_container(id).await.unwrap();
        rig.signal(id, "", libc::SIGKILL, all).await.unwrap();
        assert_eq!(rig.wait(id, "").await.unwrap().exit_status, 137);
        rig.delete(id).await.unwrap();
    }
}

#[tokio::test]
async fn an_exec_can_be_signalled_alone() {
    let rig = Rig::start().await;
    let spec = rig.spec("c", &["sleep", "100"]);
    rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    rig.exec("c", "e", process(&["sleep", "100"]))
        .await
        .unwrap();
    rig.signal("c", "e", libc::SIGTERM, false).await.unwrap();
    assert_eq!(rig.wait("c", "e").await.unwrap().exit_status, 143);
    rig.signal("c", "", libc::SIGKILL, false).await.unwrap();
    rig.wait("c", "").await.unwrap();
}

#[tokio::test]
async fn a_process_that_outlives_its_parent() {
    let rig = Rig::start().await;
    // The shell is PID 1 of the container and adopts the orphan.
    let script = "sh -c 'sleep 0.3; echo orphan' & sleep 1; echo parent";
    let spec = rig.spec("c", &["sh", "-c", script]);
    assert_eq!(rig.run("c", spec).await.success(), "orphan\nparent\n");
}

#[tokio::test]
async fn a_daemon_left_by_an_exec_does_not_hold_its_exit() {
    let rig = Rig::start().await;
    let spec = rig.spec("c", &["sleep", "100"]);
    rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    let exec = process(&["sh", "-c", "setsid sleep 50 & echo started"]);
    let begin = Instant::now();
    let streams = rig.exec("c", "e", exec).await.unwrap();
    let outcome = rig.outcome("c", "e", streams).await;
    assert_eq!(outcome.success(), "started\n");
    assert!(
        begin.elapsed() < Duration::from_secs(10),
        "{:?}",
        begin.elapsed()
    );
    // The daemon lives on.
    let list = rig
        .client
        .list_processes(rig.context(), &rig.container("c"))
        .await
        .unwrap();
    assert_eq!(list.processes.len(), 2, "{list:?}");
}

#[tokio::test]
async fn everything_written_before_the_exit_arrives() {
    let rig = Rig::start().await;
    // A slow reader: the exit must wait for it.
    let spec = rig.spec("c", &["sh", "-c", "seq 1 20000; exit 5"]);
    let mut streams = rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let (bytes, exit) = tokio::join!(read_all(streams.stdout.take()), rig.wait("c", ""));
    assert_eq!(exit.unwrap().exit_status, 5);
    assert!(String::from_utf8(bytes).unwrap().ends_with("\n20000\n"));
}

#[tokio::test]
async fn a_process_without_streams() {
    let rig = Rig::start().await;
    let spec = rig.spec("c", &["sh", "-c", "cat; readlink /proc/self/fd/0; exit 4"]);
    let request = bulkhead_agent_protocol::agent::CreateContainerRequest {
        container_id: "c".into(),
        spec: Some(spec).into(),
        ..Default::default()
    };
    rig.client
        .create_container(rig.context(), &request)
        .await
        .unwrap();
    rig.start_container("c").await.unwrap();
    assert_eq!(rig.wait("c", "").await.unwrap().exit_status, 4);
}

#[tokio::test]
async fn closing_one_containers_stdin_is_not_held_by_another() {
    let rig = Rig::start().await;
    let first = rig.spec("first", &["cat"]);
    let mut streams = rig.create("first", first).await.unwrap();
    // Waits at its gate, with whatever it inherited.
    let second = rig.spec("second", &["sleep", "100"]);
    rig.create("second", second).await.unwrap();
    rig.start_container("first").await.unwrap();
    drop(streams.stdin.take());
    let exit = timeout(Duration::from_secs(10), rig.wait("first", "")).await;
    assert_eq!(exit.expect("cat ends").unwrap().exit_status, 0);
}

#[tokio::test]
async fn a_stuck_reader_does_not_stop_another_container() {
    let rig = Rig::start().await;
    let noisy = rig.spec("noisy", &["yes"]);
    let _unread = rig.create("noisy", noisy).await.unwrap();
    rig.start_container("noisy").await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    let spec = rig.spec("c", &["echo", "hello"]);
    assert_eq!(rig.run("c", spec).await.success(), "hello\n");
}
