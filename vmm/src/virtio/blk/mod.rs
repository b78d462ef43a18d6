// SPDX-License-Identifier: Apache-2.0
//! virtio-blk (virtio 1.2 §5.2) on a raw file.

mod device;
mod disk;
mod event;
mod state;
#[cfg(test)]
mod tests;

pub use device::Blk;
