// SPDX-License-Identifier: Apache-2.0
//! System call filters: each kind of thread may make the calls that its work
//! needs, and no other. They are installed once everything is set up, before
//! the guest runs for the first time.
//!
//! A forbidden call kills the whole process (SIGSYS), which is what the client
//! sees; the kernel's log names thread and call (`audit: type=1326`).

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

use super::rules::{rules, Condition, Test};

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

/// A filter could not be made or installed.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The tables are at fault.
    #[error("the {worker:?} threads' filter cannot be compiled")]
    Compile {
        /// Whose.
        worker: Worker,
        /// Why.
        #[source]
        source: BackendError,
    },
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
    let program = program(worker, action)?;
    seccompiler::apply_filter(&program).map_err(|source| SeccompError::Install { worker, source })
}

/// The filter of a kind of thread, for this process alone: it knows its id.
/// What it does not allow ends in `otherwise`.
///
/// # Errors
/// The tables are at fault.
pub fn program(worker: Worker, otherwise: SeccompAction) -> Result<BpfProgram, SeccompError> {
    let compile = || {
        let mut calls: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        let mut unconditional = Vec::new();
        for rule in rules(worker) {
            let alternatives = calls.entry(rule.call).or_default();
            if rule.tests.is_empty() {
                unconditional.push(rule.call);
            }
            for test in rule.tests {
                alternatives.push(SeccompRule::new(conditions(test)?)?);
            }
        }
        for call in unconditional {
            calls.insert(call, Vec::new());
        }
        let filter =
            SeccompFilter::new(calls, otherwise, SeccompAction::Allow, TargetArch::x86_64)?;
        BpfProgram::try_from(filter)
    };
    compile().map_err(|source| SeccompError::Compile { worker, source })
}

fn conditions(test: &Test) -> Result<Vec<SeccompCondition>, BackendError> {
    test.iter()
        .map(|condition| {
            let (argument, operator, value) = match *condition {
                Condition::Is(argument, value) => (argument, SeccompCmpOp::Eq, value),
                Condition::Bits(argument, mask, value) => {
                    (argument, SeccompCmpOp::MaskedEq(mask), value)
                }
                Condition::OwnProcess(argument) => {
                    (argument, SeccompCmpOp::Eq, u64::from(std::process::id()))
                }
            };
            // All that is tested is an int to the kernel, or fits one.
            SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)
        })
        .collect()
}
