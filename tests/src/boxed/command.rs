// SPDX-License-Identifier: Apache-2.0
//! A command for the box, in the manner of `std::process::Command`.

use std::thread;
use std::time::Duration;

use super::error::BoxError;
use super::mux::{Event, Mux, Session};
use super::proto::{Exit, Spec};

/// A command to run in a box. Its environment starts with a plain `PATH` and
/// `HOME`; that of this process is not passed on.
#[derive(Clone, Debug)]
pub struct Command {
    spec: Spec,
    stdin: Vec<u8>,
}

/// A command's output, whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// How it ended.
    pub exit: Exit,
    /// Its standard output, or what appeared on its terminal.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

impl Command {
    /// Program and arguments.
    pub fn new<S: Into<String>>(argv: impl IntoIterator<Item = S>) -> Self {
        let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        Self {
            spec: Spec {
                argv: argv.into_iter().map(Into::into).collect(),
                env: vec![
                    ("PATH".into(), path.into()),
                    ("HOME".into(), "/root".into()),
                ],
                cwd: "/".into(),
                ..Spec::default()
            },
            stdin: Vec::new(),
        }
    }

    /// Sets an environment variable.
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        let name = name.into();
        self.spec.env.retain(|(n, _)| *n != name);
        self.spec.env.push((name, value.into()));
        self
    }

    /// Replaces the environment.
    pub fn envs(mut self, env: impl IntoIterator<Item = (String, String)>) -> Self {
        self.spec.env = env.into_iter().collect();
        self
    }

    /// Sets the working directory.
    pub fn cwd(mut self, dir: impl Into<String>) -> Self {
        self.spec.cwd = dir.into();
        self
    }

    /// Kills everything the command started after `limit`.
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.spec.timeout_ms = limit.as_millis().min(u128::from(u64::MAX)) as u64;
        self
    }

    /// Runs it on a terminal of this size.
    pub fn tty(mut self, rows: u16, cols: u16) -> Self {
        self.spec.tty = Some((rows, cols));
        self.spec.stdin = true;
        self
    }

    /// Opens standard input, for [`Session::input`].
    pub fn piped(mut self) -> Self {
        self.spec.stdin = true;
        self
    }

    /// Gives these bytes and then the end as standard input.
    pub fn stdin(mut self, data: impl Into<Vec<u8>>) -> Self {
        self.stdin = data.into();
        self.spec.stdin = true;
        self
    }

    /// What goes over the wire.
    pub(super) fn spec(&self) -> Spec {
        self.spec.clone()
    }

    /// Starts it over this connection.
    ///
    /// # Errors
    /// As [`Mux::spawn`].
    pub fn spawn(&self, mux: &Mux) -> Result<Session, BoxError> {
        mux.spawn(&self.spec)
    }

    /// Runs it to its end over this connection.
    ///
    /// # Errors
    /// As [`Session::next_event`].
    pub fn run(&self, mux: &Mux) -> Result<Output, BoxError> {
        let mut session = mux.spawn(&self.spec)?;
        if self.spec.stdin {
            let (input, data) = (session.input(), self.stdin.clone());
            thread::spawn(move || {
                // A command need not read all that it is offered.
                if input.write(&data).is_ok() {
                    let _ = input.close();
                }
            });
        }
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            match session.next_event()? {
                Event::Stdout(data) => stdout.extend(data),
                Event::Stderr(data) => stderr.extend(data),
                Event::Exit(exit) => {
                    return Ok(Output {
                        exit,
                        stdout,
                        stderr,
                    })
                }
            }
        }
    }
}
