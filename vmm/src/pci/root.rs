// SPDX-License-Identifier: Apache-2.0
//! The root bus behind the ECAM window (PCI Express 5.0 §7.2.2).

use std::sync::Arc;

use super::config::{ConfigSpace, Identity};
use crate::bus::BusDevice;

/// Device numbers on the bus.
const SLOTS: usize = 32;

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

    /// Splits an ECAM offset: function 0 of a device that is there, and the
    /// register.
    fn decode(&self, offset: u64) -> Option<(&Arc<dyn PciFunction>, usize)> {
        let bus = offset >> 20;
        let device = (offset >> 15) & 0x1f;
        let function = (offset >> 12) & 7;
        if bus != 0 || function != 0 {
            return None;
        }
        let found = self.slots.get(device as usize)?;
        Some((found, (offset & 0xfff) as usize))
    }
}

impl BusDevice for PciRoot {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.decode(offset) {
            Some((function, register)) => function.read_config(register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((function, register)) = self.decode(offset) {
            function.write_config(register, data);
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
