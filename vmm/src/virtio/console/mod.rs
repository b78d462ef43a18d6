// SPDX-License-Identifier: Apache-2.0
//! virtio-console (virtio 1.2 §5.3) with two ports: the guest's console (port 0,
//! `hvc0` of Linux), and one that is named `log` (port 1, `/dev/vport*p1`).
//!
//! A reader that is slow, or gone, holds up nobody else. What it does not take
//! of the console is dropped and counted: a kernel waits for its console with
//! interrupts off. What it does not take of the log stays in the guest, in the
//! port's queue, and whoever writes more waits there as for a pipe (or is told,
//! with `O_NONBLOCK`); once nobody reads it any more it is dropped and counted,
//! too.

mod control;
mod device;
mod event;
mod port;
mod state;
#[cfg(test)]
mod tests;

pub use device::{Console, Outputs};
