// SPDX-License-Identifier: Apache-2.0
//! How a driver's notifications reach the device.

use std::{
    io,
    sync::{atomic::Ordering, OnceLock},
};

use vmm_sys_util::eventfd::EventFd;

use super::VirtioPci;

impl VirtioPci {
    /// The event of a queue's notifications. The caller holds the registers'
    /// lock, so there is only one.
    pub(super) fn kick(&self, index: usize) -> io::Result<&EventFd> {
        if let Some(kick) = self.kicks[index].get() {
            return Ok(kick);
        }
        let kick = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(self.kicks[index].get_or_init(|| kick))
    }

    /// Lets KVM raise it, if it does not yet. The caller holds the registers'
    /// lock.
    pub(super) fn raise(&self, index: usize, kick: &EventFd) -> io::Result<()> {
        if !self.raised[index].load(Ordering::SeqCst) {
            self.notify.register_notify(kick, self.at.notify(index))?;
            self.raised[index].store(true, Ordering::SeqCst);
        }
        Ok(())
    }

    /// A notification that left the guest: the first of its queue in a clone, or
    /// one of a queue that nobody serves.
    pub(super) fn notified(&self, index: usize) {
        let Some(kick) = self.kicks.get(index).and_then(OnceLock::get) else {
            return;
        };
        if !self.raised[index].load(Ordering::SeqCst) {
            let registers = self.registers();
            if self.is_gone() {
                return;
            }
            if let Err(error) = self.raise(index, kick) {
                // The next one comes this way as well.
                limited!(warn, %error, "notifications leave the guest");
            }
            drop(registers);
        }
        let _ = kick.write(1);
    }

    /// Has KVM raise none any more. The device has left the bus.
    pub(super) fn withdraw(&self) {
        for (index, kick) in self.kicks.iter().enumerate() {
            let Some(kick) = kick.get() else { continue };
            if !self.raised[index].swap(false, Ordering::SeqCst) {
                continue;
            }
            let address = self.at.notify(index);
            if let Err(error) = self.notify.unregister_notify(kick, address) {
                limited!(error, %error, "notification not taken back");
            }
        }
    }
}
