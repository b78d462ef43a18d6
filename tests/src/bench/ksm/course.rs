// SPDX-License-Identifier: Apache-2.0
//! What was saved at which time.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use bulkhead_ksm_throttler::meter::Figure;
use bulkhead_ksm_throttler::sysfs::DIRECTORY;

use super::policy::Policy;
use super::Processor;

/// How often it is looked at.
const STEP: Duration = Duration::from_millis(50);

/// Of one burst; times in seconds from its begin.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Course {
    /// When, pages saved, and processor time in seconds used until then.
    samples: Vec<(f64, u64, f64)>,
}

impl Course {
    /// Most pages saved.
    pub fn most(&self) -> u64 {
        self.samples.iter().map(|s| s.1).max().unwrap_or(0)
    }

    /// The sum over time of pages that could be merged, `most`, and are not.
    pub fn page_seconds(&self, most: u64, until: f64) -> f64 {
        let mut sum = 0.0;
        for pair in self.samples.windows(2) {
            let [(from, saved, _), (to, _, _)] = pair else {
                continue;
            };
            let to = to.min(until);
            if to <= *from {
                break;
            }
            sum += most.saturating_sub(*saved) as f64 * (to - from);
        }
        sum
    }

    /// Processor time used until then.
    pub fn cpu(&self, until: f64) -> f64 {
        let last = self.samples.iter().take_while(|s| s.0 <= until).last();
        last.map_or(0.0, |s| s.2)
    }

    /// For people: when nine tenths were saved.
    pub fn told(&self, until: f64, most: u64) -> String {
        let nine = most / 10 * 9;
        let merged = self.samples.iter().find(|s| s.1 >= nine && s.0 <= until);
        let last = self.samples.iter().take_while(|s| s.0 <= until).last();
        let saved = last.map_or(0, |s| s.1);
        match merged {
            Some((at, _, _)) => {
                format!("nine tenths were saved after {at:.1} s, {saved} pages in the end")
            }
            None => format!("nine tenths were not saved, {saved} pages in the end"),
        }
    }
}

/// Looks.
pub struct Recorder {
    begin: Instant,
    saved: Figure,
    processor: Processor,
    used: f64,
}

impl Recorder {
    /// Begins; what is used counts from now.
    ///
    /// # Errors
    /// This kernel has no KSM.
    pub fn new(daemon: Option<u32>) -> Result<Self> {
        let processor = Processor::new(daemon)?;
        Ok(Self {
            begin: Instant::now(),
            saved: Figure::open(format!("{DIRECTORY}/pages_sharing").as_ref())?,
            used: processor.read()?,
            processor,
        })
    }

    /// Seconds since the begin.
    pub fn now(&self) -> f64 {
        self.begin.elapsed().as_secs_f64()
    }

    /// Looks, lets the policy do what is due, and sleeps a little.
    ///
    /// # Errors
    /// The kernel's.
    pub fn step(&self, course: &mut Course, policy: &mut Policy) -> Result<()> {
        let now = self.now();
        let sample = (now, self.saved.read()?, self.processor.read()? - self.used);
        course.samples.push(sample);
        policy.step(Duration::from_secs_f64(now))?;
        thread::sleep(STEP);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_merged_yet_counts() {
        let course = Course {
            samples: vec![(0.0, 0, 0.0), (2.0, 4, 0.1), (3.0, 10, 0.5), (4.0, 10, 0.6)],
        };
        assert_eq!(course.page_seconds(10, 9.0), 26.0);
        assert_eq!(course.page_seconds(10, 2.5), 23.0);
        assert_eq!(course.cpu(3.5), 0.5);
        assert_eq!(course.most(), 10);
    }
}
