// SPDX-License-Identifier: Apache-2.0
//! virtio-fs (virtio 1.2 §5.11) in this process: a directory of the host as
//! the guest's file system. The protocol's messages are a
//! library's; here are the queues, and what becomes of a message.
//!
//! Host directories may be bind-mounted below the shared one at any time: the
//! guest sees each as a file system of its own (it mounts it by itself), and
//! when it unmounts that, it forgets all its files, and the host can unmount,
//! too. Names that are not there are never remembered by the guest.

mod device;
mod event;
mod files;
mod locks;
mod passthrough;
mod state;
#[cfg(test)]
mod tests;
mod window;

pub use device::{allow_descriptors, Fs};
pub use window::Window;
