// SPDX-License-Identifier: Apache-2.0
//! The root bus behind the ECAM window (PCI Express 5.0 §7.2.2).
//!
//! A guest reads configuration space a thousand times while it boots and
//! writes it a hundred times, and reading has no effect. So the devices' part
//! of the window is memory that the guest may only read, and the bus keeps it
//! as the functions say; only writes leave the guest.

use std::sync::{Arc, Mutex};

use vm_memory::{mmap::MmapRegionError, Bytes, MmapRegion, VolatileMemory};

use super::config::{self, ConfigSpace, Identity};
use crate::bus::BusDevice;

/// Device numbers on the bus.
const SLOTS: usize = 32;
/// Bytes of the window per device: eight functions of 4 KiB.
const SLOT_SIZE: usize = 8 * 4096;

/// A function's configuration space, as the bus sees it.
pub trait PciFunction: Send + Sync {
    /// Reads configuration space.
    fn read_config(&self, offset: usize, data: &mut [u8]);
    /// Writes it.
    fn write_config(&self, offset: usize, data: &[u8]);
}

/// No free device number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the PCI bus is full: at most {} devices", SLOTS - 1)]
pub struct BusFull;

/// The bus with the host bridge at device 0.
pub struct PciRoot {
    slots: Vec<Arc<dyn PciFunction>>,
    /// What the guest reads, once it is shown. Held while a function's space
    /// changes, so that the last change is what it shows.
    shown: Mutex<Option<MmapRegion>>,
}

struct HostBridge(ConfigSpace);

impl PciFunction for HostBridge {
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        self.0.read(offset, data);
    }
    fn write_config(&self, _offset: usize, _data: &[u8]) {}
}

impl Default for PciRoot {
    fn default() -> Self {
        // An Intel host bridge that has no driver and no registers.
        let bridge = ConfigSpace::new(Identity {
            vendor: 0x8086,
            device: 0x0d57,
            class: 0x06_0000,
            revision: 0,
            subsystem: 0,
        });
        Self {
            slots: vec![Arc::new(HostBridge(bridge))],
            shown: Mutex::new(None),
        }
    }
}

impl PciRoot {
    /// Plugs a function in at the next device number, which is returned.
    pub fn add(&mut self, function: Arc<dyn PciFunction>) -> Result<usize, BusFull> {
        if self.slots.len() == SLOTS {
            return Err(BusFull);
        }
        self.slots.push(function);
        Ok(self.slots.len() - 1)
    }

    /// The device number that [`Self::add`] gives next.
    pub fn next_slot(&self) -> usize {
        self.slots.len()
    }

    /// Memory to put at the start of the window, for the guest to read: the
    /// spaces of all devices that are there now. `map` does that; the bus keeps
    /// the memory. Functions that do not exist read as zero, which is no vendor
    /// either; what lies behind the devices is not in it.
    ///
    /// # Errors
    /// There is no memory, or `map` fails.
    pub fn show<E: From<MmapRegionError>>(
        &self,
        map: impl FnOnce(&MmapRegion) -> Result<(), E>,
    ) -> Result<(), E> {
        let memory = MmapRegion::new(self.slots.len() * SLOT_SIZE)?;
        map(&memory)?;
        *self.shown() = Some(memory);
        self.refresh();
        Ok(())
    }

    /// Shows the functions' spaces as they are now: they changed otherwise than
    /// by a write to the window.
    pub fn refresh(&self) {
        let shown = self.shown();
        for (slot, function) in self.slots.iter().enumerate() {
            update(shown.as_ref(), slot, function.as_ref());
        }
    }

    fn shown(&self) -> std::sync::MutexGuard<'_, Option<MmapRegion>> {
        self.shown
            .lock()
            .expect("no holder of the window's lock panics")
    }

    /// Splits an ECAM offset: function 0 of a device that is there, and the
    /// register.
    fn decode(&self, offset: u64) -> Option<(usize, &dyn PciFunction, usize)> {
        let bus = offset >> 20;
        let device = (offset >> 15) & 0x1f;
        let function = (offset >> 12) & 7;
        if bus != 0 || function != 0 {
            return None;
        }
        let slot = device as usize;
        let found = self.slots.get(slot)?;
        Some((slot, found.as_ref(), (offset & 0xfff) as usize))
    }
}

