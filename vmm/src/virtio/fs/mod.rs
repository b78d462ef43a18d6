// SPDX-License-Identifier: Apache-2.0
//! virtio-fs (virtio 1.2 §5.11) in this process: a directory of the host as
//! the guest's file system. The protocol and the passing through are a
//! library's; here are the queues.

mod device;
mod event;
mod state;
#[cfg(test)]
mod tests;

pub use device::Fs;
