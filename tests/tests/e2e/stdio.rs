// SPDX-License-Identifier: Apache-2.0
//! Standard input and output, with and without a terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{bail, Context as _, Result};
use bulkhead_tests::{image, in_terminal, proc, set_window_size};
use nix::pty::openpty;
use sha2::{Digest, Sha256};

use crate::context::{same, until, Context, LIMIT};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![
    streams_come_apart,
    a_hundred_megabytes_arrive_whole,
    stdin_until_its_end,
    large_stdin_arrives_whole,
    exec_with_stdin,
    a_terminal_with_resize,
    a_terminal_in_exec,
    output_after_the_reader_has_gone,
];

fn streams_come_apart(context: &Context) -> Result<()> {
    let done = context.sh("echo out; echo err >&2; printf 'no newline'")?;
    same(
        (done.out(), done.err()),
        ("out\nno newline".to_owned(), "err".to_owned()),
    )
}

fn a_hundred_megabytes_arrive_whole(context: &Context) -> Result<()> {
    const ROUNDS: usize = 100;
    let script = format!(
        "i=0; while [ $i -lt {ROUNDS} ]; do cat {}; echo $i; echo round $i >&2; i=$((i+1)); done",
        image::PATTERN_PATH
    );
    let pattern = image::pattern();
    let mut want = Sha256::new();
    for i in 0..ROUNDS {
        want.update(&pattern);
        want.update(format!("{i}\n"));
    }
    let done = context.sh(&script)?;
    same(done.code, 0).with_context(|| done.err())?;
    let length =
        ROUNDS * pattern.len() + (0..ROUNDS).map(|i| format!("{i}\n").len()).sum::<usize>();
    same(done.stdout.len(), length)?;
    same(Sha256::digest(&done.stdout), want.finalize())?;
    let rounds: Vec<String> = (0..ROUNDS).map(|i| format!("round {i}")).collect();
    same(done.err(), rounds.join("\n"))
}

fn stdin_until_its_end(context: &Context) -> Result<()> {
    // ctr misses an end of input that comes before the task is made, so the
    // end waits for a first answer.
    let mut run = context.attached_with(Stdio::piped(), &[], &["cat"])?;
    let mut stdin = run.stdin()?;
    stdin.write_all(b"line\n")?;
    run.wait_for("line\n")?;
    stdin.write_all(b"last")?;
    drop(stdin);
    same(run.wait(LIMIT)?, 0)?;
    same(run.out().as_str(), "line\nlast")
}

fn large_stdin_arrives_whole(context: &Context) -> Result<()> {
    let data = image::pattern().repeat(8);
    let want: String = Sha256::digest(&data)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    let id = context.id("sum");
    let mut command = context.run_command(&["--rm"], &id, &["sha256sum"]);
    let done = proc::run_with(&mut command, Some(data), LIMIT)?.ok()?;
    same(done.out(), format!("{want}  -"))
}

fn exec_with_stdin(context: &Context) -> Result<()> {
    let container = context.detached(&[], &["sleep", "1000"])?;
    let mut command = context.containerd.ctr();
    command.args(["task", "exec", "--exec-id", "in", &container.id, "wc", "-c"]);
    let done = proc::run_with(&mut command, Some(vec![b'x'; 300_000]), LIMIT)?.ok()?;
    same(done.out(), "300000")?;
    container.remove()
}

/// A command of ctr on a terminal of its own.
struct Terminal {
    master: File,
    seen: Arc<Mutex<String>>,
    child: std::process::Child,
}

impl Terminal {
    fn start(mut command: std::process::Command, rows: u16, cols: u16) -> Result<Self> {
        let pty = openpty(None, None).context("make a terminal")?;
        set_window_size(pty.master.as_fd(), rows, cols)?;
        command
            .env("TERM", "linux")
            .stdin(pty.slave.try_clone()?)
            .stdout(pty.slave.try_clone()?)
            .stderr(pty.slave);
        in_terminal(&mut command);
        let child = command.spawn().context("run ctr on a terminal")?;
        // Its copies of the terminal would keep it from ending.
        drop(command);
        let master = File::from(pty.master);
        let mut reader = master.try_clone()?;
        let seen = Arc::new(Mutex::new(String::new()));
        let shared = Arc::clone(&seen);
        thread::spawn(move || {
            let mut buf = [0; 4096];
            while let Ok(n @ 1..) = reader.read(&mut buf) {
                let text = String::from_utf8_lossy(&buf[..n]).into_owned();
                shared
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push_str(&text);
            }
        });
        Ok(Self {
            master,
            seen,
            child,
        })
    }

