// SPDX-License-Identifier: Apache-2.0
//! Standard input.
//!
//! The runtime reads a pipe from the start; the client's FIFO is opened when
//! the process is started, and copied to that pipe. A write end of our own
//! keeps the FIFO from ending while no client has it open (containerd is being
//! restarted, nobody is attached), until `CloseIO`.

use std::{io, os::fd::OwnedFd, path::Path, path::PathBuf};

use rustix::{
    fs::{FileType, Mode, OFlags},
    pipe::{pipe_with, PipeFlags},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::pipe::{Receiver, Sender},
    task::AbortHandle,
};

use super::{flags, is_fifo, StdioError};

/// Bytes copied at a time.
const CHUNK: usize = 8 * 1024;

/// The way from a client's FIFO to a process.
#[derive(Debug)]
pub struct Input {
    path: PathBuf,
    /// Where to, until it begins.
    to: Option<OwnedFd>,
    /// Keeps the FIFO from ending.
    hold: Option<OwnedFd>,
    closed: bool,
    copy: Option<AbortHandle>,
}

/// The descriptor that the runtime reads, and what feeds it if that is not the
/// file itself.
pub fn open(path: &Path) -> Result<(OwnedFd, Option<Input>), StdioError> {
    let failed = |source: io::Error| StdioError::Open {
        stream: "stdin",
        path: path.into(),
        source,
    };
    let stat = rustix::fs::stat(path).map_err(|error| failed(error.into()))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Fifo {
        let file = rustix::fs::open(path, flags(OFlags::RDONLY), Mode::empty())
            .map_err(|error| failed(error.into()))?;
        return Ok((file, None));
    }
    let (from, to) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)
        .map_err(|error| StdioError::System("make a pipe", error.into()))?;
    let input = Input {
        path: path.into(),
        to: Some(to),
        hold: None,
        closed: false,
        copy: None,
    };
    Ok((from, Some(input)))
}

impl Input {
    /// Opens the FIFO and starts to copy. Once only.
    pub fn begin(&mut self) -> Result<(), StdioError> {
        let Some(to) = self.to.take() else {
            return Ok(());
        };
        let failed = |source: io::Error| StdioError::Open {
            stream: "stdin",
            path: self.path.clone(),
            source,
        };
        let open = |access| {
            let fd = rustix::fs::open(&self.path, flags(access), Mode::empty())?;
            match is_fifo(&fd)? {
                true => Ok(fd),
                false => Err(io::Error::other("not a FIFO any more")),
            }
        };
        // A client that waits for a reader counts as a writer from now on.
        let from = open(OFlags::RDONLY).map_err(failed)?;
        if !self.closed {
            self.hold = Some(open(OFlags::WRONLY).map_err(failed)?);
        }
        let from = Receiver::from_owned_fd(from).map_err(failed)?;
        let to =
            Sender::from_owned_fd(to).map_err(|error| StdioError::System("watch a pipe", error))?;
        self.copy = Some(tokio::spawn(copy(from, to)).abort_handle());
        Ok(())
    }

    /// The client writes no more than it has.
    pub fn close(&mut self) {
        self.closed = true;
        self.hold = None;
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        if let Some(copy) = &self.copy {
            copy.abort();
        }
    }
}

/// Until the FIFO's end, or the process's.
async fn copy(mut from: Receiver, mut to: Sender) {
    let mut chunk = vec![0; CHUNK];
    loop {
        match from.read(&mut chunk).await {
            Ok(0) | Err(_) => return,
            Ok(count) => {
                if to.write_all(&chunk[..count]).await.is_err() {
                    return;
                }
            }
        }
    }
}
