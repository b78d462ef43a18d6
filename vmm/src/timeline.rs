// SPDX-License-Identifier: Apache-2.0
//! When things happened.

use std::sync::{
    atomic::{AtomicU64, Ordering},
    Arc,
};

use bulkhead_vmm_api::Timeline;

/// CLOCK_MONOTONIC in microseconds.
pub fn now() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to a `timespec` of ours; the clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000 + time.tv_nsec as u64 / 1000
}

/// Stamps, set once each, from any thread.
#[derive(Debug, Default)]
pub struct Stamps {
    vmm_start: AtomicU64,
    configured: AtomicU64,
    jailed: AtomicU64,
    memory_mapped: AtomicU64,
    assembled: AtomicU64,
    restored: AtomicU64,
    kernel_entry: AtomicU64,
    guest_ready: AtomicU64,
    generation_read: AtomicU64,
}

/// What can be stamped.
#[derive(Debug, Clone, Copy)]
pub enum Moment {
    /// `main` was entered.
    VmmStart,
    /// The configuration was accepted.
    Configured,
    /// The jail was entered.
    Jailed,
    /// Guest memory is there.
    MemoryMapped,
    /// So are vCPUs and devices.
    Assembled,
    /// They have the snapshot's state.
    Restored,
    /// Before the first KVM_RUN.
    KernelEntry,
    /// First connection to the ready port.
    GuestReady,
    /// The guest read its generation id.
    GenerationRead,
}

impl Stamps {
    /// No stamps yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    fn cell(&self, moment: Moment) -> &AtomicU64 {
        match moment {
            Moment::VmmStart => &self.vmm_start,
            Moment::Configured => &self.configured,
            Moment::Jailed => &self.jailed,
            Moment::MemoryMapped => &self.memory_mapped,
            Moment::Assembled => &self.assembled,
            Moment::Restored => &self.restored,
            Moment::KernelEntry => &self.kernel_entry,
            Moment::GuestReady => &self.guest_ready,
            Moment::GenerationRead => &self.generation_read,
        }
    }

    /// Stamps the moment with the time now; whether it was the first time.
    pub fn set(&self, moment: Moment) -> bool {
        self.cell(moment)
            .compare_exchange(0, now(), Ordering::Relaxed, Ordering::Relaxed)
            .is_ok()
    }

    /// All stamps as the API has them.
    pub fn read(&self) -> Timeline {
        let get = |moment| match self.cell(moment).load(Ordering::Relaxed) {
            0 => None,
            stamp => Some(stamp),
        };
        Timeline {
            vmm_start: get(Moment::VmmStart),
            configured: get(Moment::Configured),
            jailed: get(Moment::Jailed),
            memory_mapped: get(Moment::MemoryMapped),
            assembled: get(Moment::Assembled),
            restored: get(Moment::Restored),
            kernel_entry: get(Moment::KernelEntry),
            guest_ready: get(Moment::GuestReady),
            generation_read: get(Moment::GenerationRead),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_stamped_once() {
        let stamps = Stamps::new();
        assert_eq!(stamps.read(), Timeline::default());
        assert!(stamps.set(Moment::GuestReady));
        let first = stamps.read();
        assert!(!stamps.set(Moment::GuestReady));
        assert_eq!(stamps.read(), first);
        assert!(first.guest_ready.is_some_and(|stamp| stamp <= now()));
    }
}