/// Shows a function's space, of which the rest is zero.
fn update(shown: Option<&MmapRegion>, slot: usize, function: &dyn PciFunction) {
    let Some(memory) = shown else { return };
    let mut space = [0; config::SIZE];
    function.read_config(0, &mut space);
    let written = memory
        .as_volatile_slice()
        .write_slice(&space, slot * SLOT_SIZE);
    debug_assert!(written.is_ok(), "no slot is added to a bus that is shown");
}

impl BusDevice for PciRoot {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.decode(offset) {
            Some((_, function, register)) => function.read_config(register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((slot, function, register)) = self.decode(offset) {
            let shown = self.shown();
            function.write_config(register, data);
            update(shown.as_ref(), slot, function);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bridge_answers_and_empty_slots_read_all_ones() {
        let root = PciRoot::default();
        let mut data = [0; 4];
        root.read(0, &mut data);
        assert_eq!(data, [0x86, 0x80, 0x57, 0x0d]);
        for offset in [1 << 15, 1 << 12, 31 << 15, 1 << 20, u64::MAX] {
            root.read(offset, &mut data);
            assert_eq!(data, [0xff; 4]);
            root.write(offset, &data);
        }
    }

    struct Scratch(Mutex<ConfigSpace>);

    impl PciFunction for Scratch {
        fn read_config(&self, offset: usize, data: &mut [u8]) {
            self.0.lock().unwrap().read(offset, data);
        }
        fn write_config(&self, offset: usize, data: &[u8]) {
            self.0.lock().unwrap().write(offset, data);
        }
    }

    #[test]
    fn what_is_shown_is_what_would_be_read() {
        let mut root = PciRoot::default();
        let mut space = ConfigSpace::new(Identity {
            vendor: 1,
            device: 2,
            class: 0,
            revision: 0,
            subsystem: 0,
        });
        space.set_bar(0xc000_0000, 0x8000);
        let scratch = Arc::new(Scratch(Mutex::new(space)));
        root.add(scratch.clone()).unwrap();
        let mut at = std::ptr::null();
        root.show(|memory| {
            at = memory.as_ptr();
            assert_eq!(memory.size(), 2 * SLOT_SIZE);
            Ok::<_, MmapRegionError>(())
        })
        .unwrap();
        let same = |root: &PciRoot| {
            let shown = root.shown();
            let memory = shown.as_ref().unwrap();
            assert_eq!(memory.as_ptr().cast_const(), at);
            for slot in 0..2 {
                let mut seen = [1; 4096];
                let all = memory.as_volatile_slice();
                all.read_slice(&mut seen, slot * SLOT_SIZE).unwrap();
                let mut read = [1; 4096];
                root.read((slot * SLOT_SIZE) as u64, &mut read);
                assert_eq!(seen, read);
            }
        };
        same(&root);
        // Sizing the BAR, as a guest does.
        root.write(1 << 15 | 0x10, &[0xff; 4]);
        let mut size = [0; 4];
        root.read(1 << 15 | 0x10, &mut size);
        assert_eq!(u32::from_le_bytes(size), 0xffff_8000);
        same(&root);
        scratch.write_config(0x0c, &[7]);
        root.refresh();
        same(&root);
    }

    #[test]
    fn the_bus_holds_31_devices() {
        let mut root = PciRoot::default();
        for expected in 1..SLOTS {
            let space = ConfigSpace::new(Identity {
                vendor: 1,
                device: 2,
                class: 0,
                revision: 0,
                subsystem: 0,
            });
            assert_eq!(root.add(Arc::new(HostBridge(space))), Ok(expected));
        }
        let last = Arc::clone(&root.slots[1]);
        assert_eq!(root.add(last), Err(BusFull));
    }
}
