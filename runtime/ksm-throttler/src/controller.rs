// SPDX-License-Identifier: Apache-2.0
//! When KSM is to scan and how fast. Pure: [`Controller::step`] is told the
//! figures and gives a decision; it looks at nothing and changes nothing.
//!
//! A kick begins a *run*. What counts in it is profit: pages newly saved per
//! second of ksmd's processor time, taken over each full scan.
//!
//! * A page merges at the earliest in the second full scan that sees it (the
//!   first takes its checksum), and memory that becomes mergeable during a scan
//!   is seen by the next one. So the scan under way at a kick counts for
//!   nothing, and the run ends after [`BARREN_SCANS`] full scans in a row
//!   without gain.
//! * One scan of everything is spread over a second: faster, it would take
//!   memory for settled that a starting guest is still writing. It takes longer
//!   once merging pays less.
//! * The batch is what that needs for the memory KSM knows to be mergeable, and
//!   no more than the bound on processor time allows at the cost a page was
//!   seen to have. What is used beyond the bound, because pages suddenly cost
//!   more, is a debt: ksmd stands still until time has paid it.

mod budget;
#[cfg(test)]
mod simulated;
#[cfg(test)]
mod tests;

use std::time::Duration;

use self::budget::Budget;
use crate::sysfs::Counters;

/// Full scans in a row without gain that end a run.
pub const BARREN_SCANS: u64 = 2;

/// How long ksmd sleeps between batches, in milliseconds: a quarter of the
/// kernel's default, so that batches stay short where the bound is high.
pub const SLEEP_MS: u32 = 5;

/// How long a run lasts in which ksmd does nothing at all, because no memory is
/// mergeable or because somebody else has stopped it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Pages taken for mergeable for each kick, beside those known, until a full
/// scan has counted them: 64 MiB, about one small pod.
const UNCOUNTED_PAGES: f64 = 16_384.0;

/// How many more are taken for mergeable until then for each that is new: of
/// many pods that start at once each has to be seen before any merges.
const UNCOUNTED_MORE: f64 = 3.0;

/// Fewest pages in a batch: fewer are not worth the waking.
const BATCH_MIN: f64 = 16.0;

/// Longest batch: whoever writes to `run` waits for the batch to end.
const BATCH_SECONDS: f64 = 0.1;

/// The batch stays as it is until it should be this much larger or smaller.
const UNCHANGED: std::ops::RangeInclusive<f64> = 0.8..=1.25;

/// What a run may use, and what it must yield.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Processor time of ksmd in a run, as a part of one processor: more than
    /// 0, at most 1.
    pub cpu_share: f64,
    /// Pages that one second of ksmd's processor time must save; a scan that
    /// saves fewer counts as one without gain.
    pub min_profit: f64,
    /// How long one scan of everything takes at best.
    pub scan_time: Duration,
    /// Time between two steps in a run.
    pub tick: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            cpu_share: 0.95,
            // 2 MiB for a second of a processor.
            min_profit: 500.0,
            scan_time: Duration::from_secs(1),
            tick: Duration::from_millis(100),
        }
    }
}

/// What a step is told.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sample {
    /// Now, from any zero.
    pub at: Duration,
    /// ksmd's processor time so far.
    pub cpu: Duration,
    /// KSM's figures.
    pub counters: Counters,
}

/// How hard ksmd is to work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Effort {
    /// Pages in a batch.
    pub pages: u32,
    /// Pages in a batch that would use up the bound; at least `pages`. The
    /// kernel's advisor, where there is one, chooses between the two.
    pub pages_max: u32,
    /// How long one scan of everything should take, in whole seconds, at least
    /// one.
    pub scan_seconds: u32,
}

/// What is to be done until the next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// No run: the values found, and ksmd stands still.
    Idle,
    /// A run, in which ksmd stands still until it is within its bound again.
    Pause,
    /// A run in which ksmd scans.
    Scan(Effort),
}

/// What was done, since the start of the daemon.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Totals {
    /// Kicks heard.
    pub kicks: u64,
    /// Runs begun.
    pub runs: u64,
    /// Steps after which ksmd stood still for its bound.
    pub pauses: u64,
    /// Full scans in runs.
    pub scans: u64,
    /// Pages newly saved in runs.
    pub merged: u64,
    /// ksmd's processor time in runs.
    pub cpu: Duration,
    /// Profit of the last full scan: pages saved per second of processor time.
    pub profit: f64,
}

