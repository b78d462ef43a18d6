// SPDX-License-Identifier: Apache-2.0
//! Bulkhead's virtual machine monitor: boots a Linux kernel on KVM with
//! virtio-pci devices. Usable as a library (tests run it in process) and as
//! the `bulkhead-vmm` binary, driven over the control socket of
//! `bulkhead-vmm-api`. It knows nothing of containers.

#[macro_use]
mod log;

pub mod arch;
pub mod builder;
pub mod bus;
pub mod config;
pub mod confine;
pub mod control;
pub mod event;
pub mod generation;
pub mod kvm;
pub mod memory;
pub mod pci;
pub mod power;
pub mod probe;
pub mod random;
pub mod serial;
pub mod snapshot;
pub mod timeline;
pub mod virtio;
