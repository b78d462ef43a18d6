// SPDX-License-Identifier: Apache-2.0
//! A process's standard streams on the host's side.

mod copies;
mod endpoint;
mod pump;

use std::os::fd::OwnedFd;

pub use self::copies::{Copies, GuestStreams};

/// The host's ends of a process's standard streams. The runtime copies
/// between them and the guest, and closes each when it is done with it: input
/// at its end of file or when the process has ended; output once everything
/// has been delivered after the process has ended.
///
/// Descriptors of FIFOs, pipes and terminals are to be non-blocking (the flag
/// belongs to the open file description, so do not share it with others); the
/// runtime sets it where it is missing. Regular files may be blocking.
#[derive(Debug, Default)]
pub struct Stdio {
    /// The process gets a terminal: `stdout` shows what it shows, `stdin` is
    /// what is typed, `stderr` is none.
    pub terminal: bool,
    /// Read end; its end of file is passed on to the process. A FIFO has that
    /// as long as nobody has opened it for writing: whoever hands such a
    /// descriptor over keeps a write end until the client has one, and drops
    /// it for `CloseIO`. None: /dev/null.
    pub stdin: Option<OwnedFd>,
    /// Write end. None: /dev/null.
    pub stdout: Option<OwnedFd>,
    /// Write end. None: /dev/null.
    pub stderr: Option<OwnedFd>,
    /// As the caller named them, for `State`.
    pub paths: StdioPaths,
}

/// Names of the streams, as a caller gave them; empty: none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StdioPaths {
    /// Standard input.
    pub stdin: String,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}
