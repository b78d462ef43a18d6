// SPDX-License-Identifier: Apache-2.0
//! The tests in a box. An emulated machine with nested virtualisation freezes
//! at times, both its processors halted for ever, or its KVM dies of a double
//! fault; that says nothing about what runs in it. So the program in the box
//! tells every few seconds that it is alive, whatever the tests are doing, and
//! when it falls silent the tests that are left go on in a new box, together
//! with those that failed in one that then died. A test that fails or hangs in a
//! box that lives on gets no second chance.

use std::io::{stderr, stdout, Write};
use std::num::NonZero;
use std::thread;
use std::time::Duration;

use anyhow::{bail, Result};
use bulkhead_tests::boxed::{BoxError, Event, KvmBox, Session};
use bulkhead_tests::inside::{again, pass_on, release_outside, start_box};

/// How often the program in the box tells that it is alive.
const BEAT: Duration = Duration::from_secs(5);
/// How long it may be silent.
const SILENCE: Duration = Duration::from_secs(60);
/// How many boxes one after the other may freeze or die.
const FREEZES: usize = 4;
/// What it says: a byte that no text has.
const ALIVE: u8 = 0;

/// Tells whoever watches from outside a box that this program is alive.
pub fn tell_alive() {
    if release_outside().is_none() {
        return;
    }
    thread::spawn(|| loop {
        // Nobody hears it any more: then nobody waits for it either.
        let _ = stderr().write_all(&[ALIVE]);
        thread::sleep(BEAT);
    });
}

/// Runs the tests of these names, in as many boxes at a time as this machine
/// has processors; gives the exit status of the program. `limit` is for each
/// box.
pub fn run(names: Vec<String>, limit: Duration) -> Result<i32> {
    let boxes = thread::available_parallelism()
        .map_or(1, NonZero::get)
        .min(names.len())
        .max(1);
    // Neighbours take about as long, so they go to different boxes.
    let shares = (0..boxes).map(|first| {
        let share = names.iter().skip(first).step_by(boxes);
        share.cloned().collect::<Vec<_>>()
    });
    let running: Vec<_> = shares
        .map(|share| thread::spawn(move || run_share(share, limit)))
        .collect();
    running
        .into_iter()
        .map(|share| match share.join() {
            Ok(status) => status,
            Err(panic) => std::panic::resume_unwind(panic),
        })
        // All of them end before the worst status is taken.
        .collect::<Vec<_>>()
        .into_iter()
        .try_fold(0, |worst, status| Ok(status?.max(worst)))
}

/// Runs these tests in one box after the other until one lives to their end.
fn run_share(mut names: Vec<String>, limit: Duration) -> Result<i32> {
    for _ in 0..FREEZES {
        let machine = start_box()?;
        println!(
            "in a box: kernel {}, up after {:.1} s",
            machine.ready().release,
            machine.boot_time().as_secs_f64()
        );
        let arguments = std::iter::once("--exact".to_owned()).chain(names.iter().cloned());
        let command = again(arguments, limit)?;
        let mut progress = Progress::default();
        let attended = command
            .spawn(machine.mux())
            .and_then(|mut session| attend(&mut session, &mut progress));
        let why = match attended {
            Ok(Some(exit)) => return Ok(exit),
            Ok(None) => format!("has been silent for {} s", SILENCE.as_secs()),
            Err(BoxError::Gone(why)) => format!("has gone: {why}"),
            Err(error) => return Err(error.into()),
        };
        progress.report(&machine, &why);
        names.retain(|name| !progress.done.contains(name));
    }
    bail!(
        "{FREEZES} boxes froze or died; not run: {}",
        names.join(", ")
    );
}

/// Passes on what the program in the box says, until it ends; `None` when it
/// has fallen silent.
fn attend(
    session: &mut Session,
    progress: &mut Progress,
) -> std::result::Result<Option<i32>, BoxError> {
    loop {
        match session.next_event_within(SILENCE)? {
            Some(Event::Stdout(data)) => pass_on(&mut stdout().lock(), &progress.take(&data)),
            Some(Event::Stderr(mut data)) => {
                data.retain(|byte| *byte != ALIVE);
                pass_on(&mut stderr().lock(), &data);
            }
            Some(Event::Exit(exit)) => {
                if exit.timed_out {
                    eprintln!("stopped: it took too long");
                }
                return Ok(Some(exit.status()));
            }
            None => return Ok(None),
        }
    }
}

/// Which tests are done with, by what the program in the box has printed.
#[derive(Default)]
struct Progress {
    line: Vec<u8>,
    done: Vec<String>,
    passed: usize,
    failed: Vec<String>,
    skipped: usize,
}

impl Progress {
    /// Gives the lines that `data` has completed, for boxes take turns line by
    /// line.
    fn take(&mut self, data: &[u8]) -> Vec<u8> {
        let mut lines = Vec::new();
        for byte in data {
            self.line.push(*byte);
            if *byte != b'\n' {
                continue;
            }
            lines.extend(&self.line);
            let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
            let line = line.trim_end();
            if let Some((name, result)) = line
                .strip_prefix("test ")
                .and_then(|rest| rest.split_once(" ... "))
            {
                if result.starts_with("ok") {
                    self.passed += 1;
                    self.done.push(name.to_owned());
                } else {
                    self.failed.push(name.to_owned());
                }
            } else if let Some((name, _)) = line
                .strip_prefix("SKIPPED: ")
                .and_then(|rest| rest.split_once(": "))
            {
                self.skipped += 1;
                self.done.push(name.to_owned());
            }
        }
        lines
    }

    /// Tells of a box that is of no use any more, and sums up what was done in
    /// it.
    fn report(&self, machine: &KvmBox, why: &str) {
        println!(
            "\nthe box {why}; the tests that are left go on in another\n--- end of its console ---\n{}",
            machine.console()
        );
        if !self.failed.is_empty() {
            println!(
                "again, for they failed in that box: {}",
                self.failed.join(", ")
            );
        }
        println!(
            "test result: interrupted. {} passed; 0 failed; {} ignored\n",
            self.passed, self.skipped
        );
    }
}
