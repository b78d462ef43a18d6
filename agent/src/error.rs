// SPDX-License-Identifier: Apache-2.0
//! The agent's errors and what the host is told about them.

use nix::errno::Errno;
use thiserror::Error;
use ttrpc::{get_status, Code};

/// What can go wrong in an RPC. The variants are the codes of the protocol.
#[derive(Debug, Error)]
pub enum AgentError {
    /// No such container or process, or the process has ended.
    #[error("{0} not found")]
    NotFound(String),
    /// A container or process of that name is there already.
    #[error("{0} already exists")]
    AlreadyExists(String),
    /// The container or process is in a state that does not allow it.
    #[error("{0}")]
    Precondition(String),
    /// The request is wrong; the text names the field or the command.
    #[error("{0}")]
    Invalid(String),
    /// The agent does not do this.
    #[error("{0}")]
    Unimplemented(String),
    /// A step took longer than it may.
    #[error("{0} timed out")]
    Timeout(String),
    /// A step failed in the guest.
    #[error("{step}: {errno}")]
    Step {
        /// What was being done, with the path.
        step: String,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// A failure that is not a system call's.
    #[error("{0}")]
    Internal(String),
}

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, AgentError>;

impl AgentError {
    /// The ttrpc status code of this error.
    pub fn code(&self) -> Code {
        match self {
            Self::NotFound(_) => Code::NOT_FOUND,
            Self::AlreadyExists(_) => Code::ALREADY_EXISTS,
            Self::Precondition(_) => Code::FAILED_PRECONDITION,
            Self::Invalid(_) => Code::INVALID_ARGUMENT,
            Self::Unimplemented(_) => Code::UNIMPLEMENTED,
            Self::Timeout(_) => Code::DEADLINE_EXCEEDED,
            Self::Step { .. } | Self::Internal(_) => Code::INTERNAL,
        }
    }
}

impl From<AgentError> for ttrpc::Error {
    fn from(error: AgentError) -> Self {
        // Any other variant of ttrpc's error becomes UNKNOWN on the wire.
        ttrpc::Error::RpcStatus(get_status(error.code(), error.to_string()))
    }
}

/// Names the step in which a system call failed.
pub trait Context<T> {
    /// Turns an errno into [`AgentError::Step`] with the text of `step`.
    fn step<S: Into<String>>(self, step: impl FnOnce() -> S) -> Result<T>;
}

impl<T> Context<T> for nix::Result<T> {
    fn step<S: Into<String>>(self, step: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|errno| AgentError::Step {
            step: step().into(),
            errno,
        })
    }
}

impl<T> Context<T> for std::io::Result<T> {
    fn step<S: Into<String>>(self, step: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|error| AgentError::Step {
            step: step().into(),
            errno: errno_of(&error),
        })
    }
}

/// The errno inside an I/O error; EIO where there is none.
pub fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}
