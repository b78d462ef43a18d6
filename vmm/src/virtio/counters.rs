// SPDX-License-Identifier: Apache-2.0
//! What a device has done so far. Counted by whoever does it, and read without
//! the device's lock: one that is held up tells, too.

use std::sync::atomic::{AtomicU64, Ordering};

use bulkhead_vmm_api::DeviceMetrics;

/// A device's counters, which outlast resets.
#[derive(Debug, Default)]
pub struct Counters {
    requests: AtomicU64,
    from_guest: AtomicU64,
    to_guest: AtomicU64,
    errors: AtomicU64,
    throttled: AtomicU64,
    notifications: AtomicU64,
    interrupts: AtomicU64,
}

fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

impl Counters {
    /// So many requests or packets.
    pub fn requests(&self, count: u64) {
        add(&self.requests, count);
    }

    /// Bytes of data that the guest gave.
    pub fn from_guest(&self, bytes: u64) {
        add(&self.from_guest, bytes);
    }

    /// Bytes of data that it got.
    pub fn to_guest(&self, bytes: u64) {
        add(&self.to_guest, bytes);
    }

    /// A request that failed, or a packet that was lost.
    pub fn error(&self) {
        add(&self.errors, 1);
    }

    /// A request that had to wait for the device's limits.
    pub fn throttled(&self) {
        add(&self.throttled, 1);
    }

    /// The guest told of something in a queue.
    pub fn notification(&self) {
        add(&self.notifications, 1);
    }

    /// The guest was told.
    pub fn interrupt(&self) {
        add(&self.interrupts, 1);
    }

    /// The figures now.
    pub fn read(&self) -> DeviceMetrics {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DeviceMetrics {
            requests: load(&self.requests),
            bytes_from_guest: load(&self.from_guest),
            bytes_to_guest: load(&self.to_guest),
            errors: load(&self.errors),
            throttled: load(&self.throttled),
            notifications: load(&self.notifications),
            interrupts: load(&self.interrupts),
        }
    }
}