    fn seen(&self) -> String {
        self.seen
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn wait_for(&self, words: &str) -> Result<()> {
        until(LIMIT, words, || Ok(self.seen().contains(words)))
            .with_context(|| format!("the terminal shows {:?}", self.seen()))
    }

    fn type_in(&mut self, text: &str) -> Result<()> {
        Ok(self.master.write_all(text.as_bytes())?)
    }

    fn wait(&mut self) -> Result<i32> {
        let mut code = None;
        until(LIMIT, "the command's end", || {
            code = self.child.try_wait()?.map(proc::code_of);
            Ok(code.is_some())
        })
        .with_context(|| format!("the terminal shows {:?}", self.seen()))?;
        code.context("no exit code")
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It has ended unless the test has failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn a_terminal_with_resize(context: &Context) -> Result<()> {
    let id = context.id("tty");
    let mut terminal =
        Terminal::start(context.run_command(&["--rm", "-t"], &id, &["sh"]), 33, 101)?;
    terminal.wait_for("# ")?;
    // The answers differ from what is echoed of the questions.
    terminal.type_in("echo size=$(stty size) $(tty)\n")?;
    terminal.wait_for("size=33 101 /dev/")?;
    set_window_size(terminal.master.as_fd(), 55, 144)?;
    // The new size travels while the shell goes on.
    let begin = std::time::Instant::now();
    while !terminal.seen().contains("size=55 144") {
        if begin.elapsed() > LIMIT {
            bail!("no new size in {:?}", terminal.seen());
        }
        terminal.type_in("echo size=$(stty size)\n")?;
        thread::sleep(Duration::from_secs(1));
    }
    // Ctrl-C reaches what runs on the terminal, and not the shell.
    terminal.type_in("echo 'trap'ped; sleep 1000\n")?;
    // ctr leaves the line ends as they come, with one more return or not.
    terminal.wait_for("trapped\r")?;
    thread::sleep(Duration::from_millis(500));
    terminal.type_in("\x03")?;
    terminal.type_in("echo code=$?\n")?;
    terminal.wait_for("code=130")?;
    terminal.type_in("exit 9\n")?;
    same(terminal.wait()?, 9)
}

fn a_terminal_in_exec(context: &Context) -> Result<()> {
    let container = context.detached(&[], &["sleep", "1000"])?;
    let mut command = context.containerd.ctr();
    command.args([
        "task",
        "exec",
        "-t",
        "--exec-id",
        "tty",
        &container.id,
        "sh",
    ]);
    let mut terminal = Terminal::start(command, 20, 70)?;
    terminal.wait_for("# ")?;
    terminal.type_in("test -t 0 && test -t 1 && test -t 2 && echo is'_'one\n")?;
    terminal.wait_for("is_one")?;
    terminal.type_in("exit 4\n")?;
    same(terminal.wait()?, 4)?;
    container.remove()
}

fn output_after_the_reader_has_gone(context: &Context) -> Result<()> {
    // A client that dies does not take the container with it.
    let script = "echo up; i=0; while [ $i -lt 40 ]; do cat /etc/passwd; i=$((i+1)); sleep 0.05; done; touch /done; sleep 1000";
    let mut run = context.attached(&[], &["sh", "-c", script])?;
    run.wait_for("up")?;
    let id = run.id.clone();
    drop(run);
    until(LIMIT, "the container to finish its output", || {
        let exec = context.id("look");
        let done = context.ctr(&[
            "task",
            "exec",
            "--exec-id",
            &exec,
            &id,
            "test",
            "-e",
            "/done",
        ])?;
        Ok(done.code == 0)
    })?;
    context.ctr(&["task", "kill", "-s", "KILL", &id])?.ok()?;
    context.containerd.clean()?;
    Ok(())
}
