// SPDX-License-Identifier: Apache-2.0
//! The runtime's errors. A message does not contain its source's:
//! [`chain`] writes the whole of it.

use std::io;

use crate::{
    agent::AgentError, config::ConfigError, hooks::HookError, hypervisor::HypervisorError,
    oci::SpecError, resource::network::NetworkError,
};

/// What a front end tells its caller about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// No such container or process, or it has ended.
    NotFound,
    /// There is one of that name.
    AlreadyExists,
    /// Not in this state.
    FailedPrecondition,
    /// The request is wrong.
    InvalidArgument,
    /// Known and not built.
    Unimplemented,
    /// The virtual machine or its agent is not there.
    Unavailable,
    /// It took too long.
    DeadlineExceeded,
    /// Anything else.
    Internal,
}

/// Why an operation on a sandbox failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No such container or process, or it has ended already.
    #[error("{0} not found")]
    NotFound(String),
    /// A process that has ended cannot be signalled.
    #[error("process already finished: {0}")]
    Finished(String),
    /// There is one of that name.
    #[error("{0} already exists")]
    AlreadyExists(String),
    /// The sandbox, container or process is in a state that does not allow it.
    #[error("{0}")]
    Precondition(String),
    /// An argument is wrong; the text names it.
    #[error("{0}")]
    Invalid(String),
    /// Known and not built yet.
    #[error("{0} is not supported yet")]
    Unimplemented(String),
    /// The virtual machine has ended; the text says why.
    #[error("{0}")]
    VmEnded(String),
    /// A step took too long.
    #[error("{0}")]
    Timeout(String),
    /// The configuration is not usable.
    #[error("configuration")]
    Config(#[from] ConfigError),
    /// The bundle's config.json is not usable.
    #[error("container specification")]
    Spec(#[from] SpecError),
    /// A program that the specification wants run has failed.
    #[error("hook")]
    Hook(#[from] HookError),
    /// The pod's network could not be attached.
    #[error("pod network")]
    Network(#[from] NetworkError),
    /// The virtual machine could not be started.
    #[error("virtual machine")]
    Hypervisor(#[from] HypervisorError),
    /// The guest's agent refused or could not do it.
    #[error("{call}")]
    Agent {
        /// What was asked.
        call: &'static str,
        /// What it answered.
        #[source]
        source: AgentError,
    },
    /// A system call on the host failed.
    #[error("{step}")]
    System {
        /// What was tried, with the path.
        step: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A promise inside the runtime was broken.
    #[error("{0}")]
    Internal(String),
}

impl Error {
    /// The kind, for codes of a protocol.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound(_) | Self::Finished(_) => ErrorKind::NotFound,
            Self::AlreadyExists(_) => ErrorKind::AlreadyExists,
            Self::Precondition(_) => ErrorKind::FailedPrecondition,
            Self::Invalid(_) | Self::Spec(_) => ErrorKind::InvalidArgument,
            Self::Unimplemented(_) => ErrorKind::Unimplemented,
            Self::VmEnded(_) => ErrorKind::Unavailable,
            Self::Timeout(_) => ErrorKind::DeadlineExceeded,
            Self::Config(_) => ErrorKind::FailedPrecondition,
            Self::Network(source) => match source {
                NetworkError::Namespace { .. } | NetworkError::HostNetwork { .. } => {
                    ErrorKind::InvalidArgument
                }
                NetworkError::Netlink { .. } | NetworkError::System { .. } => ErrorKind::Internal,
            },
            Self::Hook(HookError::TimedOut { .. }) => ErrorKind::DeadlineExceeded,
            Self::Hook(_) => ErrorKind::FailedPrecondition,
            Self::Hypervisor(source) => source.kind(),
            Self::Agent { source, .. } => source.kind(),
            Self::System { .. } | Self::Internal(_) => ErrorKind::Internal,
        }
    }
}

/// Names the step in which something failed on the host.
pub(crate) trait Step<T> {
    /// Turns an I/O error into [`Error::System`].
    fn step<S: Into<String>>(self, step: impl FnOnce() -> S) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step<S: Into<String>>(self, step: impl FnOnce() -> S) -> Result<T, Error> {
        self.map_err(|source| Error::System {
            step: step().into(),
            source: source.into(),
        })
    }
}

/// An error with all its sources, as one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let part = error.to_string();
        // Some libraries repeat their source's text.
        if !text.ends_with(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_tells_every_source_once() {
        let error = Error::System {
            step: "open /x".into(),
            source: io::Error::from_raw_os_error(libc::ENOENT),
        };
        assert_eq!(
            chain(&error),
            "open /x: No such file or directory (os error 2)"
        );
    }
}
