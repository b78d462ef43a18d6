// SPDX-License-Identifier: Apache-2.0
//! The start timeline: when each step of a pod's start happened, logged as
//! one line once the first container has written something, or has ended, and
//! sent to a collector of [spans] where there is one.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{clock::monotonic_us, operator::Start, spans};

/// Stamps of CLOCK_MONOTONIC in microseconds.
#[derive(Debug)]
pub struct Timeline {
    shim_start: u64,
    stamps: Mutex<Stamps>,
}

#[derive(Debug, Default)]
struct Stamps {
    agent_ready: Option<u64>,
    sandbox_ready: Option<u64>,
    container_started: Option<u64>,
    first_output: Option<u64>,
    logged: bool,
}

/// Milliseconds since a zero, in the log.
fn since(zero: u64, stamp: Option<u64>) -> String {
    match stamp {
        Some(stamp) => {
            let micros = stamp.saturating_sub(zero);
            format!("{}.{:03}", micros / 1000, micros % 1000)
        }
        None => "none".into(),
    }
}

impl Timeline {
    /// Starts at `shim_start`.
    pub fn new(shim_start: u64) -> Self {
        Self {
            shim_start,
            stamps: Mutex::default(),
        }
    }

    fn stamps(&self) -> MutexGuard<'_, Stamps> {
        self.stamps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest's agent has called.
    pub fn agent_ready(&self) {
        self.stamps().agent_ready.get_or_insert_with(monotonic_us);
    }

    /// The guest is set up.
    pub fn sandbox_ready(&self) {
        self.stamps().sandbox_ready.get_or_insert_with(monotonic_us);
    }

    /// A container's program runs.
    pub fn container_started(&self) {
        let mut stamps = self.stamps();
        stamps.container_started.get_or_insert_with(monotonic_us);
    }

    /// All that is known so far; `vm` is what the VMM knows.
    pub fn start(&self, vm: bulkhead_vmm_api::Timeline) -> Start {
        let stamps = self.stamps();
        let ms = |stamp: Option<u64>| {
            stamp.map(|stamp| stamp.saturating_sub(self.shim_start) as f64 / 1000.0)
        };
        Start {
            vmm_start_ms: ms(vm.vmm_start),
            kernel_entry_ms: ms(vm.kernel_entry),
            agent_ready_ms: ms(stamps.agent_ready),
            sandbox_ready_ms: ms(stamps.sandbox_ready),
            container_started_ms: ms(stamps.container_started),
            first_output_ms: ms(stamps.first_output),
        }
    }

    /// A container has written its first byte, or has ended; `vm` is what the
    /// VMM knows. Logs once.
    pub fn first_output(&self, sandbox: &str, vm: bulkhead_vmm_api::Timeline) {
        let now = monotonic_us();
        let mut stamps = self.stamps();
        // The output may be faster than the answer to the start.
        stamps.container_started.get_or_insert(now);
        stamps.first_output.get_or_insert(now);
        if std::mem::replace(&mut stamps.logged, true) {
            return;
        }
        let zero = self.shim_start;
        tracing::info!(
            sandbox,
            shim_start = since(zero, Some(zero)),
            vmm_start = since(zero, vm.vmm_start),
            kernel_entry = since(zero, vm.kernel_entry),
            agent_ready = since(zero, stamps.agent_ready),
            sandbox_ready = since(zero, stamps.sandbox_ready),
            container_started = since(zero, stamps.container_started),
            first_output = since(zero, Some(now)),
            "start timeline"
        );
        let steps = [
            ("start.shim", vm.vmm_start),
            ("start.vmm", vm.kernel_entry),
            ("start.guest", stamps.agent_ready),
            ("start.sandbox", stamps.sandbox_ready),
            ("start.container", stamps.container_started),
            ("start.output", stamps.first_output),
        ];
        drop(stamps);
        spans::start(zero, &steps);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_are_told_in_milliseconds() {
        assert_eq!(since(1_000_000, Some(1_012_345)), "12.345");
        assert_eq!(since(1_000_000, Some(1_000_007)), "0.007");
        assert_eq!(since(5, None), "none");
    }

    #[test]
    fn what_is_known_is_told() {
        let timeline = Timeline::new(monotonic_us());
        timeline.agent_ready();
        let start = timeline.start(bulkhead_vmm_api::Timeline::default());
        assert!(start.agent_ready_ms.is_some_and(|ms| ms < 60_000.0));
        assert_eq!(start.first_output_ms, None);
        timeline.first_output("x", bulkhead_vmm_api::Timeline::default());
        let start = timeline.start(bulkhead_vmm_api::Timeline::default());
        assert!(start.first_output_ms.is_some() && start.container_started_ms.is_some());
    }
}
