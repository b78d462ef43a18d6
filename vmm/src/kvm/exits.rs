// SPDX-License-Identifier: Apache-2.0
//! What vCPUs leave the guest for, counted.

use std::sync::atomic::{AtomicU64, Ordering};

use bulkhead_vmm_api::Exits;
use kvm_ioctls::{Error, VcpuExit};

/// Counters of the exits of a vCPU that came to user space.
#[derive(Debug, Default)]
pub struct ExitCounters {
    pio: AtomicU64,
    mmio: AtomicU64,
    interrupted: AtomicU64,
    again: AtomicU64,
    halts: AtomicU64,
    irq_windows: AtomicU64,
    shutdowns: AtomicU64,
    system_events: AtomicU64,
    failed_entries: AtomicU64,
    internal_errors: AtomicU64,
    errors: AtomicU64,
    other: AtomicU64,
}

impl ExitCounters {
    /// Counts what KVM_RUN said.
    pub fn count(&self, exit: &Result<VcpuExit<'_>, Error>) {
        let counter = match exit {
            Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => &self.pio,
            Ok(VcpuExit::MmioRead(..) | VcpuExit::MmioWrite(..)) => &self.mmio,
            Ok(VcpuExit::Intr) => &self.interrupted,
            Ok(VcpuExit::Hlt) => &self.halts,
            Ok(VcpuExit::IrqWindowOpen) => &self.irq_windows,
            Ok(VcpuExit::Shutdown) => &self.shutdowns,
            Ok(VcpuExit::SystemEvent(..)) => &self.system_events,
            Ok(VcpuExit::FailEntry(..)) => &self.failed_entries,
            Ok(VcpuExit::InternalError) => &self.internal_errors,
            Ok(_) => &self.other,
            Err(error) => match error.errno() {
                libc::EINTR => &self.interrupted,
                libc::EAGAIN => &self.again,
                _ => &self.errors,
            },
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// The figures now.
    pub fn read(&self) -> Exits {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Exits {
            pio: get(&self.pio),
            mmio: get(&self.mmio),
            interrupted: get(&self.interrupted),
            again: get(&self.again),
            halts: get(&self.halts),
            irq_windows: get(&self.irq_windows),
            shutdowns: get(&self.shutdowns),
            system_events: get(&self.system_events),
            failed_entries: get(&self.failed_entries),
            internal_errors: get(&self.internal_errors),
            errors: get(&self.errors),
            other: get(&self.other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_exit_has_its_counter() {
        let counters = ExitCounters::default();
        let mut bytes = [0; 1];
        counters.count(&Ok(VcpuExit::IoIn(1, &mut bytes)));
        counters.count(&Ok(VcpuExit::IoOut(1, &[0])));
        counters.count(&Ok(VcpuExit::MmioRead(1, &mut [0])));
        counters.count(&Ok(VcpuExit::MmioWrite(1, &[0])));
        for _ in 0..3 {
            counters.count(&Ok(VcpuExit::Intr));
            counters.count(&Err(Error::new(libc::EINTR)));
        }
        for _ in 0..3 {
            counters.count(&Err(Error::new(libc::EAGAIN)));
        }
        for (times, errno) in [(4, libc::EFAULT), (5, libc::EINVAL)] {
            (0..times).for_each(|_| counters.count(&Err(Error::new(errno))));
        }
        let more: [(u64, fn() -> VcpuExit<'static>); 7] = [
            (10, || VcpuExit::Hlt),
            (11, || VcpuExit::IrqWindowOpen),
            (12, || VcpuExit::Shutdown),
            (13, || VcpuExit::SystemEvent(1, &[])),
            (14, || VcpuExit::FailEntry(1, 1)),
            (15, || VcpuExit::InternalError),
            (16, || VcpuExit::Unknown),
        ];
        for (times, exit) in more {
            (0..times).for_each(|_| counters.count(&Ok(exit())));
        }
        let expected = Exits {
            pio: 2,
            mmio: 2,
            interrupted: 6,
            again: 3,
            errors: 9,
            halts: 10,
            irq_windows: 11,
            shutdowns: 12,
            system_events: 13,
            failed_entries: 14,
            internal_errors: 15,
            other: 16,
        };
        assert_eq!(counters.read(), expected);
        // Of two vCPUs together.
        let twice: Exits = [expected; 2].into_iter().sum();
        assert_eq!((twice.pio, twice.other, twice.errors), (4, 32, 18));
    }
}
