// SPDX-License-Identifier: Apache-2.0
//! A process's standard streams, as a client of containerd names them: paths
//! of FIFOs mostly, else URIs of a file or of a program that takes the output.
//!
//! The runtime gets one descriptor for each stream. What it must not have, and
//! what has to live longer, is kept in [`Streams`]: read ends of the outputs'
//! FIFOs, so that nothing is lost while containerd is being restarted; the way
//! from the input's FIFO; the program that takes the output.

mod input;
mod logger;
mod name;

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use bulkhead_runtime::{
    io::{Stdio, StdioPaths},
    ErrorKind,
};
use rustix::fs::{fstat, FileType, Mode, OFlags};

use self::{input::Input, logger::Logger, name::Name};

/// Why a stream cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// It cannot be opened.
    #[error("{stream}: open {}", path.display())]
    Open {
        /// Which.
        stream: &'static str,
        /// What it is.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A kind of stream that this shim does not know.
    #[error("{stream}: scheme {scheme:?} is not known: give a FIFO's path, file:// or binary://")]
    Scheme {
        /// Which.
        stream: &'static str,
        /// What was given.
        scheme: String,
    },
    /// Not a URI, or not one that makes sense here.
    #[error("{stream}: {name:?}: {problem}")]
    Uri {
        /// Which.
        stream: &'static str,
        /// What was given.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The program that is to take the output cannot be run.
    #[error("run {} for the output", path.display())]
    Program {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The program does not say that it takes the output.
    #[error("{} for the output {problem}", path.display())]
    NotReady {
        /// Which.
        path: PathBuf,
        /// What it does instead.
        problem: &'static str,
    },
    /// A system call failed.
    #[error("{0}")]
    System(&'static str, #[source] io::Error),
}

impl StdioError {
    /// The kind, for the code that containerd gets.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Open { .. } | Self::Scheme { .. } | Self::Uri { .. } | Self::Program { .. } => {
                ErrorKind::InvalidArgument
            }
            Self::NotReady { .. } => ErrorKind::FailedPrecondition,
            Self::System(..) => ErrorKind::Internal,
        }
    }
}

/// Which process the streams belong to.
#[derive(Debug, Clone, Copy)]
pub struct Owner<'a> {
    /// containerd's namespace.
    pub namespace: &'a str,
    /// Its container.
    pub container: &'a str,
}

/// What the shim keeps of a process's streams.
#[derive(Debug, Default)]
pub struct Streams {
    input: Option<Input>,
    holds: Vec<OwnedFd>,
    logger: Option<Logger>,
}

impl Streams {
    /// The process runs: what is written to its input is for it from now on.
    ///
    /// Not earlier: until its client has got the answer to `Create` or `Exec`
    /// it cannot say `CloseIO`, and a client whose input is short would have
    /// come and gone by then.
    ///
    /// # Errors
    /// When the input's FIFO cannot be opened.
    pub fn begin(&mut self) -> Result<(), StdioError> {
        match &mut self.input {
            Some(input) => input.begin(),
            None => Ok(()),
        }
    }

    /// The client will write no more than it has. The input ends once it has
    /// closed the FIFO.
    pub fn close_input(&mut self) {
        if let Some(input) = &mut self.input {
            input.close();
        }
    }

    /// The process has ended.
    pub fn ended(&mut self) {
        self.input = None;
    }

    /// The client has what it wants of the output, or never will: what nobody
    /// else reads need not be kept.
    pub fn release_output(&mut self) {
        self.holds.clear();
    }

    /// Process ids of children that are waited for here.
    pub fn child(&self) -> Option<u32> {
        self.logger.as_ref().map(Logger::pid)
    }

    /// Waits for the program that takes the output, once there is no more.
    pub async fn finish(self) {
        if let Some(logger) = self.logger {
            logger.finish().await;
        }
    }
}

