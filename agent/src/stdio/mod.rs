// SPDX-License-Identifier: Apache-2.0
//! A process's standard input and output: one stream to the host for each,
//! opened before the process runs and closed when its output is drained.

pub mod dial;
pub mod port;
pub mod pump;

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_agent_protocol::agent;
use tokio::io::unix::AsyncFd;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::error::{AgentError, Context, Result};
use crate::sys::fd;
use dial::Dialer;

/// How long the exit of a process waits for a host that has stopped reading
/// its output: at most a pipe and a socket buffer are left then.
const STALLED: Duration = Duration::from_secs(30);

/// The streams of one process, connected to the host.
#[derive(Debug)]
pub enum Streams {
    /// One stream each way and one for errors; `None`: /dev/null.
    Pipes {
        /// Host to process.
        stdin: Option<AsyncFd<OwnedFd>>,
        /// Process to host.
        stdout: Option<AsyncFd<OwnedFd>>,
        /// Process to host.
        stderr: Option<AsyncFd<OwnedFd>>,
    },
    /// Both directions of a terminal on one stream; `None`: nobody looks.
    Terminal(Option<AsyncFd<OwnedFd>>),
}

impl Streams {
    /// Connects the streams that `stdio` names.
    ///
    /// # Errors
    /// A stream that cannot be connected; a terminal with two streams.
    pub async fn open(dialer: &Dialer, stdio: &agent::Stdio, terminal: bool) -> Result<Self> {
        if terminal {
            let ids = [stdio.stdin_stream, stdio.stdout_stream];
            let id = match ids {
                [a, b] if a == b || b == 0 => a,
                [0, b] => b,
                _ => {
                    return Err(AgentError::Invalid(
                        "stdio: a terminal has one stream for both directions".into(),
                    ))
                }
            };
            return Ok(Self::Terminal(dialer.stream(id).await?));
        }
        let (stdin, stdout, stderr) = tokio::try_join!(
            dialer.stream(stdio.stdin_stream),
            dialer.stream(stdio.stdout_stream),
            dialer.stream(stdio.stderr_stream),
        )?;
        Ok(Self::Pipes {
            stdin,
            stdout,
            stderr,
        })
    }
}

/// What the child gets: descriptors for 0, 1 and 2.
#[derive(Debug)]
pub enum ChildEnds {
    /// `None`: /dev/null.
    Pipes([Option<OwnedFd>; 3]),
    /// The child opens a terminal and sends the master back.
    Terminal,
}

impl ChildEnds {
    /// The descriptors the child must not close.
    pub fn raw(&self) -> Vec<RawFd> {
        match self {
            Self::Pipes(ends) => ends.iter().flatten().map(AsRawFd::as_raw_fd).collect(),
            Self::Terminal => Vec::new(),
        }
    }

    /// Makes the descriptors a user's, who may open them again.
    ///
    /// # Errors
    /// fchown(2)'s.
    pub fn give_to(&self, uid: u32) -> std::io::Result<()> {
        if let Self::Pipes(ends) = self {
            for end in ends.iter().flatten() {
                std::os::unix::fs::fchown(end, Some(uid), None)?;
            }
        }
        Ok(())
    }
}

/// What the agent keeps: its ends of the pipes, with the streams they go to.
#[derive(Debug)]
pub enum AgentEnds {
    /// Pairs of a pipe end and a stream: stdin, then the outputs.
    Pipes {
        /// Write end and stream.
        stdin: Option<(AsyncFd<OwnedFd>, AsyncFd<OwnedFd>)>,
        /// Read ends and streams of stdout and stderr.
        outputs: Vec<(AsyncFd<OwnedFd>, AsyncFd<OwnedFd>)>,
    },
    /// The master arrives from the child.
    Terminal(Option<AsyncFd<OwnedFd>>),
}

