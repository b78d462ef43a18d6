// SPDX-License-Identifier: Apache-2.0
//! What can go wrong with a box.

use std::io;
use std::path::PathBuf;

/// An error of the box.
#[derive(Debug, thiserror::Error)]
pub enum BoxError {
    /// A system call or file operation failed.
    #[error("cannot {what}")]
    Io {
        /// What was to be done.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A program that prepares the box failed.
    #[error("{tool} failed: {detail}")]
    Tool {
        /// The program with its arguments.
        tool: String,
        /// What it said.
        detail: String,
    },
    /// The init program is not built.
    #[error("{0} is missing; build it with `cargo build -p bulkhead-tests --bins`")]
    NoInit(PathBuf),
    /// The box did not come up.
    #[error("the box did not come up: {reason}\n--- end of its console ---\n{console}")]
    Boot {
        /// What happened instead.
        reason: String,
        /// The last lines of the console and of QEMU's own messages.
        console: String,
    },
    /// The box ended while a command ran in it.
    #[error("the box is gone: {0}")]
    Gone(String),
    /// The command could not be started in the box.
    #[error("cannot start it in the box: {0}")]
    Spawn(String),
    /// No box of this name is up.
    #[error("no box named {0} is up")]
    NotUp(String),
    /// A box of this name is up already.
    #[error("a box named {0} is up already")]
    AlreadyUp(String),
}

/// For `map_err`: wraps an I/O error with what was to be done.
pub(super) fn io_step(what: impl Into<String>) -> impl FnOnce(io::Error) -> BoxError {
    let what = what.into();
    move |source| BoxError::Io { what, source }
}

/// As [`io_step`] for the errors of nix.
pub(super) fn errno_step(what: impl Into<String>) -> impl FnOnce(nix::Error) -> BoxError {
    let step = io_step(what);
    move |errno| step(errno.into())
}
