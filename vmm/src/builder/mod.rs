// SPDX-License-Identifier: Apache-2.0
//! A VM: assembled from its checked configuration ([`plug`] puts its devices on
//! the bus), and led through its life ([`machine`]).

mod assemble;
mod growth;
mod machine;
mod plug;
mod windows;

use std::{fs::File, io, sync::Arc};

use bulkhead_vmm_api::FailureKind;
use kvm_ioctls::Kvm;

pub use self::{
    growth::GrowthError,
    machine::{BalloonError, Machine},
    plug::UnplugError,
};
use crate::{
    arch::x86_64::boot,
    bus::RangeError,
    confine::{jail::JailError, RightsError},
    kvm::KvmError,
    memory::{self, MemoryError},
    power::OnEnd,
    snapshot::{self, SnapshotError},
};

/// Why a VM could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// KVM refused.
    #[error("{0}")]
    Kvm(KvmError),
    /// No /dev/kvm.
    #[error("/dev/kvm cannot be opened")]
    OpenKvm(#[source] kvm_ioctls::Error),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] memory::MemoryError),
    /// The kernel.
    #[error(transparent)]
    Boot(#[from] boot::BootError),
    /// A device.
    #[error("{device} could not be made")]
    Device {
        /// Which.
        device: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// More devices than slots.
    #[error(transparent)]
    Bus(#[from] crate::pci::BusFull),
    /// Two devices of a kind would have the same name.
    #[error("{device} is there already: unplug that one first, or choose another name")]
    Twice {
        /// Which.
        device: String,
    },
    /// Nobody serves files.
    #[error("fs: this VM was started without a shared directory, and has no thread that may open files: configure one at its start (devices.fs)")]
    NoFiles,
    /// The VMM's own layout is at fault.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// No memory for the bus's configuration space.
    #[error("PCI configuration space could not be mapped")]
    ConfigSpace(#[from] vm_memory::mmap::MmapRegionError),
    /// Memory that comes and goes.
    #[error(transparent)]
    Growth(#[from] GrowthError),
    /// A snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The process cannot be confined.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// Rights that nobody needs stay.
    #[error("the process keeps rights: --jail off does without")]
    Rights(#[from] RightsError),
    /// A thread or descriptor.
    #[error("{step}")]
    System {
        /// What was tried.
        step: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl From<KvmError> for BuildError {
    fn from(error: KvmError) -> Self {
        Self::Kvm(error)
    }
}

impl BuildError {
    /// For the reply.
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Kvm(_) | Self::OpenKvm(_) => FailureKind::Kvm,
            Self::Boot(_) => FailureKind::BadResource,
            Self::Bus(_) | Self::Twice { .. } => FailureKind::InvalidRequest,
            Self::NoFiles => FailureKind::Unsupported,
            Self::Snapshot(error) => error.kind(),
            Self::Growth(error) => error.kind(),
            Self::Memory(MemoryError::Size { .. } | MemoryError::HugePages { .. }) => {
                FailureKind::BadResource
            }
            Self::Jail(_)
            | Self::Rights(_)
            | Self::Memory(_)
            | Self::Device { .. }
            | Self::Range(_)
            | Self::ConfigSpace(_)
            | Self::System { .. } => FailureKind::System,
        }
    }
}

fn system(step: &'static str) -> impl FnOnce(io::Error) -> BuildError {
    move |source| BuildError::System { step, source }
}

/// What the machine tells its owner.
#[derive(Clone)]
pub struct Callbacks {
    /// The guest, or KVM, ended the machine. Called on any thread, perhaps
    /// several times.
    pub on_end: OnEnd,
    /// The guest connected to a vsock port of the host.
    pub on_connect: Arc<dyn Fn(u32) + Send + Sync>,
    /// [`Machine::attend`] is to be called, by who controls the machine. Called
    /// once, on any thread.
    pub on_trap: Arc<dyn Fn() + Send + Sync>,
    /// The guest read its generation id for the first time. Called on a
    /// vCPU's thread.
    pub on_generation_read: Arc<dyn Fn() + Send + Sync>,
}

/// What a machine uses of the host that has a path: opened before the process
/// loses sight of it.
pub struct Host {
    kvm: Kvm,
    /// Which pages of this process exist.
    pagemap: File,
}

impl Host {
    /// Opens it.
    ///
    /// # Errors
    /// No KVM, no /proc.
    pub fn open() -> Result<Self, BuildError> {
        Ok(Self {
            kvm: Kvm::new().map_err(BuildError::OpenKvm)?,
            pagemap: snapshot::memory::open_pagemap()
                .map_err(system("/proc/self/pagemap cannot be opened"))?,
        })
    }
}
