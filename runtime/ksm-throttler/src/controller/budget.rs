// SPDX-License-Identifier: Apache-2.0
//! The bound on ksmd's processor time, and what a page costs.

use std::time::Duration;

/// Part of the bound that a batch is sized for, with nothing saved up and with
/// as much as can be: in between it settles where all of the bound is used.
const AIM: (f64, f64) = (0.85, 1.05);

/// What looking at a page is taken to cost at first, in seconds. Hardware takes
/// a tenth; beginning slowly costs a few steps.
const FIRST_PAGE_SECONDS: f64 = 10e-6;

/// No page costs less, in seconds: reading it takes that long.
const LEAST_PAGE_SECONDS: f64 = 0.1e-6;

/// How much of a lower cost is believed in one step; a higher one is at once.
const BELIEF: f64 = 0.2;

/// Processor time that may be used, as time earns it.
#[derive(Debug)]
pub(super) struct Budget {
    share: f64,
    /// Seconds of processor time; negative: a debt.
    saved: f64,
    /// Most that is saved up, in seconds.
    most: f64,
    page_seconds: f64,
    /// Until when time has been counted.
    at: Option<Duration>,
}

impl Budget {
    /// `share` of a processor, steps `tick` seconds apart.
    pub(super) fn new(share: f64, tick: f64) -> Self {
        Self {
            share,
            saved: 0.0,
            most: share * tick,
            page_seconds: FIRST_PAGE_SECONDS,
            at: None,
        }
    }

    /// Counts the time until `now` in which ksmd has used nothing.
    pub(super) fn rest_until(&mut self, now: Duration) {
        if let Some(at) = self.at.replace(now) {
            self.earn(now.saturating_sub(at));
        }
    }

    fn earn(&mut self, elapsed: Duration) {
        self.saved = (self.saved + elapsed.as_secs_f64() * self.share).min(self.most);
    }

    /// In `elapsed`, ksmd has used `cpu`; `batch` pages at a time, if it was
    /// scanning.
    pub(super) fn spend(&mut self, elapsed: Duration, cpu: Duration, batch: Option<u64>) {
        self.at = self.at.map(|at| at.saturating_add(elapsed));
        // Paid first: what is earned beyond the most would be lost otherwise.
        self.saved -= cpu.as_secs_f64();
        self.earn(elapsed);
        let (Some(batch), true) = (batch, elapsed > Duration::ZERO) else {
            return;
        };
        // A batch takes `batch * page`, then ksmd sleeps: solved for `page`.
        let share = (cpu.as_secs_f64() / elapsed.as_secs_f64()).min(0.95);
        let sleep = f64::from(super::SLEEP_MS) / 1000.0;
        let seen = sleep * share / ((1.0 - share) * (batch.max(1) as f64));
        let believed = if seen > self.page_seconds {
            seen
        } else {
            self.page_seconds + (seen - self.page_seconds) * BELIEF
        };
        self.page_seconds = believed.max(LEAST_PAGE_SECONDS);
    }

    /// What looking at a page costs, in seconds.
    pub(super) fn page_seconds(&self) -> f64 {
        self.page_seconds
    }

    /// Whether ksmd must stand still. Once it does, until half of what can be
    /// saved up is.
    pub(super) fn in_debt(&self, already: bool) -> bool {
        if already {
            self.saved < self.most / 2.0
        } else {
            self.saved < 0.0
        }
    }

    /// Most pages of a batch, `sleep` seconds apart.
    pub(super) fn batch(&self, sleep: f64) -> f64 {
        let aim = AIM.0 + (AIM.1 - AIM.0) * (self.saved / self.most).clamp(0.0, 1.0);
        // Of the whole processor a little is left, or a batch would never end.
        let share = (self.share * aim).min(0.95);
        sleep * share / ((1.0 - share) * self.page_seconds)
    }
}
