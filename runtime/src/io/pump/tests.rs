// SPDX-License-Identifier: Apache-2.0
use std::{
    fs::File,
    io::{Read, Write},
    os::unix::net::UnixStream,
    sync::atomic::{AtomicU32, Ordering},
    sync::Arc,
    time::Duration,
};

use tokio::time::timeout;

use super::*;
use crate::io::{Copies, GuestStreams, Stdio};

const SOON: Duration = Duration::from_secs(10);

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 7 + i / 251) as u8).collect()
}

/// A socket pair: the host's end, and the guest's, blocking, for a thread.
fn socket() -> (std::os::fd::OwnedFd, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (ours.into(), theirs)
}

#[tokio::test]
async fn output_reaches_a_pipe_whole_although_its_reader_is_slow() {
    let data = pattern(3_000_000);
    let (ours, mut theirs) = socket();
    let (mut reader, writer) = std::io::pipe().unwrap();
    let sent = data.clone();
    let guest = std::thread::spawn(move || theirs.write_all(&sent));
    let client = std::thread::spawn(move || {
        let mut all = Vec::new();
        let mut buffer = [0; 30_000];
        loop {
            let count = reader.read(&mut buffer).unwrap();
            if count == 0 {
                return all;
            }
            all.extend_from_slice(&buffer[..count]);
            if all.len() % 5 == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    });
    let calls = Arc::new(AtomicU32::new(0));
    let counted = calls.clone();
    let stdio = Stdio {
        stdout: Some(writer.into()),
        ..Stdio::default()
    };
    let streams = GuestStreams {
        output: Some(ours),
        ..GuestStreams::default()
    };
    let copies = Copies::start(stdio, streams, move || {
        counted.fetch_add(1, Ordering::Relaxed);
    })
    .unwrap();
    assert!(copies.delivered(SOON).await);
    guest.join().unwrap().unwrap();
    assert!(client.join().unwrap() == data);
    assert_eq!(calls.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn output_reaches_a_file_that_is_appended_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    std::fs::write(&path, "before\n").unwrap();
    let file = File::options().append(true).open(&path).unwrap();
    let (ours, mut theirs) = socket();
    theirs.write_all(b"after\n").unwrap();
    drop(theirs);
    let (source, sink) = (
        Endpoint::new(ours).unwrap(),
        Endpoint::new(file.into()).unwrap(),
    );
    let end = timeout(SOON, pump(&source, &sink, || {})).await.unwrap();
    assert_eq!(end, End::Source);
    assert_eq!(std::fs::read(&path).unwrap(), b"before\nafter\n");
}

#[tokio::test]
async fn a_reader_that_goes_away_ends_the_copy() {
    let (ours, mut theirs) = socket();
    let (reader, writer) = std::io::pipe().unwrap();
    let (source, sink) = (
        Endpoint::new(ours).unwrap(),
        Endpoint::new(writer.into()).unwrap(),
    );
    theirs.write_all(b"x").unwrap();
    let copy = tokio::spawn(async move { pump(&source, &sink, || {}).await });
    tokio::time::sleep(Duration::from_millis(20)).await;
    // Noticed although nothing more comes.
    drop(reader);
    assert_eq!(timeout(SOON, copy).await.unwrap().unwrap(), End::Sink);
}

#[tokio::test]
async fn the_end_of_input_is_told_and_output_goes_on() {
    let (stdin_ours, mut stdin_guest) = socket();
    let (stdout_ours, mut stdout_guest) = socket();
    let (stdin, mut typed) = std::io::pipe().unwrap();
    let (mut shown, stdout) = std::io::pipe().unwrap();
    let stdio = Stdio {
        stdin: Some(stdin.into()),
        stdout: Some(stdout.into()),
        ..Stdio::default()
    };
    let streams = GuestStreams {
        input: Some(stdin_ours),
        output: Some(stdout_ours),
        error: None,
    };
    let copies = Copies::start(stdio, streams, || {}).unwrap();
    let guest = std::thread::spawn(move || {
        let mut all = Vec::new();
        stdin_guest.read_to_end(&mut all).unwrap();
        stdout_guest.write_all(&all).unwrap();
    });
    let client = std::thread::spawn(move || {
        typed.write_all(b"to be echoed").unwrap();
        drop(typed);
        let mut all = String::new();
        shown.read_to_string(&mut all).unwrap();
        all
    });
    assert!(copies.delivered(SOON).await);
    guest.join().unwrap();
    assert_eq!(client.join().unwrap(), "to be echoed");
}

#[tokio::test]
async fn a_terminal_is_one_stream_and_survives_the_end_of_input() {
    let (ours, mut guest) = socket();
    let (stdin, mut typed) = std::io::pipe().unwrap();
    let (mut shown, stdout) = std::io::pipe().unwrap();
    let stdio = Stdio {
        terminal: true,
        stdin: Some(stdin.into()),
        stdout: Some(stdout.into()),
        ..Stdio::default()
    };
    let streams = GuestStreams {
        output: Some(ours),
        ..GuestStreams::default()
    };
    let copies = Copies::start(stdio, streams, || {}).unwrap();
    typed.write_all(b"ls\n").unwrap();
    drop(typed);
    let guest = std::thread::spawn(move || {
        let mut all = Vec::new();
        guest.read_to_end(&mut all).unwrap();
        guest.write_all(b"files\n").unwrap();
        all
    });
    assert!(copies.delivered(SOON).await);
    assert_eq!(guest.join().unwrap(), b"ls\n");
    let mut text = String::new();
    shown.read_to_string(&mut text).unwrap();
    assert_eq!(text, "files\n");
}

#[tokio::test]
async fn without_input_the_process_reads_its_end() {
    let (ours, mut guest) = socket();
    let streams = GuestStreams {
        input: Some(ours),
        ..GuestStreams::default()
    };
    let copies = Copies::start(Stdio::default(), streams, || {}).unwrap();
    let read = std::thread::spawn(move || guest.read(&mut [0; 1]).unwrap());
    assert_eq!(read.join().unwrap(), 0);
    assert!(copies.delivered(SOON).await);
}

#[tokio::test]
async fn stopping_closes_what_nobody_reads() {
    let (ours, mut guest) = socket();
    let (mut shown, stdout) = std::io::pipe().unwrap();
    let stdio = Stdio {
        stdout: Some(stdout.into()),
        ..Stdio::default()
    };
    let streams = GuestStreams {
        output: Some(ours),
        ..GuestStreams::default()
    };
    let copies = Copies::start(stdio, streams, || {}).unwrap();
    guest
        .set_write_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    // More than pipe and socket hold.
    assert!(guest.write_all(&pattern(2_000_000)).is_err());
    assert!(!copies.delivered(Duration::from_millis(20)).await);
    copies.stop();
    assert!(copies.delivered(SOON).await);
    let mut all = Vec::new();
    shown.read_to_end(&mut all).unwrap();
    assert!(pattern(2_000_000).starts_with(&all));
}
