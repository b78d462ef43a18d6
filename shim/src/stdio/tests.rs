// SPDX-License-Identifier: Apache-2.0

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    os::unix::fs::OpenOptionsExt,
    thread,
    time::Duration,
};

use rustix::{
    fs::{mkfifoat, CWD},
    io::Errno,
};
use tokio::time::timeout;

use super::*;

const LIMIT: Duration = Duration::from_secs(20);

const OWNER: Owner<'static> = Owner {
    namespace: "ns",
    container: "c1",
};

struct Fifos {
    directory: tempfile::TempDir,
}

impl Fifos {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        for name in ["stdin", "stdout", "stderr"] {
            let path = directory.path().join(name);
            mkfifoat(CWD, path, Mode::from_raw_mode(0o600)).unwrap();
        }
        Self { directory }
    }

    fn path(&self, name: &str) -> String {
        let path = self.directory.path().join(name);
        path.to_str().unwrap().into()
    }

    fn paths(&self) -> StdioPaths {
        StdioPaths {
            stdin: self.path("stdin"),
            stdout: self.path("stdout"),
            stderr: self.path("stderr"),
        }
    }
}

fn nonblocking() -> i32 {
    i32::try_from(OFlags::NONBLOCK.bits()).unwrap()
}

/// What the runtime would read until the end.
async fn read_all(fd: OwnedFd) -> Vec<u8> {
    use tokio::io::AsyncReadExt;
    let mut receiver = tokio::net::unix::pipe::Receiver::from_owned_fd(fd).unwrap();
    let mut all = Vec::new();
    timeout(LIMIT, receiver.read_to_end(&mut all))
        .await
        .expect("the input ends")
        .unwrap();
    all
}

#[tokio::test]
async fn outputs_open_without_a_reader_and_do_not_break_while_it_is_away() {
    let fifos = Fifos::new();
    let (stdio, mut streams) = open(OWNER, false, fifos.paths()).await.unwrap();
    assert_eq!(stdio.paths, fifos.paths());
    let stdout = stdio.stdout.unwrap();
    let read = || {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(nonblocking());
        options.open(fifos.path("stdout")).unwrap()
    };
    // Nobody has opened the other end yet; what is written waits.
    rustix::io::write(&stdout, b"one ").unwrap();
    let mut first = read();
    let mut text = [0; 4];
    first.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"one ");
    drop(first);
    rustix::io::write(&stdout, b"two").unwrap();
    let mut second = read();
    // The runtime is done: the reader sees the end, whatever we hold.
    drop(stdout);
    let mut text = String::new();
    second.read_to_string(&mut text).unwrap();
    assert_eq!(text, "two");
    // Once it is released, output that nobody reads is not kept.
    drop(second);
    streams.release_output();
    let stderr = stdio.stderr.unwrap();
    assert_eq!(rustix::io::write(&stderr, b"x"), Err(Errno::PIPE));
}

#[tokio::test]
async fn a_terminal_has_no_stderr() {
    let fifos = Fifos::new();
    let (stdio, _streams) = open(OWNER, true, fifos.paths()).await.unwrap();
    assert!(stdio.terminal && stdio.stdin.is_some() && stdio.stdout.is_some());
    assert!(stdio.stderr.is_none());
}

#[tokio::test]
async fn nothing_is_asked_for_nothing_is_opened() {
    let (stdio, mut streams) = open(OWNER, false, StdioPaths::default()).await.unwrap();
    assert!(stdio.stdin.is_none() && stdio.stdout.is_none() && stdio.stderr.is_none());
    streams.begin().unwrap();
    streams.close_input();
    streams.ended();
}

#[tokio::test]
async fn input_ends_when_it_is_closed_and_the_client_has_gone_and_not_before() {
    let fifos = Fifos::new();
    let (stdio, mut streams) = open(OWNER, false, fifos.paths()).await.unwrap();
    let mut options = OpenOptions::new();
    options.write(true).custom_flags(nonblocking());
    // No client gets in before the process runs.
    let early = options.open(fifos.path("stdin")).unwrap_err();
    assert_eq!(early.raw_os_error(), Some(Errno::NXIO.raw_os_error()));
    streams.begin().unwrap();
    let end = tokio::spawn(read_all(stdio.stdin.unwrap()));

    let mut client = options.open(fifos.path("stdin")).unwrap();
    client.write_all(b"one ").unwrap();
    drop(client);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!end.is_finished(), "another client may come");
    let mut client = options.open(fifos.path("stdin")).unwrap();
    streams.close_input();
    client.write_all(b"two").unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!end.is_finished(), "the client is still there");
    drop(client);
    assert_eq!(end.await.unwrap(), b"one two");
}

