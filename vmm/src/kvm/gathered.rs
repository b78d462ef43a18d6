// SPDX-License-Identifier: Apache-2.0
//! Writes that KVM gathers (Documentation/virt/kvm/api.rst,
//! `KVM_REGISTER_COALESCED_MMIO`): a guest's writes to registers that do nothing
//! until another is accessed do not leave the guest, but go to a ring, of which
//! KVM fills no more than there is room for. Before anybody looks at what they
//! change, they are made up for: before each access that does leave the guest,
//! and whenever the guest rests.

use std::{
    io,
    os::fd::AsRawFd,
    ptr::NonNull,
    sync::{
        atomic::{AtomicU32, Ordering},
        Mutex,
    },
};

use kvm_bindings::{kvm_coalesced_mmio, kvm_coalesced_mmio_ring, KVM_COALESCED_MMIO_PAGE_OFFSET};
use kvm_ioctls::VcpuFd;

/// Bytes of the ring's mapping.
const SIZE: usize = 4096;
/// Entries that it has; one of them is never used.
const ENTRIES: u32 =
    ((SIZE - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>()) as u32;

/// The ring, which is the machine's.
pub struct Gathered {
    ring: NonNull<kvm_coalesced_mmio_ring>,
    /// Held until the writes that were taken have been made up for.
    turn: Mutex<()>,
}

// SAFETY: the mapping belongs to no thread; its indices are accessed as atomics,
// and its entries by who has the turn.
unsafe impl Send for Gathered {}
// SAFETY: as above.
unsafe impl Sync for Gathered {}

impl Gathered {
    /// Maps the ring of the machine of which that is a vCPU.
    ///
    /// # Errors
    /// It has none.
    pub fn map(vcpu: &VcpuFd) -> io::Result<Self> {
        let offset = KVM_COALESCED_MMIO_PAGE_OFFSET as usize * SIZE;
        // SAFETY: a new mapping of a page that KVM keeps as long as it is mapped.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                offset as libc::off_t,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let ring = NonNull::new(address.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self {
            ring,
            turn: Mutex::new(()),
        })
    }

    /// Makes up for what was written until now: `write` gets, in their order,
    /// whether it was to a port, where, and what.
    pub fn drain(&self, mut write: impl FnMut(bool, u64, &[u8])) {
        if self.is_empty() {
            return;
        }
        let turn = self.turn.lock().expect("no holder of the turn panics");
        // Others may go on writing; what was there is in one round of the ring.
        for _ in 0..ENTRIES {
            let Some((at, entry)) = self.next() else {
                break;
            };
            let length = (entry.len as usize).min(entry.data.len());
            // SAFETY: both of the union's members are the same integer.
            let port = unsafe { entry.__bindgen_anon_1.pio } != 0;
            write(port, entry.phys_addr, &entry.data[..length]);
            // Only now: who finds the ring empty relies on it.
            self.first().store((at + 1) % ENTRIES, Ordering::Release);
        }
        drop(turn);
    }

    fn is_empty(&self) -> bool {
        self.first().load(Ordering::Acquire) == self.last().load(Ordering::Acquire)
    }

    /// The oldest entry, with its index.
    fn next(&self) -> Option<(u32, kvm_coalesced_mmio)> {
        let first = self.first().load(Ordering::Acquire);
        if first == self.last().load(Ordering::Acquire) || first >= ENTRIES {
            return None;
        }
        // SAFETY: the entry lies in the mapping; KVM has written it before it
        // moved `last`, and does not again before `first` has passed it.
        let entry = unsafe {
            let entries = &raw const (*self.ring.as_ptr()).coalesced_mmio;
            let entries = entries.cast::<kvm_coalesced_mmio>();
            entries.add(first as usize).read_volatile()
        };
        Some((first, entry))
    }

    /// Index of the oldest entry: this process's.
    fn first(&self) -> &AtomicU32 {
        // SAFETY: the field lies in the mapping and is aligned; nobody accesses it
        // but as an atomic, or from the kernel.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.ring.as_ptr()).first) }
    }

    /// Index after the newest: KVM's.
    fn last(&self) -> &AtomicU32 {
        // SAFETY: as above.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.ring.as_ptr()).last) }
    }
}

impl Drop for Gathered {
    fn drop(&mut self) {
        // SAFETY: the mapping is this object's, and nothing refers to it any more.
        unsafe { libc::munmap(self.ring.as_ptr().cast(), SIZE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A ring that no KVM fills.
    fn ring() -> Gathered {
        // SAFETY: a new mapping of memory that is nobody else's.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(address, libc::MAP_FAILED);
        Gathered {
            ring: NonNull::new(address.cast()).unwrap(),
            turn: Mutex::new(()),
        }
    }

    /// Adds an entry, as KVM does.
    fn put(ring: &Gathered, address: u64, data: &[u8]) {
        let last = ring.last().load(Ordering::Acquire);
        let mut entry = kvm_coalesced_mmio {
            phys_addr: address,
            len: data.len() as u32,
            ..Default::default()
        };
        entry.data[..data.len()].copy_from_slice(data);
        // SAFETY: an entry of the mapping.
        unsafe {
            let entries = &raw mut (*ring.ring.as_ptr()).coalesced_mmio;
            entries
                .cast::<kvm_coalesced_mmio>()
                .add(last as usize)
                .write(entry);
        }
        ring.last().store((last + 1) % ENTRIES, Ordering::Release);
    }

    fn taken(ring: &Gathered) -> Vec<(bool, u64, Vec<u8>)> {
        let mut taken = Vec::new();
        ring.drain(|port, address, data| taken.push((port, address, data.to_vec())));
        taken
    }

    #[test]
    fn writes_come_once_and_in_their_order_all_round_the_ring() {
        let ring = ring();
        assert!(taken(&ring).is_empty());
        for round in 0..5 {
            // As many as fit.
            for index in 0..u64::from(ENTRIES - 1) {
                put(&ring, round + index, &[7; 8][..(index % 9) as usize]);
            }
            let taken = taken(&ring);
            assert_eq!(taken.len(), ENTRIES as usize - 1);
            for (index, (port, address, data)) in (0..).zip(taken) {
                assert_eq!((port, address), (false, round + index));
                assert_eq!(data.len() as u64, index % 9);
            }
        }
        assert!(taken(&ring).is_empty());
    }

    #[test]
    fn nobody_finds_the_ring_empty_before_all_is_made_up_for() {
        let ring = ring();
        for address in 0..3 {
            put(&ring, address, &[0]);
        }
        let mut seen = 0;
        ring.drain(|_, address, _| {
            assert!(!ring.is_empty());
            assert_eq!(ring.first().load(Ordering::Acquire), address as u32);
            seen += 1;
        });
        assert!(ring.is_empty());
        assert_eq!(seen, 3);
    }

    #[test]
    fn a_ring_that_makes_no_sense_ends_all_the_same() {
        let ring = ring();
        for (first, last) in [(ENTRIES, 0), (u32::MAX, 5), (0, u32::MAX)] {
            ring.first().store(first, Ordering::Release);
            ring.last().store(last, Ordering::Release);
            assert!(taken(&ring).len() <= ENTRIES as usize);
        }
    }
}
