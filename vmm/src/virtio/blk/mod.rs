// SPDX-License-Identifier: Apache-2.0
//! virtio-blk (virtio 1.2 §5.2) on a raw file. Requests are served one after
//! another by the device's loop, or many at once by the kernel (io_uring).

mod device;
mod disk;
mod event;
mod request;
mod ring;
mod state;
#[cfg(test)]
mod tests;

pub use device::Blk;
