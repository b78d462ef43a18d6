// SPDX-License-Identifier: Apache-2.0
//! Snapshots: a paused machine as two files, and machines made from them.
//!
//! The state file ([`format`]) holds what KVM and the devices know, the memory
//! file ([`memory`]) the guest's memory with holes. A restored machine maps
//! the memory file privately, so that all machines made from one snapshot
//! share the pages that they do not write.

pub mod format;
pub mod memory;
pub mod state;

use bulkhead_vmm_api::FailureKind;

use crate::{kvm::KvmError, virtio::device::StateError};

/// Why a machine could not be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The state file is not one, is damaged, or is not for this VMM.
    #[error("state file: {0}")]
    Format(#[from] format::FormatError),
    /// A file could not be read or written.
    #[error("{what}")]
    File {
        /// Which, and what was tried.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A device.
    #[error("device {slot} ({name})")]
    Device {
        /// Its number on the bus.
        slot: usize,
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: StateError,
    },
    /// What the snapshot's machine had and what is given do not agree.
    #[error("{0}")]
    Mismatch(String),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

impl SnapshotError {
    /// For the reply.
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Format(_) => FailureKind::BadResource,
            Self::Kvm(KvmError::Unfit { .. }) => FailureKind::BadResource,
            Self::File { .. } => FailureKind::System,
            Self::Device { source, .. } => match source {
                StateError::Busy(_) => FailureKind::WrongState,
                _ => FailureKind::BadResource,
            },
            Self::Mismatch(_) => FailureKind::InvalidRequest,
            Self::Kvm(_) => FailureKind::Kvm,
        }
    }
}
