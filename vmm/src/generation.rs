// SPDX-License-Identifier: Apache-2.0
//! The VM generation id ("Virtual Machine Generation ID", Microsoft 2012): 128
//! random bits that are others in every machine made from a snapshot. The
//! guest's kernel is interrupted, reads them, and reseeds its random numbers.
//!
//! They lie in a page of registers, not in memory, so that the VMM sees when
//! the guest has read them.

use std::{
    io,
    sync::atomic::{AtomicBool, Ordering},
};

use crate::{bus::BusDevice, random, virtio::device::read_bytes};

/// Bytes of an id.
const SIZE: usize = 16;

/// A machine's id. Its life long it is the same.
pub struct GenerationId {
    id: [u8; SIZE],
    read: AtomicBool,
    on_read: Box<dyn Fn() + Send + Sync>,
}

impl GenerationId {
    /// A new id. `on_read` is called once, on the vCPU's thread, when the guest
    /// reads it for the first time.
    ///
    /// # Errors
    /// The host's kernel gives no random bytes.
    pub fn new(on_read: impl Fn() + Send + Sync + 'static) -> io::Result<Self> {
        let mut id = [0; SIZE];
        random::fill(&mut id)?;
        Ok(Self {
            id,
            read: AtomicBool::new(false),
            on_read: Box::new(on_read),
        })
    }
}

impl BusDevice for GenerationId {
    fn read(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.id, offset, data);
        if offset < SIZE as u64 && !self.read.swap(true, Ordering::Relaxed) {
            (self.on_read)();
        }
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use std::sync::{atomic::AtomicUsize, Arc};

    use super::*;

    fn bytes_of(id: &GenerationId) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        // As the guest's kernel reads it: by two words.
        id.read(0, &mut bytes[..8]);
        id.read(8, &mut bytes[8..]);
        bytes
    }

    #[test]
    fn every_machine_has_another_and_its_first_reading_is_told() {
        let readings = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&readings);
        let id = GenerationId::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        })
        .unwrap();
        let mut beyond = [1; 8];
        id.read(0x800, &mut beyond);
        assert_eq!(beyond, [0; 8]);
        assert_eq!(readings.load(Ordering::Relaxed), 0);
        id.write(0, &[0; SIZE]);
        let first = bytes_of(&id);
        assert_eq!(bytes_of(&id), first);
        assert_eq!(readings.load(Ordering::Relaxed), 1);
        assert_ne!(bytes_of(&GenerationId::new(|| {}).unwrap()), first);
    }
}
