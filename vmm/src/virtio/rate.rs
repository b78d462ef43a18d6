// SPDX-License-Identifier: Apache-2.0
//! Rate limits: buckets of tokens that fill steadily. A request is let through
//! while every bucket has a token left, and takes what it turns out to need, so
//! that a bucket may be in debt by one request; the next one waits until that is
//! paid.

use std::time::{Duration, Instant};

use bulkhead_vmm_api::{Rate, RateLimits};

/// One bucket. Counts parts of a token, a billion of which make one, so that no
/// time is lost to rounding.
#[derive(Debug, Clone)]
struct Bucket {
    rate: Rate,
    /// Below zero: debt.
    level: i128,
}

const PARTS: i128 = 1_000_000_000;

impl Bucket {
    fn new(rate: Rate) -> Self {
        Self {
            rate,
            level: i128::from(rate.burst) * PARTS,
        }
    }

    fn fill(&mut self, passed: Duration) {
        // Tokens in a second are as many parts in a nanosecond.
        let passed = i128::try_from(passed.as_nanos()).unwrap_or(i128::MAX);
        let more = passed.saturating_mul(i128::from(self.rate.per_second));
        let most = i128::from(self.rate.burst) * PARTS;
        self.level = self.level.saturating_add(more).min(most);
    }

    fn take(&mut self, tokens: u64) {
        self.level = self.level.saturating_sub(i128::from(tokens) * PARTS);
    }

    /// How long until there is a token; zero: there is one.
    fn wait(&self) -> Duration {
        let short = PARTS - self.level;
        if short <= 0 {
            return Duration::ZERO;
        }
        let per_second = i128::from(self.rate.per_second).max(1);
        let nanoseconds = (short + per_second - 1) / per_second;
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }
}

/// Both limits of a device.
#[derive(Debug, Clone)]
pub struct Limiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
    filled: Instant,
}

impl Limiter {
    /// Full buckets at `now`.
    pub fn new(limits: RateLimits, now: Instant) -> Self {
        Self {
            bytes: limits.bytes.map(Bucket::new),
            operations: limits.operations.map(Bucket::new),
            filled: now,
        }
    }

    /// How long the next request must wait; zero: not at all.
    pub fn wait(&mut self, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.filled);
        self.filled = self.filled.max(now);
        let mut longest = Duration::ZERO;
        for bucket in [&mut self.bytes, &mut self.operations]
            .into_iter()
            .flatten()
        {
            bucket.fill(passed);
            longest = longest.max(bucket.wait());
        }
        longest
    }

    /// A request was let through that moved so many bytes.
    pub fn take(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.take(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limits(bytes: (u64, u64), operations: (u64, u64)) -> RateLimits {
        let rate = |(per_second, burst)| Some(Rate { per_second, burst });
        RateLimits {
            bytes: rate(bytes),
            operations: rate(operations),
        }
    }

    #[test]
    fn a_bucket_is_full_at_first_and_fills_steadily() {
        let start = Instant::now();
        let mut limiter = Limiter::new(limits((1000, 500), (1 << 40, 1 << 40)), start);
        assert_eq!(limiter.wait(start), Duration::ZERO);
        limiter.take(500);
        assert_eq!(limiter.wait(start), Duration::from_millis(1));
        let later = start + Duration::from_millis(1);
        assert_eq!(limiter.wait(later), Duration::ZERO);
        // In debt, by as much as one request is large.
        limiter.take(2001);
        assert_eq!(limiter.wait(later), Duration::from_millis(2001));
        let rested = later + Duration::from_secs(3600);
        assert_eq!(limiter.wait(rested), Duration::ZERO);
        limiter.take(500);
        assert!(limiter.wait(rested) > Duration::ZERO);
    }

    #[test]
    fn time_that_goes_back_is_no_time() {
        let start = Instant::now() + Duration::from_secs(10);
        let mut limiter = Limiter::new(limits((1, 1), (1, 1)), start);
        limiter.take(1);
        let earlier = start.checked_sub(Duration::from_secs(5)).unwrap();
        assert_eq!(limiter.wait(earlier), Duration::from_secs(1));
        assert_eq!(limiter.wait(start), Duration::from_secs(1));
    }

    proptest! {
        /// Whatever is asked for and when: no more is let through than the
        /// bucket held, what came since, and one request; and whoever waits as
        /// long as told is let through.
        #[test]
        fn the_rate_is_kept(
            bytes in (1_u64..1 << 30, 1_u64..1 << 30),
            operations in (1_u64..10_000, 1_u64..10_000),
            requests in prop::collection::vec((0_u64..1 << 24, 0_u64..50_000_000), 1..200),
        ) {
            let start = Instant::now();
            let mut now = start;
            let mut limiter = Limiter::new(limits(bytes, operations), start);
            let (mut moved, mut done) = (0_u128, 0_u128);
            for (size, pause) in requests {
                now += Duration::from_nanos(pause);
                let wait = limiter.wait(now);
                now += wait;
                prop_assert_eq!(limiter.wait(now), Duration::ZERO);
                limiter.take(size);
                moved += u128::from(size);
                done += 1;
                let passed = (now - start).as_nanos();
                let allowed = |(rate, burst): (u64, u64)| {
                    u128::from(burst) + u128::from(rate) * passed / 1_000_000_000
                };
                prop_assert!(moved <= allowed(bytes) + u128::from(size));
                prop_assert!(done <= allowed(operations) + 1);
            }
        }
    }
}