/// The controller.
#[derive(Debug)]
pub struct Controller {
    limits: Limits,
    kicks: u64,
    budget: Budget,
    run: Option<Run>,
    totals: Totals,
}

/// From a kick to the end of what it was worth.
#[derive(Debug)]
struct Run {
    last: Sample,
    decision: Decision,
    /// When ksmd last did anything.
    alive: Duration,
    /// The scan under way began before the last kick.
    partial: bool,
    /// Kicks after which no full scan has counted what is mergeable.
    uncounted: u64,
    /// What was known to be mergeable when the run or the scan began.
    base: f64,
    /// Something was gained since the last kick.
    gained: bool,
    /// Full scans without gain, one after the other.
    barren: u64,
    /// Since the last full scan: pages saved, processor time used.
    scan: (u64, Duration),
    /// When that ended.
    scan_end: Duration,
    /// How long the scan under way should take, in seconds.
    scan_seconds: f64,
    pages: f64,
}

impl Controller {
    /// Idle until kicked.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            kicks: 0,
            budget: Budget::new(limits.cpu_share, limits.tick.as_secs_f64()),
            run: None,
            totals: Totals::default(),
        }
    }

    /// What was done so far.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// Something has started that may be worth merging: the next step, which is
    /// due at once when idle, begins a run or prolongs it. `count` is how many
    /// said so.
    pub fn kick(&mut self, count: u64) {
        self.kicks = self.kicks.saturating_add(count);
        self.totals.kicks = self.totals.kicks.saturating_add(count);
    }

    /// Kicks of pods that have nothing to merge: they only count.
    pub fn unworthy(&mut self, count: u64) {
        self.totals.kicks = self.totals.kicks.saturating_add(count);
    }

    /// Begins or prolongs a run as a kick does, but counts none: for what was
    /// there before anybody listened.
    pub fn wake(&mut self) {
        self.kicks = self.kicks.max(1);
    }

    /// Decides anew. To be called at a kick when idle, and every
    /// [`Limits::tick`] or so until it says [`Decision::Idle`].
    pub fn step(&mut self, sample: &Sample) -> Decision {
        let kicks = std::mem::take(&mut self.kicks);
        let best = self.limits.scan_time.as_secs_f64();
        match &mut self.run {
            None if kicks == 0 => return Decision::Idle,
            None => {
                self.totals.runs += 1;
                self.budget.rest_until(sample.at);
                self.run = Some(Run::new(*sample, best, kicks));
            }
            Some(run) => {
                run.observe(sample, &mut self.budget, &self.limits, &mut self.totals);
                if kicks > 0 {
                    run.kicked(best, kicks);
                }
            }
        }
        let decision = match &mut self.run {
            Some(run) if !run.ends(sample.at) => run.decide(&self.budget),
            _ => Decision::Idle,
        };
        match decision {
            Decision::Idle => self.run = None,
            Decision::Pause => self.totals.pauses += 1,
            Decision::Scan(_) => {}
        }
        decision
    }
}

impl Run {
    fn new(sample: Sample, scan_seconds: f64, kicks: u64) -> Self {
        Self {
            last: sample,
            decision: Decision::Pause,
            alive: sample.at,
            partial: true,
            uncounted: kicks,
            base: sample.counters.mergeable() as f64,
            gained: false,
            barren: 0,
            scan: (0, Duration::ZERO),
            scan_end: sample.at,
            scan_seconds,
            pages: 0.0,
        }
    }

    fn kicked(&mut self, scan_seconds: f64, kicks: u64) {
        self.alive = self.last.at;
        self.partial = true;
        self.uncounted = self.uncounted.saturating_add(kicks);
        self.gained = false;
        self.barren = 0;
        self.scan_seconds = scan_seconds;
    }

