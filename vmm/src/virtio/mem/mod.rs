// SPDX-License-Identifier: Apache-2.0
//! virtio-mem (virtio 1.2 §5.15): memory that the guest takes and gives back in
//! blocks, as far as it is asked to. Which parts of it exist on the host is the
//! machine's owner's to see to; the device keeps the book.

mod blocks;
mod device;
mod event;
mod state;
#[cfg(test)]
mod tests;

pub use device::{Layout, Mem, BLOCK, SLOT};
