// SPDX-License-Identifier: Apache-2.0
//! The agent's log: `key=value` lines to the guest kernel's log.
//!
//! The kernel's log is there before anything is mounted but `/dev`, it reaches
//! the console at the level that the kernel command line asks for, and a line
//! costs one write. Outside a guest (tests) the lines go to standard error.
//!
//! What a workload can trigger at will goes through [`limited`], so that it
//! can neither fill the log nor slow the agent down.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::OnceLock;
use std::time::Instant;

/// Severity, numbered as syslog(2) numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Something that was asked for did not happen.
    Error = 3,
    /// Something is not as it should be; the agent carries on.
    Warn = 4,
    /// Landmarks: boot, ready, containers made and gone.
    Info = 6,
}

static SINK: OnceLock<File> = OnceLock::new();

/// Sends the log to the kernel's log. Without `/dev/kmsg` lines keep going
/// to standard error, which is the console for PID 1.
pub fn to_kernel() {
    if let Ok(file) = OpenOptions::new().write(true).open("/dev/kmsg") {
        let _ = SINK.set(file);
    }
}

/// Writes one line. Use the macros [`crate::info!`], [`crate::warn!`] and
/// [`crate::error!`].
pub fn write(level: Level, args: fmt::Arguments<'_>) {
    // One write per line: /dev/kmsg takes each write as one record. A failed
    // write has nowhere to be reported.
    match SINK.get() {
        Some(mut file) => {
            let line = format!("<{}>bulkhead-agent: {}\n", level as u8, flatten(args));
            let _ = file.write_all(line.as_bytes());
        }
        None => {
            let name = match level {
                Level::Error => "error",
                Level::Warn => "warn",
                Level::Info => "info",
            };
            let line = format!("bulkhead-agent: level={name} {}\n", flatten(args));
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
    }
}

/// A workload chooses some of the text (names, paths): it must not be able to
/// forge further lines, nor exceed the kernel's record size.
fn flatten(args: fmt::Arguments<'_>) -> String {
    const LONGEST: usize = 900;
    let mut text = args.to_string();
    if text.len() > LONGEST {
        let mut end = LONGEST;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push('…');
    }
    text.replace(|c: char| c.is_control(), " ")
}

/// A budget of lines per interval for one kind of message.
#[derive(Debug)]
pub struct Budget {
    /// Interval number in the upper half, lines used in the lower.
    used: AtomicU64,
}

impl Budget {
    const LINES: u64 = 10;
    const SECONDS: u64 = 5;

    /// A fresh budget: ten lines in five seconds.
    pub const fn new() -> Self {
        Self {
            used: AtomicU64::new(0),
        }
    }

    /// Whether one more line may be written at `seconds` since some epoch.
    fn allows(&self, seconds: u64) -> bool {
        let interval = (seconds / Self::SECONDS) & 0xffff_ffff;
        let now = self.used.load(Ordering::Relaxed);
        let lines = if now >> 32 == interval {
            now & 0xffff_ffff
        } else {
            0
        };
        if lines >= Self::LINES {
            return false;
        }
        self.used
            .store(interval << 32 | (lines + 1), Ordering::Relaxed);
        true
    }
}

/// Writes one line unless `budget` is used up; such lines are dropped.
pub fn limited(budget: &Budget, level: Level, args: fmt::Arguments<'_>) {
    static START: OnceLock<Instant> = OnceLock::new();
    let seconds = START.get_or_init(Instant::now).elapsed().as_secs();
    if budget.allows(seconds) {
        write(level, args);
    }
}

/// Logs at [`Level::Info`].
#[macro_export]
macro_rules! info {
    ($($arg:tt)*) => { $crate::log::write($crate::log::Level::Info, format_args!($($arg)*)) };
}

/// Logs at [`Level::Warn`].
#[macro_export]
macro_rules! warn {
    ($($arg:tt)*) => { $crate::log::write($crate::log::Level::Warn, format_args!($($arg)*)) };
}

/// Logs at [`Level::Error`].
#[macro_export]
macro_rules! error {
    ($($arg:tt)*) => { $crate::log::write($crate::log::Level::Error, format_args!($($arg)*)) };
}

/// Logs at [`Level::Warn`], at most ten lines in five seconds per place.
#[macro_export]
macro_rules! warn_limited {
    ($($arg:tt)*) => {{
        static BUDGET: $crate::log::Budget = $crate::log::Budget::new();
        $crate::log::limited(&BUDGET, $crate::log::Level::Warn, format_args!($($arg)*))
    }};
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_cannot_forge_lines() {
        let text = flatten(format_args!("name={}", "a\n<0>forged\u{1b}[2J"));
        assert_eq!(text, "name=a <0>forged [2J");
    }

    #[test]
    fn long_lines_are_cut_at_a_character() {
        let text = flatten(format_args!("{}", "é".repeat(1000)));
        assert!(text.len() <= 903, "{}", text.len());
        assert!(text.ends_with('…'));
    }

    #[test]
    fn a_budget_refills_with_the_next_interval() {
        let budget = Budget::new();
        let first = (0..20).filter(|_| budget.allows(7)).count();
        assert_eq!(first as u64, Budget::LINES);
        assert!(budget.allows(12));
    }
}
