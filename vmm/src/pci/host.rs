// SPDX-License-Identifier: Apache-2.0
//! What functions need of the machine that they are in; KVM implements it.

use std::io;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

/// An interrupt message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Address it is written to.
    pub address: u64,
    /// What is written.
    pub data: u32,
}

/// The way of interrupt messages to the guest.
pub trait Messages: Send + Sync {
    /// Delivers one.
    fn send(&self, message: Message) -> io::Result<()>;
    /// Asks that the memory of all MSI-X tables be taken away from the guest, for
    /// good. Who does that has [`super::msix::Msix::settle`] called once it is
    /// done: from then on the guest's accesses to tables come to
    /// [`super::msix::Msix::read_table`] and `write_table`.
    fn trap_tables(&self);
}

/// Binds guest writes to events, without an exit to user space.
pub trait NotifyRegistrar: Send + Sync {
    /// A write of any size at `address` signals `event`.
    fn register_notify(&self, event: &EventFd, address: u64) -> io::Result<()>;
    /// Undoes it.
    fn unregister_notify(&self, event: &EventFd, address: u64) -> io::Result<()>;
    /// From now on, writes within these `size` bytes need not leave the guest:
    /// they may come late, but before any other access that does, and in their
    /// order.
    fn gather_writes(&self, address: u64, size: u32);
    /// The same, of ports.
    fn gather_port_writes(&self, port: u16, count: u32);
}