/// Opens a process's streams.
///
/// # Errors
/// Each names the stream.
pub async fn open(
    owner: Owner<'_>,
    terminal: bool,
    paths: StdioPaths,
) -> Result<(Stdio, Streams), StdioError> {
    let mut streams = Streams::default();
    let mut stdio = Stdio {
        terminal,
        ..Stdio::default()
    };
    stdio.stdin = match Name::parse("stdin", &paths.stdin)? {
        Name::None => None,
        Name::Path(path) => {
            let (end, input) = input::open(&path)?;
            streams.input = input;
            Some(end)
        }
        Name::File(_) | Name::Program(_) => {
            return Err(StdioError::Uri {
                stream: "stdin",
                name: paths.stdin,
                problem: "only output goes there",
            });
        }
    };
    match Name::parse("stdout", &paths.stdout)? {
        Name::Program(program) => {
            // It takes both; clients name it twice.
            if !paths.stderr.is_empty() && paths.stderr != paths.stdout {
                return Err(StdioError::Uri {
                    stream: "stderr",
                    name: paths.stderr,
                    problem: "is not where stdout goes",
                });
            }
            let (logger, outputs) = Logger::start(owner, program).await?;
            streams.logger = Some(logger);
            stdio.stdout = Some(outputs.stdout);
            stdio.stderr = (!terminal).then_some(outputs.stderr);
        }
        stdout => {
            stdio.stdout = output("stdout", stdout, &paths.stdout, &mut streams)?;
            let stderr = Name::parse("stderr", &paths.stderr)?;
            if !terminal {
                stdio.stderr = output("stderr", stderr, &paths.stderr, &mut streams)?;
            }
        }
    }
    stdio.paths = paths;
    Ok((stdio, streams))
}

fn output(
    stream: &'static str,
    name: Name,
    text: &str,
    streams: &mut Streams,
) -> Result<Option<OwnedFd>, StdioError> {
    match name {
        Name::None => Ok(None),
        Name::Path(path) => {
            let (end, hold) = open_output(&path).map_err(|source| StdioError::Open {
                stream,
                path,
                source,
            })?;
            streams.holds.extend(hold);
            Ok(Some(end))
        }
        Name::File(path) => match append(&path) {
            Ok(end) => Ok(Some(end)),
            Err(source) => Err(StdioError::Open {
                stream,
                path,
                source,
            }),
        },
        Name::Program(_) => Err(StdioError::Uri {
            stream,
            name: text.into(),
            problem: "a program takes stdout and stderr together",
        }),
    }
}

fn flags(more: OFlags) -> OFlags {
    OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY | more
}

/// The write end of an output, and for a FIFO a read end: with it the write
/// end opens at once, and writing goes on while the reader is away.
fn open_output(path: &Path) -> io::Result<(OwnedFd, Option<OwnedFd>)> {
    // Opening a FIFO for writing fails as long as nobody reads it.
    let kind = FileType::from_raw_mode(rustix::fs::stat(path)?.st_mode);
    let hold = match kind {
        FileType::Fifo => Some(rustix::fs::open(
            path,
            flags(OFlags::RDONLY),
            Mode::empty(),
        )?),
        _ => None,
    };
    let more = match kind {
        FileType::RegularFile => OFlags::WRONLY | OFlags::APPEND,
        _ => OFlags::WRONLY,
    };
    Ok((rustix::fs::open(path, flags(more), Mode::empty())?, hold))
}

/// A file that output is appended to, with its directory.
fn append(path: &Path) -> io::Result<OwnedFd> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let file = rustix::fs::open(
        path,
        flags(OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE),
        Mode::from_raw_mode(0o644),
    )?;
    Ok(file)
}

fn is_fifo(fd: &OwnedFd) -> io::Result<bool> {
    Ok(FileType::from_raw_mode(fstat(fd)?.st_mode) == FileType::Fifo)
}

#[cfg(test)]
mod tests;
