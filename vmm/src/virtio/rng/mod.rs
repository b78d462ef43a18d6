// SPDX-License-Identifier: Apache-2.0
//! virtio-rng (virtio 1.2 §5.4): the host kernel's entropy.

mod device;
mod event;
mod state;
#[cfg(test)]
mod tests;

pub use device::Rng;
