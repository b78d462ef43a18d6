// SPDX-License-Identifier: Apache-2.0
//! A KSM for tests: as the kernel's in when a page merges, in that new memory
//! comes behind the scan under way, and in that a batch is never cut short.

use std::time::Duration;

use super::{Decision, Sample, SLEEP_MS};
use crate::sysfs::Counters;

/// What a page is to KSM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The same as all others of this kind.
    Same,
    /// Like no other.
    Unique,
    /// Other than at the last scan.
    Changing,
}

#[derive(Debug)]
struct Page {
    kind: Kind,
    seen: bool,
    merged: bool,
    unshared: bool,
}

/// The kernel's side.
#[derive(Debug)]
pub struct Simulated {
    /// Multiplies what a page costs.
    pub cost: f64,
    pages: Vec<Page>,
    cursor: usize,
    now: f64,
    cpu: f64,
    next: f64,
    counters: Counters,
    /// The longest batch so far, in seconds.
    pub longest: f64,
}

impl Simulated {
    pub fn new(cost: f64) -> Self {
        Self {
            cost,
            pages: Vec::new(),
            cursor: 0,
            now: 0.0,
            cpu: 0.0,
            next: 0.0,
            counters: Counters {
                pages_to_scan: 100,
                sleep_millisecs: 20,
                ..Counters::default()
            },
            longest: 0.0,
        }
    }

    /// More memory becomes mergeable.
    pub fn add(&mut self, kind: Kind, count: usize) {
        let new = (0..count).map(|_| Page {
            kind,
            seen: false,
            merged: false,
            unshared: false,
        });
        self.pages.splice(self.cursor..self.cursor, new);
        self.cursor += count;
    }

    pub fn sample(&self) -> Sample {
        Sample {
            at: Duration::from_secs_f64(self.now),
            cpu: Duration::from_secs_f64(self.cpu),
            counters: self.counters,
        }
    }

    pub fn obey(&mut self, decision: Decision) {
        let run = match decision {
            Decision::Idle | Decision::Pause => 0,
            Decision::Scan(effort) => {
                self.counters.pages_to_scan = effort.pages.into();
                self.counters.sleep_millisecs = SLEEP_MS.into();
                1
            }
        };
        if run > self.counters.run {
            self.next = self.next.max(self.now);
        }
        self.counters.run = run;
    }

    /// As the kernel is by default, but switched on.
    pub fn default_settings(&mut self) {
        self.counters.pages_to_scan = 100;
        self.counters.sleep_millisecs = 20;
        self.counters.run = 1;
    }

    /// As much time passes.
    pub fn pass(&mut self, seconds: f64) {
        let end = self.now + seconds;
        while self.counters.run == 1 && !self.pages.is_empty() && self.next < end {
            let took = self.batch();
            self.cpu += took;
            self.longest = self.longest.max(took);
            self.next += took + self.counters.sleep_millisecs as f64 / 1000.0;
        }
        self.now = end;
    }

    /// Seconds that it takes.
    fn batch(&mut self) -> f64 {
        let mut took = 5e-6;
        for _ in 0..self.counters.pages_to_scan {
            if self.cursor == self.pages.len() {
                self.cursor = 0;
                self.counters.full_scans += 1;
                break;
            }
            took += self.visit() * self.cost;
            self.cursor += 1;
        }
        took
    }

    fn visit(&mut self) -> f64 {
        let page = &mut self.pages[self.cursor];
        let counters = &mut self.counters;
        let first = !std::mem::replace(&mut page.seen, true);
        if first {
            counters.pages_volatile += 1;
        }
        match page.kind {
            _ if page.merged || page.unshared => 5e-6,
            // With a page like it in the stable tree, the checksum is not
            // looked at.
            Kind::Same if !first || counters.pages_shared > 0 => {
                page.merged = true;
                counters.pages_volatile -= 1;
                if counters.pages_shared == 0 {
                    counters.pages_shared = 1;
                } else {
                    counters.pages_sharing += 1;
                }
                36e-6
            }
            Kind::Unique if !first => {
                page.unshared = true;
                counters.pages_volatile -= 1;
                counters.pages_unshared += 1;
                12e-6
            }
            _ => 9.5e-6,
        }
    }
}