#[tokio::test]
async fn a_client_that_waits_is_heard_also_when_the_input_is_closed_first() {
    let fifos = Fifos::new();
    let (stdio, mut streams) = open(OWNER, false, fifos.paths()).await.unwrap();
    let path = fifos.path("stdin");
    let data = vec![7; 300_000];
    let sent = data.clone();
    let (opening, opens) = std::sync::mpsc::channel();
    let client = thread::spawn(move || {
        opening.send(rustix::thread::gettid()).unwrap();
        // Waits for a reader.
        let mut fifo = OpenOptions::new().write(true).open(path).unwrap();
        fifo.write_all(&sent).unwrap();
    });
    let thread = opens.recv().unwrap();
    let state = format!("/proc/self/task/{}/stat", thread.as_raw_nonzero());
    let sleeps = || fs::read_to_string(&state).unwrap().contains(") S ");
    while !sleeps() {
        thread::yield_now();
    }
    thread::sleep(Duration::from_millis(50));
    streams.close_input();
    streams.begin().unwrap();
    assert_eq!(read_all(stdio.stdin.unwrap()).await, data);
    client.join().unwrap();
}

#[tokio::test]
async fn input_that_is_no_fifo_is_read_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("input");
    fs::write(&path, "text").unwrap();
    let paths = |stdin: &Path| StdioPaths {
        stdin: stdin.to_str().unwrap().into(),
        stdout: "/dev/null".into(),
        ..Default::default()
    };
    let (stdio, mut streams) = open(OWNER, false, paths(&path)).await.unwrap();
    streams.begin().unwrap();
    let mut text = String::new();
    let mut file = File::from(stdio.stdin.unwrap());
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "text");
    rustix::io::write(stdio.stdout.unwrap(), b"x").unwrap();
    let null = open(OWNER, false, paths(Path::new("/dev/null"))).await;
    assert!(null.unwrap().0.stdin.is_some());
}

#[tokio::test]
async fn the_stream_that_cannot_be_opened_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing");
    let missing = missing.to_str().unwrap();
    let of = |stream: &str, name: &str| {
        let mut paths = StdioPaths::default();
        match stream {
            "stdin" => paths.stdin = name.into(),
            "stdout" => paths.stdout = name.into(),
            _ => paths.stderr = name.into(),
        }
        paths
    };
    for stream in ["stdin", "stdout", "stderr"] {
        for name in [missing, "ttrpc+unix:///run/x"] {
            let error = open(OWNER, false, of(stream, name)).await.unwrap_err();
            let text = bulkhead_runtime::error::chain(&error);
            assert!(text.starts_with(&format!("{stream}: ")), "{text}");
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        }
    }
    let error = open(OWNER, false, of("stdin", "file:///x")).await;
    assert!(matches!(error, Err(StdioError::Uri { .. })));
    let error = open(OWNER, false, of("stderr", "binary:///bin/cat")).await;
    assert!(matches!(error, Err(StdioError::Uri { .. })));
}

#[tokio::test]
async fn files_are_made_and_appended_to() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("logs/of a container");
    let name = format!("file://{}", path.display()).replace(' ', "%20");
    let paths = StdioPaths {
        stdout: name.clone(),
        stderr: name,
        ..Default::default()
    };
    for _ in 0..2 {
        let (stdio, _streams) = open(OWNER, false, paths.clone()).await.unwrap();
        rustix::io::write(stdio.stdout.unwrap(), b"out ").unwrap();
        rustix::io::write(stdio.stderr.unwrap(), b"err ").unwrap();
    }
    assert_eq!(fs::read_to_string(path).unwrap(), "out err out err ");
}

fn program(scheme: &str, script: &str) -> StdioPaths {
    let encoded: String = script.bytes().map(|byte| format!("%{byte:02x}")).collect();
    let name = format!("{scheme}:///bin/sh?-c={encoded}");
    StdioPaths {
        stdout: name.clone(),
        stderr: name,
        ..Default::default()
    }
}

#[tokio::test]
async fn a_program_takes_the_output() {
    for (scheme, ready) in [("binary", "exec 5>&-"), ("binary-v2", "printf x >&5")] {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path().display();
        let script = format!(
            "cd {at}; {ready}; echo $CONTAINER_NAMESPACE $CONTAINER_ID $HOME >who; \
             cat <&4 >err & cat <&3 >out; wait"
        );
        let (stdio, streams) = open(OWNER, false, program(scheme, &script)).await.unwrap();
        assert!(streams.child().is_some());
        rustix::io::write(stdio.stdout.unwrap(), b"to stdout").unwrap();
        rustix::io::write(stdio.stderr.unwrap(), b"to stderr").unwrap();
        timeout(LIMIT, streams.finish()).await.unwrap();
        let read = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();
        assert_eq!(read("out"), "to stdout");
        assert_eq!(read("err"), "to stderr");
        assert_eq!(read("who"), "ns c1\n");
    }
}

#[tokio::test]
async fn a_program_that_does_not_work_is_told() {
    let error = open(OWNER, false, program("binary-v2", "exit 0")).await;
    assert!(matches!(error, Err(StdioError::NotReady { .. })));
    let paths = StdioPaths {
        stdout: "binary:///no/such/program".into(),
        ..Default::default()
    };
    let error = open(OWNER, false, paths).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    let text = bulkhead_runtime::error::chain(&error);
    assert!(
        text.contains("/no/such/program") && text.contains("No such file"),
        "{text}"
    );
}
