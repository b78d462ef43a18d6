// SPDX-License-Identifier: Apache-2.0
//! System call filters: each kind of thread may make the calls that its work
//! needs, and no other. They are installed once everything is set up, before
//! the guest runs for the first time.
//!
//! A forbidden call kills the whole process (SIGSYS), which is what the client
//! sees; the kernel's log names thread and call (`audit: type=1326`).

use std::sync::OnceLock;

use seccompiler::{BpfProgram, SeccompAction};

use super::{filter::Program, rules::tables};

/// What a thread does, and hence may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Worker {
    /// Answers the client; saves the machine.
    Control,
    /// Runs a vCPU and handles its exits.
    Vcpu,
    /// Serves devices whose work does not block.
    Devices,
    /// Serves files of a shared directory.
    Files,
}

impl Worker {
    /// All kinds.
    pub const ALL: [Self; 4] = [Self::Control, Self::Vcpu, Self::Devices, Self::Files];
}

/// What comes of a forbidden call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The process is killed.
    Kill,
    /// It is written to the kernel's log, and happens: for finding out what a
    /// change needs.
    Log,
    /// Nothing is filtered.
    Off,
}

impl std::str::FromStr for Mode {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            "kill" => Ok(Self::Kill),
            "log" => Ok(Self::Log),
            "off" => Ok(Self::Off),
            _ => Err("not kill, log or off".into()),
        }
    }
}

/// A filter could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The kernel refused.
    #[error("the {worker:?} threads' filter cannot be installed (a kernel without seccomp? --seccomp off does without)")]
    Install {
        /// Whose.
        worker: Worker,
        /// Why.
        #[source]
        source: seccompiler::Error,
    },
}

/// Restricts the calling thread to what its kind of work needs. There is no
/// way back.
///
/// # Errors
/// The kernel has no filters.
pub fn restrict(worker: Worker, mode: Mode) -> Result<(), SeccompError> {
    let action = match mode {
        Mode::Off => return Ok(()),
        Mode::Kill => SeccompAction::KillProcess,
        Mode::Log => SeccompAction::Log,
    };
    let program = program(worker, action);
    // The jail has taken new privileges already; the library does so each time.
    if super::sys::set_filter(&program).is_ok() {
        return Ok(());
    }
    seccompiler::apply_filter(&program).map_err(|source| SeccompError::Install { worker, source })
}

/// The filter of a kind of thread, for this process alone: it knows its id.
/// What it does not allow ends in `otherwise`.
pub fn program(worker: Worker, otherwise: SeccompAction) -> BpfProgram {
    let process = *PROCESS.get_or_init(std::process::id);
    match left_out(worker) {
        None => unfinished(worker).finish(otherwise.into(), process),
        Some(number) => Program::new(tables(worker), number).finish(otherwise.into(), process),
    }
}

/// For the test of the rules, which leaves out one of them after another: a
/// kind of thread, and the number of what it is not allowed. Less is allowed
/// then, never more; and in tests' builds only.
pub const LEFT_OUT: &str = "BULKHEAD_RULE_LEFT_OUT";

fn left_out(worker: Worker) -> Option<usize> {
    if !cfg!(debug_assertions) {
        return None;
    }
    let text = std::env::var(LEFT_OUT).ok()?;
    let (kind, number) = text.split_once(' ')?;
    match kind == format!("{worker:?}") {
        true => number.parse().ok(),
        false => None,
    }
}

/// The filters of all kinds of threads.
static PROGRAMS: [Program; 4] = [
    Program::new(tables(Worker::Control), NOTHING),
    Program::new(tables(Worker::Vcpu), NOTHING),
    Program::new(tables(Worker::Devices), NOTHING),
    Program::new(tables(Worker::Files), NOTHING),
];
/// More than the number of any rule.
const NOTHING: usize = usize::MAX;

/// The filter of a kind of thread, for any process.
pub(super) fn unfinished(worker: Worker) -> &'static Program {
    let index = match worker {
        Worker::Control => 0,
        Worker::Vcpu => 1,
        Worker::Devices => 2,
        Worker::Files => 3,
    };
    &PROGRAMS[index]
}

/// This process's id, asked for once.
static PROCESS: OnceLock<u32> = OnceLock::new();