    /// Takes in what has happened since the last step.
    fn observe(
        &mut self,
        sample: &Sample,
        budget: &mut Budget,
        limits: &Limits,
        totals: &mut Totals,
    ) {
        let before = std::mem::replace(&mut self.last, *sample);
        let elapsed = sample.at.saturating_sub(before.at);
        let cpu = sample.cpu.saturating_sub(before.cpu);
        // Pages that were written since, and are no longer shared, are no loss
        // that ksmd made.
        let gain = sample
            .counters
            .saved()
            .saturating_sub(before.counters.saved());
        let scans = sample
            .counters
            .full_scans
            .saturating_sub(before.counters.full_scans);
        let batch = match self.decision {
            Decision::Scan(_) => Some(sample.counters.pages_to_scan),
            _ => None,
        };
        budget.spend(elapsed, cpu, batch);
        totals.merged = totals.merged.saturating_add(gain);
        totals.scans = totals.scans.saturating_add(scans);
        totals.cpu = totals.cpu.saturating_add(cpu);
        self.scan.0 = self.scan.0.saturating_add(gain);
        self.scan.1 = self.scan.1.saturating_add(cpu);
        if scans > 0
            || gain > 0
            // Standing still for its debt is not being dead.
            || self.decision == Decision::Pause
            || sample.counters.mergeable() != before.counters.mergeable()
            // Waking up for nothing takes some microseconds too.
            || cpu > elapsed / 1000
        {
            self.alive = sample.at;
        }
        if scans > 0 {
            self.scanned(limits, totals);
        }
    }

    /// A full scan has ended, or several.
    fn scanned(&mut self, limits: &Limits, totals: &mut Totals) {
        let now = self.last.at;
        let partial = std::mem::take(&mut self.partial);
        // Where little is mergeable a scan is over in no time, and a guest that
        // starts gets no chance: what ends within half the time that a scan
        // should take counts as one scan.
        let short = now.saturating_sub(self.scan_end) < limits.scan_time / 2;
        if !partial && short {
            return;
        }
        self.scan_end = now;
        self.base = self.last.counters.mergeable() as f64;
        let (gain, cpu) = std::mem::take(&mut self.scan);
        // Where the clock is too coarse for it, it was at most that little.
        let seconds = cpu.as_secs_f64().max(1e-6);
        totals.profit = gain as f64 / seconds;
        let paid = gain > 0 && totals.profit >= limits.min_profit;
        if paid {
            self.barren = 0;
            self.gained = true;
        } else if !partial {
            self.barren += 1;
        }
        if !partial {
            self.uncounted = 0;
        }
        // Before the first gain it is the checksums that are being taken, and
        // the gain is a scan away; after it, what changes slowly is given time.
        let patience = if self.gained && !paid { 2.0 } else { 1.0 };
        self.scan_seconds = limits.scan_time.as_secs_f64() * patience;
    }

    fn ends(&self, now: Duration) -> bool {
        self.barren >= BARREN_SCANS || now.saturating_sub(self.alive) > PATIENCE
    }

    fn decide(&mut self, budget: &Budget) -> Decision {
        let paused = self.decision == Decision::Pause && self.pages > 0.0;
        self.decision = if budget.in_debt(paused) {
            Decision::Pause
        } else {
            Decision::Scan(self.effort(budget))
        };
        self.decision
    }

    /// The batch for the memory that is mergeable, within the bound.
    fn effort(&mut self, budget: &Budget) -> Effort {
        let sleep = f64::from(SLEEP_MS) / 1000.0;
        let known = self.last.counters.mergeable() as f64;
        let mergeable = if self.uncounted == 0 {
            known
        } else {
            let fresh = (known - self.base).max(0.0);
            known + fresh * UNCOUNTED_MORE + UNCOUNTED_PAGES * self.uncounted as f64
        };
        // Batches and the sleeps between them share the scan's time.
        let awake = mergeable * budget.page_seconds();
        let asleep = (self.scan_seconds - awake).max(self.scan_seconds / 20.0);
        let wanted = mergeable * sleep / asleep;
        let most = budget
            .batch(sleep)
            .min(BATCH_SECONDS / budget.page_seconds());
        let most = most.clamp(BATCH_MIN, f64::from(u32::MAX));
        let pages = wanted.clamp(BATCH_MIN, most);
        // Each change is a write, and makes ksmd wake up.
        let kept = UNCHANGED.contains(&(pages / self.pages)) && self.pages <= most;
        if !kept {
            self.pages = pages;
        }
        Effort {
            // Both are within u32 by the clamps.
            pages: self.pages.round() as u32,
            pages_max: most.round().max(self.pages.round()) as u32,
            scan_seconds: self.scan_seconds.ceil().max(1.0) as u32,
        }
    }
}
