// SPDX-License-Identifier: Apache-2.0
//! The rate of the processor's time-stamp counter.
//!
//! An emulated processor shows this machine's counter, and the kernel in the
//! box would measure its rate against an emulated timer. On a busy machine that
//! measurement has been seen to be wrong by a factor of three, and with it
//! every clock and every time limit in the box. So the kernel is told the rate.

use std::thread;
use std::time::{Duration, Instant};

use crate::sys;

/// Long enough for a rate that is right to a thousandth.
const BASE: Duration = Duration::from_millis(30);

/// A reading that took longer was interrupted and is taken again.
const QUICK: Duration = Duration::from_micros(10);

/// Readings tried; the best one is taken where none is quick.
const TRIES: usize = 100;

/// The rate in kHz. Takes some 30 ms.
pub fn khz() -> u64 {
    let (begin, from) = reading();
    thread::sleep(BASE);
    let (end, to) = reading();
    let ticks = u128::from(to.wrapping_sub(from));
    let nanoseconds = (end - begin).as_nanos().max(1);
    u64::try_from(ticks * 1_000_000 / nanoseconds).unwrap_or(u64::MAX)
}

/// A time and the counter at that time.
fn reading() -> (Instant, u64) {
    let mut best: Option<(Duration, (Instant, u64))> = None;
    for _ in 0..TRIES {
        let before = Instant::now();
        let counter = sys::time_stamp_counter();
        let took = before.elapsed();
        if best.is_none_or(|(least, _)| took < least) {
            best = Some((took, (before + took / 2, counter)));
        }
        if took < QUICK {
            break;
        }
    }
    // `TRIES` is not zero.
    best.map_or_else(|| (Instant::now(), sys::time_stamp_counter()), |(_, it)| it)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_the_same_twice() {
        let (one, two) = (khz(), khz());
        assert!(one > 100_000, "{one} kHz");
        assert!(one.abs_diff(two) < one / 100, "{one} and {two} kHz");
    }
}
