// SPDX-License-Identifier: Apache-2.0
//! virtio-balloon (virtio 1.2 §5.5): the guest gives memory back, what it
//! does not use by itself (free page reporting) and what it is asked for.

mod device;
mod event;
mod state;
mod statistics;
#[cfg(test)]
mod tests;

pub use device::Balloon;
