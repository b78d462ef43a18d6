// SPDX-License-Identifier: Apache-2.0
//! Virtio devices (virtio 1.2) and what they share.

pub mod balloon;
pub mod blk;
pub mod chain;
pub mod console;
pub mod counters;
pub mod device;
pub mod fs;
pub mod mem;
pub mod net;
pub mod pmem;
pub mod rate;
pub mod rng;
#[cfg(test)]
mod testing;
pub mod transport;
pub mod vsock;
