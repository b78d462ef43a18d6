// SPDX-License-Identifier: Apache-2.0
//! What a device tells its driver.

use std::sync::{
    atomic::{AtomicBool, AtomicU16, AtomicU8, Ordering},
    Arc, Mutex, MutexGuard,
};

use crate::{
    pci::{msix::Msix, pages::Page},
    virtio::{counters::Counters, device::Interrupt},
};

/// The way from device to driver: used from the device's event loop, without
/// any lock of the transport.
pub(super) struct Lines {
    pub msix: Msix,
    /// The driver's choice of vector, by queue; the last is configuration's.
    pub vectors: Vec<AtomicU16>,
    /// What the guest reads as the device's configuration. Held while it
    /// changes, and while its generation is read: who has read the same one
    /// before and after, has read nothing in between that is half a change.
    pub config: Mutex<Page>,
    pub generation: AtomicU8,
    pub broken: AtomicBool,
    pub counters: Arc<Counters>,
}

impl Lines {
    fn config(&self) -> MutexGuard<'_, Page> {
        self.config
            .lock()
            .expect("no holder of the page's lock panics")
    }

    /// The configuration's generation.
    pub fn generation(&self) -> u8 {
        let _page = self.config();
        self.generation.load(Ordering::SeqCst)
    }
}

impl Interrupt for Lines {
    fn signal_queue(&self, index: usize) {
        if let Some(vector) = self.vectors[..self.vectors.len() - 1].get(index) {
            self.counters.interrupt();
            self.msix.signal(vector.load(Ordering::Relaxed));
        }
    }

    fn show_config(&self, config: &[u8]) {
        let page = self.config();
        page.write(config);
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    fn signal_config(&self) {
        if let Some(vector) = self.vectors.last() {
            self.msix.signal(vector.load(Ordering::Relaxed));
        }
    }

    fn device_broken(&self) {
        if !self.broken.swap(true, Ordering::SeqCst) {
            self.signal_config();
        }
    }
}
