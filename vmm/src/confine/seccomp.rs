// SPDX-License-Identifier: Apache-2.0
//! System call filters: each kind of thread may make the calls that its work
//! needs, and no other. They are installed once everything is set up, before
//! the guest runs for the first time.
//!
//! A forbidden call kills the whole process (SIGSYS), which is what the client
//! sees; the kernel's log names thread and call (`audit: type=1326`).

use std::{collections::BTreeMap, sync::OnceLock};

use seccompiler::{
    sock_filter, BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp,
    SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use super::rules::{allowed, Condition, Test};

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
    // The jail has taken new privileges already; the library does so each time.
    if super::sys::set_filter(&program).is_ok() {
        return Ok(());
    }
    seccompiler::apply_filter(&program).map_err(|source| SeccompError::Install { worker, source })
}

/// The filter of a kind of thread, for this process alone: it knows its id.
/// What it does not allow ends in `otherwise`.
///
/// # Errors
/// The tables are at fault.
pub fn program(worker: Worker, otherwise: SeccompAction) -> Result<BpfProgram, SeccompError> {
    compile(worker, &otherwise).map_err(|source| SeccompError::Compile { worker, source })
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

/// Most calls that are looked for one after the other.
const GROUP: usize = 6;

/// The library's filters try each call in turn. The kernel runs a new filter
/// for every call there is, to find those that it always allows; and a vCPU's
/// filter runs at each of its entries to the guest. So the calls are split by
/// their number into groups with a filter each, and a few instructions in
/// front of each group skip it for higher numbers.
fn compile(worker: Worker, otherwise: &SeccompAction) -> Result<BpfProgram, BackendError> {
    let mut calls: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut unconditional = Vec::new();
    let left_out = left_out(worker);
    for (number, allowed) in allowed(worker).enumerate() {
        if Some(number) == left_out {
            continue;
        }
        let alternatives = calls.entry(allowed.call).or_default();
        match allowed.test {
            None => unconditional.push(allowed.call),
            Some(test) => alternatives.push(SeccompRule::new(conditions(test)?)?),
        }
    }
    for call in unconditional {
        calls.insert(call, Vec::new());
    }
    let mut program = BpfProgram::new();
    while let Some(last) = calls.keys().nth(GROUP - 1).or(calls.keys().last()).copied() {
        let rest = calls.split_off(&(last + 1));
        let group = filter(std::mem::replace(&mut calls, rest), otherwise)?;
        program.extend(skip_above(last, &group));
        program.extend(group);
    }
    // What is above all of them.
    program.extend(filter(BTreeMap::new(), otherwise)?);
    Ok(program)
}

fn filter(
    calls: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: &SeccompAction,
) -> Result<BpfProgram, BackendError> {
    let (otherwise, allow) = (otherwise.clone(), SeccompAction::Allow);
    SeccompFilter::new(calls, otherwise, allow, TargetArch::x86_64)?.try_into()
}

/// Instructions that jump over `group` when the call's number is above `last`.
fn skip_above(last: i64, group: &[sock_filter]) -> [sock_filter; 3] {
    let instruction = |code: u32, jump: u8, value: u32| sock_filter {
        // Codes are less than 2^8.
        code: code as u16,
        jt: jump,
        jf: 1 - jump,
        k: value,
    };
    // Numbers and lengths are below 2^16. The number is the first word of what
    // a filter sees (seccomp(2)).
    let mut load = instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0);
    let mut jump = instruction(libc::BPF_JMP | libc::BPF_JA, 0, group.len() as u32);
    (load.jf, jump.jf) = (0, 0);
    let test = libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K;
    [load, instruction(test, 0, last as u32), jump]
}

/// This process's id, asked for once.
static PROCESS: OnceLock<u32> = OnceLock::new();

fn conditions(test: &Test) -> Result<Vec<SeccompCondition>, BackendError> {
    test.iter()
        .map(|condition| {
            let (argument, operator, value) = match *condition {
                Condition::Is(argument, value) => (argument, SeccompCmpOp::Eq, value),
                Condition::Bits(argument, mask, value) => {
                    (argument, SeccompCmpOp::MaskedEq(mask), value)
                }
                Condition::OwnProcess(argument) => {
                    let process = *PROCESS.get_or_init(std::process::id);
                    (argument, SeccompCmpOp::Eq, u64::from(process))
                }
            };
            // All that is tested is an int to the kernel, or fits one.
            SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)
        })
        .collect()
}
