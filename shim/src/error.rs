// SPDX-License-Identifier: Apache-2.0
//! Errors of calls, and the codes with which containerd is told.

use bulkhead_runtime::{config::ConfigError, error::chain, ErrorKind};
use ttrpc::Code;

use crate::{options::OptionsError, stdio::StdioError};

/// Why a call cannot be answered.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The runtime says so.
    #[error(transparent)]
    Runtime(#[from] bulkhead_runtime::Error),
    /// Bulkhead's configuration cannot be used.
    #[error("configuration")]
    Config(#[from] ConfigError),
    /// The runtime options cannot be used.
    #[error("runtime options")]
    Options(#[from] OptionsError),
    /// A stream cannot be used.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// A field is not what it should be.
    #[error("{0}")]
    Json(&'static str, #[source] serde_json::Error),
    /// No container of this name, because there is none at all.
    #[error("container {0:?} not found")]
    NoContainer(String),
    /// Not this shim's sandbox, or not created.
    #[error("sandbox {0:?} not found")]
    NoSandbox(String),
    /// The sandbox was created, and waits for `StartSandbox`.
    #[error("the sandbox has not been started")]
    NotStarted,
    /// A value does not fit its field.
    #[error("{0}")]
    Invalid(String),
    /// The container, or the process, has ended.
    #[error("container {0:?}: the process has ended")]
    Ended(String),
    /// Known and not built.
    #[error("{0} is not supported")]
    Unimplemented(&'static str),
    /// The shim is about to end.
    #[error("the sandbox has been shut down")]
    Stopping,
    /// An answer cannot be written as protobuf.
    #[error("encode the reply")]
    Encode(#[from] protobuf::Error),
    /// A bug: the call's task ended without a result.
    #[error("the call was not completed")]
    Lost(#[from] tokio::task::JoinError),
}

impl CallError {
    /// What containerd is told of it, in short.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Runtime(error) => error.kind(),
            Self::Stdio(error) => error.kind(),
            Self::Config(_) | Self::Ended(_) | Self::NotStarted | Self::Stopping => {
                ErrorKind::FailedPrecondition
            }
            Self::Options(_) | Self::Json(..) | Self::Invalid(_) => ErrorKind::InvalidArgument,
            Self::NoContainer(_) | Self::NoSandbox(_) => ErrorKind::NotFound,
            Self::Unimplemented(_) => ErrorKind::Unimplemented,
            Self::Encode(_) | Self::Lost(_) => ErrorKind::Internal,
        }
    }
}

/// The one place where kinds become codes.
fn code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::NotFound => Code::NOT_FOUND,
        ErrorKind::AlreadyExists => Code::ALREADY_EXISTS,
        ErrorKind::FailedPrecondition => Code::FAILED_PRECONDITION,
        ErrorKind::InvalidArgument => Code::INVALID_ARGUMENT,
        ErrorKind::Unimplemented => Code::UNIMPLEMENTED,
        ErrorKind::Unavailable => Code::UNAVAILABLE,
        ErrorKind::DeadlineExceeded => Code::DEADLINE_EXCEEDED,
        ErrorKind::Internal => Code::INTERNAL,
    }
}

impl From<CallError> for ttrpc::Error {
    fn from(error: CallError) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(code(error.kind()), chain(&error)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(error: CallError) -> (Code, String) {
        match ttrpc::Error::from(error) {
            ttrpc::Error::RpcStatus(status) => (status.code.unwrap(), status.message),
            other => panic!("{other:?} becomes UNKNOWN"),
        }
    }

    #[test]
    fn kinds_have_codes_of_their_own() {
        for (kind, expected) in [
            (ErrorKind::NotFound, Code::NOT_FOUND),
            (ErrorKind::AlreadyExists, Code::ALREADY_EXISTS),
            (ErrorKind::FailedPrecondition, Code::FAILED_PRECONDITION),
            (ErrorKind::InvalidArgument, Code::INVALID_ARGUMENT),
            (ErrorKind::Unimplemented, Code::UNIMPLEMENTED),
            (ErrorKind::Unavailable, Code::UNAVAILABLE),
            (ErrorKind::DeadlineExceeded, Code::DEADLINE_EXCEEDED),
            (ErrorKind::Internal, Code::INTERNAL),
        ] {
            assert_eq!(code(kind), expected);
        }
    }

    #[test]
    fn errors_arrive_with_code_and_causes() {
        let (code, text) = status(CallError::NoContainer("x".into()));
        assert_eq!(
            (code, text.as_str()),
            (Code::NOT_FOUND, "container \"x\" not found")
        );
        let error = serde_json::from_str::<Vec<u32>>("[").unwrap_err();
        let (code, text) = status(CallError::Json("spec", error));
        assert_eq!(code, Code::INVALID_ARGUMENT);
        assert!(text.starts_with("spec: EOF while parsing"), "{text}");
        let (code, _) = status(bulkhead_runtime::Error::AlreadyExists("x".into()).into());
        assert_eq!(code, Code::ALREADY_EXISTS);
        let (code, _) = status(CallError::Stopping);
        assert_eq!(code, Code::FAILED_PRECONDITION);
        let (code, _) = status(CallError::Unimplemented("Checkpoint"));
        assert_eq!(code, Code::UNIMPLEMENTED);
    }
}
