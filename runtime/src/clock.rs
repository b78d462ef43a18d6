// SPDX-License-Identifier: Apache-2.0
//! The clocks that stamps are taken from.

use rustix::time::{clock_gettime, ClockId};

/// CLOCK_MONOTONIC in microseconds: the same clock in every process of the
/// host.
pub fn monotonic_us() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let micros = u64::try_from(now.tv_nsec).unwrap_or(0) / 1000;
    seconds * 1_000_000 + micros
}

/// The wall clock in nanoseconds since the epoch; 0 before it.
pub fn realtime_ns() -> i64 {
    let now = clock_gettime(ClockId::Realtime);
    now.tv_sec
        .saturating_mul(1_000_000_000)
        .saturating_add(now.tv_nsec)
        .max(0)
}
