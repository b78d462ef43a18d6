// SPDX-License-Identifier: Apache-2.0
//! PCI Express as far as virtio needs it: one root bus, configuration space
//! by ECAM only, MSI-X only.

pub mod config;
pub mod host;
pub mod msix;
pub mod pages;
mod root;

pub use root::{BarWindow, BusFull, PciFunction, PciRoot, BAR_SIZE, SLOTS};
