// SPDX-License-Identifier: Apache-2.0
//! Why a virtual machine cannot be started or has ended.

use std::{io, path::PathBuf};

use bulkhead_vmm_api::{ChannelError, Failure, FailureKind};

use super::Ending;
use crate::error::ErrorKind;

/// Why a virtual machine could not be started or told something.
#[derive(Debug, thiserror::Error)]
pub enum HypervisorError {
    /// A file that the configuration names is not usable.
    #[error("{key}: {} cannot be opened ({remedy})", path.display())]
    File {
        /// The configuration's key.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// What would help.
        remedy: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The VMM's binary cannot be run.
    #[error("hypervisor.path: {} cannot be run (install bulkhead-vmm, or set hypervisor.path in the configuration)", path.display())]
    Spawn {
        /// The binary.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// KVM is not there or not allowed.
    #[error("/dev/kvm cannot be opened (load kvm_intel or kvm_amd, allow nested virtualisation, or run as root; `bulkhead check` tells more)")]
    Kvm(#[source] io::Error),
    /// The VMM refused; its text names the field or step.
    #[error("{}", failure.message)]
    Refused {
        /// What was asked.
        call: &'static str,
        /// Its answer.
        failure: Failure,
    },
    /// The VMM ended.
    #[error("{0}")]
    Ended(Ending),
    /// The VMM breaks the protocol.
    #[error("control connection to the VMM")]
    Control(#[source] ChannelError),
    /// Another system call failed.
    #[error("{step}")]
    System {
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl HypervisorError {
    /// The kind, for codes of a protocol.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::File { .. } | Self::Spawn { .. } | Self::Kvm(_) => ErrorKind::FailedPrecondition,
            Self::Refused { failure, .. } => match failure.kind {
                FailureKind::InvalidRequest => ErrorKind::InvalidArgument,
                FailureKind::BadResource => ErrorKind::FailedPrecondition,
                FailureKind::Unsupported => ErrorKind::Unimplemented,
                FailureKind::WrongState | FailureKind::Kvm | FailureKind::System => {
                    ErrorKind::Internal
                }
            },
            Self::Ended(_) => ErrorKind::Unavailable,
            Self::Control(_) | Self::System { .. } => ErrorKind::Internal,
        }
    }
}
