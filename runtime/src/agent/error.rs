// SPDX-License-Identifier: Apache-2.0
//! Errors of the guest's agent, as codes.

use ttrpc::{Code, Error as TtrpcError};

use crate::error::ErrorKind;

/// Why a call to the agent failed. What a guest writes is text for people and
/// is never interpreted.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The agent answered with an error.
    #[error("{message}")]
    Refused {
        /// The answer's code as our own kind.
        kind: ErrorKind,
        /// The answer's text.
        message: String,
    },
    /// No answer in time.
    #[error("the guest's agent did not answer within {0} ms")]
    Timeout(u128),
    /// The connection is gone.
    #[error("connection to the guest's agent ended")]
    Disconnected,
}

impl AgentError {
    /// The kind, for codes of a protocol.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Refused { kind, .. } => *kind,
            Self::Timeout(_) => ErrorKind::DeadlineExceeded,
            Self::Disconnected => ErrorKind::Unavailable,
        }
    }
}

impl From<TtrpcError> for AgentError {
    fn from(error: TtrpcError) -> Self {
        match error {
            TtrpcError::RpcStatus(status) => Self::Refused {
                kind: kind(status.code()),
                message: status.message,
            },
            TtrpcError::Socket(_)
            | TtrpcError::Nix(_)
            | TtrpcError::LocalClosed
            | TtrpcError::RemoteClosed
            | TtrpcError::Eof => Self::Disconnected,
            TtrpcError::Others(message) => Self::Refused {
                kind: ErrorKind::Internal,
                message,
            },
        }
    }
}

fn kind(code: Code) -> ErrorKind {
    match code {
        Code::NOT_FOUND => ErrorKind::NotFound,
        Code::ALREADY_EXISTS => ErrorKind::AlreadyExists,
        Code::FAILED_PRECONDITION => ErrorKind::FailedPrecondition,
        Code::INVALID_ARGUMENT => ErrorKind::InvalidArgument,
        Code::UNIMPLEMENTED => ErrorKind::Unimplemented,
        Code::UNAVAILABLE => ErrorKind::Unavailable,
        Code::DEADLINE_EXCEEDED => ErrorKind::DeadlineExceeded,
        Code::OK
        | Code::CANCELLED
        | Code::UNKNOWN
        | Code::PERMISSION_DENIED
        | Code::RESOURCE_EXHAUSTED
        | Code::ABORTED
        | Code::OUT_OF_RANGE
        | Code::INTERNAL
        | Code::DATA_LOSS
        | Code::UNAUTHENTICATED => ErrorKind::Internal,
    }
}
