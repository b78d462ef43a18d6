// SPDX-License-Identifier: Apache-2.0
//! Programs that take a container's output: `binary://` and `binary-v2://`.
//!
//! Such a program gets the read ends of two pipes as its descriptors 3
//! (standard output) and 4 (standard error), and as 5 a pipe on which it says
//! that it is ready: by closing it, in version 2 by writing a byte.

use std::{
    io,
    os::fd::OwnedFd,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::{
    pipe::{pipe_with, PipeFlags},
    process::{kill_process, Pid, Signal},
};
use tokio::{
    io::AsyncReadExt,
    net::unix::pipe::Receiver,
    time::{sleep, timeout, Instant},
};

use super::{name::Program, Owner, StdioError};
use crate::sys;

/// How long it may take to get ready.
const READY: Duration = Duration::from_secs(10);

/// How long it may take to end once there is no more output.
const END: Duration = Duration::from_secs(10);

/// How often its end is looked for.
const LOOK: Duration = Duration::from_millis(20);

/// A running program.
#[derive(Debug)]
pub struct Logger {
    path: PathBuf,
    child: Option<Child>,
    pid: u32,
}

/// Where a container's output goes.
pub struct Outputs {
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
}

fn pipe() -> Result<(OwnedFd, OwnedFd), StdioError> {
    pipe_with(PipeFlags::CLOEXEC).map_err(|error| StdioError::System("make a pipe", error.into()))
}

impl Logger {
    /// Runs a program, and waits until it is ready.
    pub async fn start(owner: Owner<'_>, program: Program) -> Result<(Self, Outputs), StdioError> {
        let (from_stdout, stdout) = pipe()?;
        let (from_stderr, stderr) = pipe()?;
        let (ready, say_ready) = pipe()?;
        let mut command = Command::new(&program.path);
        command
            .args(&program.arguments)
            .env_clear()
            .env("CONTAINER_ID", owner.container)
            .env("CONTAINER_NAMESPACE", owner.namespace)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child =
            sys::spawn_with(command, [from_stdout, from_stderr, say_ready]).map_err(|source| {
                StdioError::Program {
                    path: program.path.clone(),
                    source,
                }
            })?;
        let mut logger = Self {
            pid: child.id(),
            path: program.path,
            child: Some(child),
        };
        logger.wait_ready(ready, program.answers).await?;
        Ok((logger, Outputs { stdout, stderr }))
    }

    async fn wait_ready(&mut self, ready: OwnedFd, answers: bool) -> Result<(), StdioError> {
        let problem = |path: &PathBuf, problem| StdioError::NotReady {
            path: path.clone(),
            problem,
        };
        let watched = Receiver::from_owned_fd(ready);
        let mut ready = watched.map_err(|error| StdioError::System("watch a pipe", error))?;
        let mut byte = [0];
        let said = timeout(READY, ready.read(&mut byte)).await;
        match said {
            Err(_) => Err(problem(&self.path, "is not ready after 10 s")),
            Ok(Ok(0)) if answers => Err(problem(&self.path, "has ended without being ready")),
            Ok(Ok(_)) => Ok(()),
            Ok(Err(source)) => Err(StdioError::System("read a pipe", source)),
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits until it has ended: it has to, for its input has. Kills it where
    /// it does not.
    pub async fn finish(mut self) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        let begin = Instant::now();
        while matches!(child.try_wait(), Ok(None)) {
            if begin.elapsed() >= END {
                tracing::warn!(program = %self.path.display(), "output's program killed: it does not end");
                kill(&mut child);
                return;
            }
            sleep(LOOK).await;
        }
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            kill(child);
        }
    }
}

fn kill(child: &mut Child) {
    let ended = |child: &mut Child| -> io::Result<()> {
        if child.try_wait()?.is_none() {
            if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
                kill_process(pid, Signal::KILL)?;
            }
            child.wait()?;
        }
        Ok(())
    };
    if let Err(error) = ended(child) {
        tracing::warn!(%error, "output's program not killed");
    }
}
