// SPDX-License-Identifier: Apache-2.0
//! Address spaces: who answers a guest's port or memory access.
//!
//! A bus is filled while the VM is built and then only read, so that vCPUs
//! look devices up without a lock.

use std::{collections::BTreeMap, sync::Arc};

/// A device on a bus. Called on vCPU threads, several at once; locks inside.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` bytes at `offset` into the device's range. Any
    /// offset and length may come; what is not there reads as zero.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes; what is not there swallows it.
    fn write(&self, offset: u64, data: &[u8]);
}

struct Entry {
    length: u64,
    device: Arc<dyn BusDevice>,
}

/// Why a range could not be added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("bus range {base:#x}+{length:#x} is empty, wraps or overlaps another")]
pub struct RangeError {
    base: u64,
    length: u64,
}

/// One address space.
#[derive(Default)]
pub struct Bus {
    ranges: BTreeMap<u64, Entry>,
}

impl Bus {
    /// Puts `device` at `base..base + length`.
    pub fn insert(
        &mut self,
        base: u64,
        length: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), RangeError> {
        let error = RangeError { base, length };
        let end = base.checked_add(length).ok_or(error)?;
        let overlaps = self
            .ranges
            .range(..end)
            .next_back()
            .is_some_and(|(start, entry)| start + entry.length > base);
        if length == 0 || overlaps {
            return Err(error);
        }
        self.ranges.insert(base, Entry { length, device });
        Ok(())
    }

    fn find(&self, address: u64) -> Option<(&dyn BusDevice, u64)> {
        let (base, entry) = self.ranges.range(..=address).next_back()?;
        let offset = address - base;
        (offset < entry.length).then_some((entry.device.as_ref(), offset))
    }

    /// Reads; all ones where there is no device, as on a real bus.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((device, offset)) => {
                data.fill(0);
                device.read(offset, data);
            }
            None => data.fill(0xff),
        }
    }

    /// Writes; lost where there is no device.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address) {
            device.write(offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Memory(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Memory {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn accesses_reach_the_device_that_covers_them() {
        let device = Arc::new(Memory::default());
        let mut bus = Bus::default();
        bus.insert(0x100, 0x10, device.clone()).unwrap();
        let mut data = [0; 2];
        bus.read(0x10f, &mut data);
        assert_eq!(data, [0xf, 0xf]);
        bus.read(0x110, &mut data);
        assert_eq!(data, [0xff, 0xff]);
        bus.read(0xff, &mut data);
        assert_eq!(data, [0xff, 0xff]);
        bus.write(0x104, &[7]);
        bus.write(0x200, &[8]);
        assert_eq!(*device.0.lock().unwrap(), vec![(4, vec![7])]);
    }

    #[test]
    fn overlaps_are_refused() {
        let mut bus = Bus::default();
        bus.insert(0x100, 0x10, Arc::new(Memory::default()))
            .unwrap();
        for (base, length) in [
            (0x100, 1),
            (0xf8, 9),
            (0x10f, 1),
            (0x0, 0x1000),
            (5, 0),
            (u64::MAX, 2),
        ] {
            assert!(bus
                .insert(base, length, Arc::new(Memory::default()))
                .is_err());
        }
        bus.insert(0xf8, 8, Arc::new(Memory::default())).unwrap();
        bus.insert(0x110, 8, Arc::new(Memory::default())).unwrap();
    }
}