/// Makes the pipes between a process and its streams.
///
/// # Errors
/// When there are no descriptors left.
pub fn connect(streams: Streams) -> Result<(ChildEnds, AgentEnds)> {
    let (stdin, stdout, stderr) = match streams {
        Streams::Terminal(stream) => return Ok((ChildEnds::Terminal, AgentEnds::Terminal(stream))),
        Streams::Pipes {
            stdin,
            stdout,
            stderr,
        } => (stdin, stdout, stderr),
    };
    let mut child = [None, None, None];
    let stdin = match stdin {
        Some(stream) => {
            let (read, write) = fd::pipe().step(|| "pipe for stdin")?;
            child[0] = Some(read);
            Some((fd::watched(write).step(|| "watch stdin")?, stream))
        }
        None => None,
    };
    let mut outputs = Vec::with_capacity(2);
    for (number, stream) in [(1, stdout), (2, stderr)] {
        if let Some(stream) = stream {
            let (read, write) = fd::pipe().step(|| "pipe for output")?;
            child[number] = Some(write);
            outputs.push((fd::watched(read).step(|| "watch output")?, stream));
        }
    }
    Ok((ChildEnds::Pipes(child), AgentEnds::Pipes { stdin, outputs }))
}

/// The tasks that move a process's input and output.
#[derive(Debug)]
pub struct Io {
    exited: watch::Sender<bool>,
    drained: Vec<oneshot::Receiver<()>>,
    input: Option<JoinHandle<()>>,
    master: Option<Arc<AsyncFd<OwnedFd>>>,
}

impl Io {
    /// Starts to move. `master` is the terminal's, where there is one.
    ///
    /// # Errors
    /// When the master cannot be watched.
    pub fn start(ends: AgentEnds, master: Option<OwnedFd>) -> Result<Self> {
        let (exited, exit) = watch::channel(false);
        let mut io = Self {
            exited,
            drained: Vec::new(),
            input: None,
            master: None,
        };
        match ends {
            AgentEnds::Pipes { stdin, outputs } => {
                if let Some((pipe, stream)) = stdin {
                    io.input = Some(tokio::spawn(pump::input(stream, pipe)));
                }
                for (pipe, stream) in outputs {
                    let (done, drained) = oneshot::channel();
                    io.drained.push(drained);
                    tokio::spawn(pump::output(pipe, stream, exit.clone(), done));
                }
            }
            AgentEnds::Terminal(stream) => {
                let Some(master) = master else {
                    return Err(AgentError::Internal("the terminal did not arrive".into()));
                };
                let master = Arc::new(fd::watched(master).step(|| "watch terminal")?);
                io.master = Some(master.clone());
                let stream = stream.map(Arc::new);
                let (done, drained) = oneshot::channel();
                io.drained.push(drained);
                tokio::spawn(pump::terminal_output(
                    master.clone(),
                    stream.clone(),
                    exit,
                    done,
                ));
                if let Some(stream) = stream {
                    io.input = Some(tokio::spawn(pump::terminal_input(stream, master)));
                }
            }
        }
        Ok(io)
    }

    /// The terminal's master, for its size.
    pub fn terminal(&self) -> Option<Arc<AsyncFd<OwnedFd>>> {
        self.master.clone()
    }

    /// Waits until what the process wrote has been handed to the host, after
    /// the process has ended. Bounded as [`pump`] says, and by [`STALLED`] for
    /// a host that does not read; what is left goes on being forwarded then.
    pub async fn drain(self) {
        // No task left to tell: everything is drained already.
        let _ = self.exited.send(true);
        let all = async {
            for drained in self.drained {
                let _ = drained.await;
            }
        };
        if timeout(STALLED, all).await.is_err() {
            crate::warn_limited!("msg=\"the host does not read a process's output\"");
        }
        if let Some(input) = self.input {
            input.abort();
        }
    }
}

/// The size of a terminal from the protocol's fields.
///
/// # Errors
/// Sizes beyond what a terminal can have.
pub fn resize(terminal: BorrowedFd<'_>, height: u32, width: u32) -> Result<()> {
    let narrow = |value: u32, field: &str| {
        u16::try_from(value)
            .map_err(|_| AgentError::Invalid(format!("{field}: {value} is too big")))
    };
    crate::sys::tty::set_size(terminal, narrow(height, "height")?, narrow(width, "width")?)
        .step(|| "resize terminal")
}
