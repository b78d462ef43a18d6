// SPDX-License-Identifier: Apache-2.0
//! Runs the tests one after the other and counts.

use std::env;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::time::Instant;

use anyhow::{anyhow, bail, Context as _, Result};

use crate::context::{Context, Skip};

/// One test.
#[derive(Clone, Copy)]
pub struct Test {
    /// Its name.
    pub name: &'static str,
    /// What it does.
    pub run: fn(&Context) -> Result<()>,
}

/// `tests![a, b; twice c, d]`: the functions of a module as [`Test`]s. Those
/// behind `twice` are two tests each: with a machine that boots, and, with
/// `_restored` behind the name, with one that is made of a snapshot.
macro_rules! tests {
    ($($once:ident),* $(,)?) => {
        $crate::runner::tests![$($once),*; twice]
    };
    (twice $($twice:ident),* $(,)?) => {
        $crate::runner::tests![; twice $($twice),*]
    };
    ($($once:ident),*; twice $($twice:ident),* $(,)?) => {
        &[
            $($crate::runner::Test { name: stringify!($once), run: $once },)*
            $(
                $crate::runner::Test {
                    name: stringify!($twice),
                    run: |context| $twice(context, bulkhead_tests::start::Start::Cold),
                },
                $crate::runner::Test {
                    name: concat!(stringify!($twice), "_restored"),
                    run: |context| $twice(context, bulkhead_tests::start::Start::Restored),
                },
            )*
        ]
    };
}
pub(crate) use tests;

/// What the command line asks for.
#[derive(Default)]
pub struct Selection {
    parts: Vec<String>,
    skip: Vec<String>,
    exact: bool,
    /// Only tell the names.
    pub list: bool,
}

impl Selection {
    /// Understands the options that cargo and people pass to test programs.
    pub fn from_arguments() -> Result<Self> {
        let mut selection = Self::default();
        let mut words = env::args().skip(1);
        while let Some(word) = words.next() {
            match word.as_str() {
                "--list" => selection.list = true,
                "--exact" => selection.exact = true,
                "--skip" => selection.skip.extend(words.next()),
                "--nocapture" | "--no-capture" | "--show-output" | "--quiet" | "-q" => {}
                "--test-threads" | "--format" | "--color" => drop(words.next()),
                _ if word.starts_with("--") && word.contains('=') => {}
                _ if word.starts_with('-') => bail!("what is {word}?"),
                _ => selection.parts.push(word),
            }
        }
        Ok(selection)
    }

    /// The tests that were asked for.
    pub fn of(&self, tests: Vec<Test>) -> Vec<Test> {
        let matches = |name: &str, part: &String| {
            if self.exact {
                name == part
            } else {
                name.contains(part.as_str())
            }
        };
        tests
            .into_iter()
            .filter(|t| self.parts.is_empty() || self.parts.iter().any(|p| matches(t.name, p)))
            .filter(|t| !self.skip.iter().any(|p| matches(t.name, p)))
            .collect()
    }
}

/// Runs them; gives the exit status of the program.
pub fn run(tests: &[Test]) -> Result<i32> {
    let begin = Instant::now();
    let context = Context::start()?;
    let mut kernel_log = KernelLog::from_now()?;
    println!(
        "\nrunning {} tests with {} (containerd up after {:.1} s)",
        tests.len(),
        context.runtime,
        begin.elapsed().as_secs_f64()
    );
    let (mut passed, mut skipped, mut failed) = (0, 0, Vec::new());
    for test in tests {
        let begin = Instant::now();
        let logged = context.containerd.log().len();
        let result = catch_unwind(AssertUnwindSafe(|| (test.run)(&context)))
            .unwrap_or_else(|panic| Err(anyhow!("panicked: {}", panic_text(&*panic))));
        let result = match (result, context.containerd.clean()) {
            (Ok(()), Ok(left)) if !left.is_empty() => {
                Err(anyhow!("left behind: {}", left.join(", ")))
            }
            (Ok(()), Err(error)) => Err(error.context("clean up")),
            (result, _) => result,
        };
        let expected = context.forbidden_call.take();
        let result = match kernel_log.forbidden_calls(expected) {
            Err(error) if result.is_ok() => Err(error),
            _ => result,
        };
        let took = begin.elapsed().as_secs_f64();
        match result {
            Ok(()) => {
                passed += 1;
                println!("test {} ... ok ({took:.1} s)", test.name);
            }
            Err(error) => match error.downcast_ref::<Skip>() {
                Some(Skip(why)) => {
                    skipped += 1;
                    println!("SKIPPED: {}: {why}", test.name);
                }
                None => {
                    failed.push(test.name);
                    println!("test {} ... FAILED ({took:.1} s)", test.name);
                    // With the name, for lines of another box may come between.
                    for line in format!("{error:#}").lines() {
                        println!("    {}: {line}", test.name);
                    }
                    let log = context.containerd.log();
                    let log = log.get(logged..).unwrap_or_default();
                    let lines: Vec<&str> = log.lines().collect();
                    for line in &lines[lines.len().saturating_sub(25)..] {
                        println!("    {} | {line}", test.name);
                    }
                }
            },
        }
    }
    context.stop()?;
    let verdict = if failed.is_empty() { "ok" } else { "FAILED" };
    if !failed.is_empty() {
        println!("\nfailed: {}", failed.join(", "));
    }
    println!(
        "\ntest result: {verdict}. {passed} passed; {} failed; {skipped} ignored; 0 measured; 0 filtered out; finished in {:.2}s\n",
        failed.len(),
        begin.elapsed().as_secs_f64()
    );
    Ok(i32::from(!failed.is_empty()))
}

/// What the kernel logs.
struct KernelLog(File);

impl KernelLog {
    /// From here on.
    fn from_now() -> Result<Self> {
        let mut log = File::options()
            .read(true)
            .custom_flags(nix::libc::O_NONBLOCK)
            .open("/dev/kmsg")
            .context("/dev/kmsg")?;
        log.seek(SeekFrom::End(0)).context("/dev/kmsg")?;
        Ok(Self(log))
    }

    /// No VMM was killed for what its system call filters forbid, unless that was
    /// `expected`: its pod may have been about to end anyway, and nothing else
    /// would show it.
    fn forbidden_calls(&mut self, expected: bool) -> Result<()> {
        // A read gives one line.
        let mut line = vec![0; 8192];
        let mut forbidden = Vec::new();
        loop {
            match self.0.read(&mut line) {
                Ok(length) => {
                    let text = String::from_utf8_lossy(&line[..length]);
                    if text.contains("type=1326") && text.contains("bulkhead-vmm") {
                        forbidden.push(text.into_owned());
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // Lines were overwritten before they were read.
                Err(error) if error.raw_os_error() == Some(nix::libc::EPIPE) => {}
                Err(error) => return Err(error).context("/dev/kmsg"),
            }
        }
        match (forbidden.is_empty(), expected) {
            (true, false) | (false, true) => Ok(()),
            (true, true) => bail!("the kernel's log names no forbidden system call"),
            (false, false) => bail!("forbidden system calls: {}", forbidden.concat()),
        }
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|s| (*s).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "without words".into())
}
