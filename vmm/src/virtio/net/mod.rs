// SPDX-License-Identifier: Apache-2.0
//! virtio-net (virtio 1.2 §5.1) on a tap.

mod by_kernel;
mod control;
mod device;
mod event;
mod receive;
mod state;
#[cfg(test)]
mod tests;
mod throttle;
mod vhost;

pub use device::{Backend, Net};
