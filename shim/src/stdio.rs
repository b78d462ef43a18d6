// SPDX-License-Identifier: Apache-2.0
//! The streams that containerd names: FIFOs by their paths, or files.
//!
//! Output FIFOs are opened for both ways, so that opening never waits and
//! writing never fails while containerd restarts and nobody reads. The input
//! FIFO has a write end of ours, so that it does not end before the client
//! has come; the client says with `CloseIO` that it needs it no longer.

use std::{
    fs::OpenOptions,
    io,
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt},
};

use bulkhead_runtime::{
    io::{Stdio, StdioPaths},
    ErrorKind,
};
use rustix::fs::{fstat, open, FileType, Mode, OFlags};

/// Why a stream cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// It cannot be opened.
    #[error("{stream}: open {path}")]
    Open {
        /// Which of the three.
        stream: &'static str,
        /// What it is.
        path: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A way to carry a stream that is known and not built.
    #[error("{stream}: {scheme}:// is not supported: give the path of a FIFO, or file://")]
    Scheme {
        /// Which of the three.
        stream: &'static str,
        /// Before `://`.
        scheme: String,
    },
}

impl StdioError {
    /// The kind, for codes.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Open { .. } => ErrorKind::InvalidArgument,
            Self::Scheme { .. } => ErrorKind::Unimplemented,
        }
    }
}

/// Streams of a process, opened.
#[derive(Debug)]
pub struct Opened {
    /// For the runtime.
    pub stdio: Stdio,
    /// What keeps standard input from ending.
    pub hold: Option<OwnedFd>,
}

/// Opens the streams of a process.
///
/// # Errors
/// One of them cannot be opened; tells which.
pub fn open_all(paths: StdioPaths, terminal: bool) -> Result<Opened, StdioError> {
    let (stdin, hold) = match input(&paths.stdin)? {
        Some((read, write)) => (Some(read), write),
        None => (None, None),
    };
    let stdout = output("stdout", &paths.stdout)?;
    // A terminal shows everything on one stream.
    let stderr = match terminal {
        true => None,
        false => output("stderr", &paths.stderr)?,
    };
    Ok(Opened {
        stdio: Stdio {
            terminal,
            stdin,
            stdout,
            stderr,
            paths,
        },
        hold,
    })
}

const FLAGS: OFlags = OFlags::NONBLOCK
    .union(OFlags::CLOEXEC)
    .union(OFlags::NOCTTY);

fn input(path: &str) -> Result<Option<(OwnedFd, Option<OwnedFd>)>, StdioError> {
    if path.is_empty() {
        return Ok(None);
    }
    if let Some((scheme, _)) = path.split_once("://") {
        return Err(StdioError::Scheme {
            stream: "stdin",
            scheme: scheme.into(),
        });
    }
    let failed = |error: rustix::io::Errno| StdioError::Open {
        stream: "stdin",
        path: path.into(),
        source: error.into(),
    };
    let read = open(path, OFlags::RDONLY | FLAGS, Mode::empty()).map_err(failed)?;
    let kind = FileType::from_raw_mode(fstat(&read).map_err(failed)?.st_mode);
    let hold = match kind {
        // There is a reader, so this does not wait either.
        FileType::Fifo => Some(open(path, OFlags::WRONLY | FLAGS, Mode::empty()).map_err(failed)?),
        _ => None,
    };
    Ok(Some((read, hold)))
}

fn output(stream: &'static str, path: &str) -> Result<Option<OwnedFd>, StdioError> {
    if path.is_empty() {
        return Ok(None);
    }
    let failed = |source: io::Error| StdioError::Open {
        stream,
        path: path.into(),
        source,
    };
    match path.split_once("://") {
        None => {
            // A path that is there already: a FIFO, or what a client put there.
            let opened = open(path, OFlags::RDWR | FLAGS, Mode::empty());
            opened.map(Some).map_err(|error| failed(error.into()))
        }
        Some(("file", file)) => {
            let opened = OpenOptions::new()
                .append(true)
                .create(true)
                .mode(0o600)
                .open(file);
            opened.map(|file| Some(file.into())).map_err(failed)
        }
        Some((scheme, _)) => Err(StdioError::Scheme {
            stream,
            scheme: scheme.into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Read, path::Path};

    use super::*;

    fn fifo(path: &Path) -> String {
        rustix::fs::mknodat(
            rustix::fs::CWD,
            path,
            FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        path.display().to_string()
    }

    #[test]
    fn fifos_open_without_anybody_at_the_other_end() {
        let dir = tempfile::tempdir().unwrap();
        let paths = StdioPaths {
            stdin: fifo(&dir.path().join("in")),
            stdout: fifo(&dir.path().join("out")),
            stderr: fifo(&dir.path().join("err")),
        };
        let opened = open_all(paths.clone(), false).unwrap();
        // Not at its end: we hold it open ourselves.
        let stdin = opened.stdio.stdin.unwrap();
        let mut byte = [0];
        assert_eq!(
            rustix::io::read(&stdin, &mut byte),
            Err(rustix::io::Errno::AGAIN)
        );
        drop(opened.hold.unwrap());
        assert_eq!(rustix::io::read(&stdin, &mut byte), Ok(0));

        let mut reader = OpenOptions::new()
            .read(true)
            .custom_flags(OFlags::NONBLOCK.bits() as i32)
            .open(&paths.stdout)
            .unwrap();
        let stdout = opened.stdio.stdout.unwrap();
        rustix::io::write(&stdout, b"x").unwrap();
        drop(stdout);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "x");

        assert!(open_all(paths, true).unwrap().stdio.stderr.is_none());
    }

    #[test]
    fn files_are_appended_to_and_other_schemes_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("log");
        let paths = StdioPaths {
            stdout: format!("file://{}", file.display()),
            ..Default::default()
        };
        for _ in 0..2 {
            let opened = open_all(paths.clone(), false).unwrap();
            assert!(opened.stdio.stdin.is_none() && opened.hold.is_none());
            rustix::io::write(opened.stdio.stdout.unwrap(), b"a").unwrap();
        }
        assert_eq!(fs::read_to_string(&file).unwrap(), "aa");

        let error = open_all(
            StdioPaths {
                stderr: "binary:///logger".into(),
                ..Default::default()
            },
            false,
        )
        .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unimplemented);
        assert!(
            error.to_string().starts_with("stderr: binary://"),
            "{error}"
        );
        let missing = StdioPaths {
            stdin: dir.path().join("none").display().to_string(),
            ..Default::default()
        };
        let error = open_all(missing, false).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }
}
