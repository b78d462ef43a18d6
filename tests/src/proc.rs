// SPDX-License-Identifier: Apache-2.0
//! Commands with a time limit and their output taken whole.

use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{bail, Context, Result};
use nix::sys::signal::{killpg, Signal};
use nix::unistd::Pid;

/// How long output may stay open after its command ended.
const LINGER: Duration = Duration::from_secs(5);

/// What a command did.
#[derive(Clone, Debug)]
pub struct Done {
    /// Exit code, or 128 + number of the signal that ended it.
    pub code: i32,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

impl Done {
    /// Standard output as text without white space at its ends.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim().to_owned()
    }

    /// Standard error as text without white space at its ends.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).trim().to_owned()
    }

    /// The command's output if it succeeded.
    ///
    /// # Errors
    /// With its standard error if it did not.
    pub fn ok(self) -> Result<Self> {
        if self.code != 0 {
            bail!("exit code {}: {} {}", self.code, self.out(), self.err());
        }
        Ok(self)
    }
}

/// Exit code, or 128 + number of the signal.
pub fn code_of(status: ExitStatus) -> i32 {
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// Runs `command` with nothing on its standard input.
///
/// # Errors
/// When it cannot be started or takes longer than `limit`; it is killed then.
pub fn run(command: &mut Command, limit: Duration) -> Result<Done> {
    run_with(command, None, limit)
}

/// Runs `command` with `input` and then the end on its standard input.
///
/// # Errors
/// As [`run`].
pub fn run_with(command: &mut Command, input: Option<Vec<u8>>, limit: Duration) -> Result<Done> {
    let name = format!("{command:?}").replace('"', "");
    let stdin = if input.is_some() {
        Stdio::piped()
    } else {
        Stdio::null()
    };
    let mut child = command
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("run {name}"))?;
    let group = Pid::from_raw(child.id() as i32);
    if let (Some(data), Some(mut stdin)) = (input, child.stdin.take()) {
        thread::spawn(move || {
            // A command need not read all that it is offered.
            let _ = stdin.write_all(&data);
        });
    }
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        // The receiver may have given up.
        let _ = tell.send(child.wait());
    });
    let status = match told.recv_timeout(limit) {
        Ok(status) => status.with_context(|| format!("wait for {name}"))?,
        Err(_) => {
            // It is not reaped before the thread above says so.
            let _ = killpg(group, Signal::SIGKILL);
            let output = |stream: mpsc::Receiver<Vec<u8>>| {
                let bytes = stream.recv_timeout(LINGER).unwrap_or_default();
                String::from_utf8_lossy(&bytes).into_owned()
            };
            bail!(
                "{name} took longer than {limit:?}; so far it printed {:?} and {:?}",
                output(stdout),
                output(stderr)
            );
        }
    };
    let finish = |stream: mpsc::Receiver<Vec<u8>>| {
        stream
            .recv_timeout(LINGER)
            .with_context(|| format!("{name} ended, but its output stays open"))
    };
    Ok(Done {
        code: code_of(status),
        stdout: finish(stdout)?,
        stderr: finish(stderr)?,
    })
}

fn collect(stream: Option<impl Read + Send + 'static>) -> mpsc::Receiver<Vec<u8>> {
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stream) = stream {
            // What came before an error counts.
            let _ = stream.read_to_end(&mut bytes);
        }
        let _ = tell.send(bytes);
    });
    told
}

/// Gives an interface of this network namespace an address with its prefix, and
/// sets it up.
///
/// # Errors
/// When ip(8) does not.
pub fn set_up_interface(name: &str, address: &str, limit: Duration) -> Result<()> {
    for arguments in [
        ["addr", "add", address, "dev", name].as_slice(),
        &["link", "set", name, "up"],
    ] {
        run(Command::new("ip").args(arguments), limit)?.ok()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn code_and_streams_come_apart() {
        let done = run(
            &mut sh("echo out; echo err >&2; exit 7"),
            Duration::from_secs(20),
        )
        .unwrap();
        assert_eq!(
            (done.code, done.out(), done.err()),
            (7, "out".into(), "err".into())
        );
        assert!(done.ok().unwrap_err().to_string().contains("err"));
        let done = run(&mut sh("kill -9 $$"), Duration::from_secs(20)).unwrap();
        assert_eq!(done.code, 137);
    }

    #[test]
    fn input_is_given() {
        let done = run_with(
            &mut Command::new("cat"),
            Some(vec![b'x'; 1 << 20]),
            Duration::from_secs(20),
        );
        assert_eq!(done.unwrap().stdout.len(), 1 << 20);
    }

    #[test]
    fn a_limit_kills_and_tells_what_was_printed() {
        let error = run(
            &mut sh("echo begun; sleep 100 & wait"),
            Duration::from_millis(300),
        )
        .unwrap_err()
        .to_string();
        assert!(
            error.contains("longer") && error.contains("begun"),
            "{error}"
        );
    }
}
