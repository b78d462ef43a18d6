// SPDX-License-Identifier: Apache-2.0
//! virtio-pmem (virtio 1.2 §5.19): a file that is the guest's memory.

mod device;
mod event;
mod state;
#[cfg(test)]
mod tests;

pub use device::Pmem;
