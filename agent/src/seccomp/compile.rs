// SPDX-License-Identifier: Apache-2.0
//! From rules to a classic BPF program over `struct seccomp_data`.
//!
//! System calls with the same verdict and adjacent numbers form one range; the
//! ranges are the leaves of a binary search, so that a filter with hundreds
//! of names costs a dozen instructions. Rules with arguments are tested one
//! after the other in their leaf.

use libc::sock_filter;

use super::profile::{Comparison, Condition, Profile, Rule};

/// AUDIT_ARCH_X86_64.
const ARCHITECTURE: u32 = 0xc000_003e;
/// Numbers from here on are of the x32 ABI, which guests have not.
const X32: u32 = 0x4000_0000;
/// SECCOMP_RET_KILL_PROCESS.
const KILL_PROCESS: u32 = 0x8000_0000;
/// SECCOMP_RET_ERRNO with ENOSYS.
const NO_SUCH_CALL: u32 = 0x0005_0000 | libc::ENOSYS as u32;
/// The kernel's limit (BPF_MAXINSNS).
const LONGEST: usize = 4096;

// Offsets in `struct seccomp_data`.
const NUMBER_OFFSET: u32 = 0;
const ARCHITECTURE_OFFSET: u32 = 4;
const ARGUMENTS_OFFSET: u32 = 16;

// Operation codes (linux/bpf_common.h).
const LOAD: u16 = 0x20;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_GREATER_EQUAL: u16 = 0x35;
const AND: u16 = 0x54;
const RETURN: u16 = 0x06;

/// Why a profile cannot be compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLong;

fn statement(code: u16, k: u32) -> sock_filter {
    sock_filter {
        code,
        jt: 0,
        jf: 0,
        k,
    }
}

fn branch(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

/// What happens to one range of numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    Always(u32),
    /// Indices of rules with conditions, in their order.
    Depends(Vec<usize>),
}

/// Compiles a profile.
///
/// # Errors
/// When the program would be longer than the kernel takes.
pub fn compile(profile: &Profile) -> Result<Vec<sock_filter>, TooLong> {
    let mut program = vec![
        statement(LOAD, ARCHITECTURE_OFFSET),
        branch(JUMP_EQUAL, ARCHITECTURE, 1, 0),
        statement(RETURN, KILL_PROCESS),
        statement(LOAD, NUMBER_OFFSET),
        branch(JUMP_GREATER_EQUAL, X32, 0, 1),
        statement(RETURN, NO_SUCH_CALL),
    ];
    let ranges = ranges(profile);
    program.extend(search(profile, &ranges));
    if program.len() > LONGEST {
        return Err(TooLong);
    }
    Ok(program)
}

/// Ranges by their first numbers, from 0 on.
fn ranges(profile: &Profile) -> Vec<(u32, Verdict)> {
    let last = profile.rules.iter().map(|rule| rule.number).max();
    let mut ranges: Vec<(u32, Verdict)> = Vec::new();
    let mut push = |number: u32, verdict: Verdict| {
        if ranges.last().is_none_or(|(_, before)| *before != verdict) {
            ranges.push((number, verdict));
        }
    };
    for number in 0..=last.unwrap_or(0) {
        push(number, verdict(profile, number));
    }
    if let Some(last) = last {
        // What is newer than everything the profile knows is not forbidden
        // but unknown: programs then use what they used before.
        let beyond = if profile.unknown_is_missing {
            NO_SUCH_CALL
        } else {
            profile.default
        };
        push(last + 1, Verdict::Always(beyond));
    }
    ranges
}

fn verdict(profile: &Profile, number: u32) -> Verdict {
    let matching = || {
        let rules = profile.rules.iter().enumerate();
        rules.filter(move |(_, rule)| rule.number == number)
    };
    if let Some((_, rule)) = matching().find(|(_, rule)| rule.conditions.is_empty()) {
        return Verdict::Always(rule.action);
    }
    let indices: Vec<usize> = matching().map(|(index, _)| index).collect();
    if indices.is_empty() {
        Verdict::Always(profile.default)
    } else {
        Verdict::Depends(indices)
    }
}

/// The code that finds the range of the number in the accumulator. It always
/// ends in a return.
fn search(profile: &Profile, ranges: &[(u32, Verdict)]) -> Vec<sock_filter> {
    match ranges {
        [] => vec![statement(RETURN, profile.default)],
        [(_, verdict)] => leaf(profile, verdict),
        _ => {
            let (left, right) = ranges.split_at(ranges.len() / 2);
            let middle = right[0].0;
            let left = search(profile, left);
            let right = search(profile, right);
            let mut code = Vec::with_capacity(left.len() + right.len() + 2);
            match u8::try_from(left.len()) {
                Ok(skip) => code.push(branch(JUMP_GREATER_EQUAL, middle, skip, 0)),
                Err(_) => {
                    // Conditional jumps reach 255 instructions, plain ones all.
                    code.push(branch(JUMP_GREATER_EQUAL, middle, 0, 1));
                    code.push(statement(JUMP, left.len() as u32));
                }
            }
            code.extend(left);
            code.extend(right);
            code
        }
    }
}

fn leaf(profile: &Profile, verdict: &Verdict) -> Vec<sock_filter> {
    match verdict {
        Verdict::Always(action) => vec![statement(RETURN, *action)],
        Verdict::Depends(indices) => {
            let mut code = Vec::new();
            for index in indices {
                code.extend(conditional(&profile.rules[*index]));
            }
            code.push(statement(RETURN, profile.default));
            code
        }
    }
}

/// Marks, in a jump's field, "to the end of this rule".
const FAIL: u8 = 255;

/// Tests all conditions of a rule; falls through when one does not hold.
fn conditional(rule: &Rule) -> Vec<sock_filter> {
    let mut code = Vec::new();
    for condition in &rule.conditions {
        test(&mut code, condition);
    }
    // Six arguments of at most seven instructions: no jump is longer than 255.
    let end = code.len() + 1;
    for (index, instruction) in code.iter_mut().enumerate() {
        let distance = (end - index - 1) as u8;
        if is_branch(instruction.code) {
            for field in [&mut instruction.jt, &mut instruction.jf] {
                if *field == FAIL {
                    *field = distance;
                }
            }
        }
    }
    code.push(statement(RETURN, rule.action));
    code
}

fn is_branch(code: u16) -> bool {
    matches!(code, JUMP_EQUAL | JUMP_GREATER | JUMP_GREATER_EQUAL)
}

/// One condition on a 64-bit argument, as two 32-bit halves. Falls through
/// when it holds.
fn test(code: &mut Vec<sock_filter>, condition: &Condition) {
    let low = ARGUMENTS_OFFSET + 8 * u32::from(condition.index);
    let high = low + 4;
    let (value_high, value_low) = ((condition.value >> 32) as u32, condition.value as u32);
    match condition.comparison {
        Comparison::Equal => code.extend([
            statement(LOAD, high),
            branch(JUMP_EQUAL, value_high, 0, FAIL),
            statement(LOAD, low),
            branch(JUMP_EQUAL, value_low, 0, FAIL),
        ]),
        Comparison::NotEqual => code.extend([
            statement(LOAD, high),
            branch(JUMP_EQUAL, value_high, 0, 2),
            statement(LOAD, low),
            branch(JUMP_EQUAL, value_low, FAIL, 0),
        ]),
        Comparison::Greater | Comparison::GreaterEqual => {
            let last = if condition.comparison == Comparison::Greater {
                JUMP_GREATER
            } else {
                JUMP_GREATER_EQUAL
            };
            code.extend([
                statement(LOAD, high),
                branch(JUMP_GREATER, value_high, 3, 0),
                branch(JUMP_EQUAL, value_high, 0, FAIL),
                statement(LOAD, low),
                branch(last, value_low, 0, FAIL),
            ]);
        }
        Comparison::Less | Comparison::LessEqual => {
            // Holds when the contrary does not.
            let last = if condition.comparison == Comparison::Less {
                JUMP_GREATER_EQUAL
            } else {
                JUMP_GREATER
            };
            code.extend([
                statement(LOAD, high),
                branch(JUMP_GREATER, value_high, FAIL, 0),
                branch(JUMP_EQUAL, value_high, 0, 2),
                statement(LOAD, low),
                branch(last, value_low, FAIL, 0),
            ]);
        }
        Comparison::MaskedEqual(mask) => code.extend([
            statement(LOAD, high),
            statement(AND, (mask >> 32) as u32),
            branch(JUMP_EQUAL, value_high, 0, FAIL),
            statement(LOAD, low),
            statement(AND, mask as u32),
            branch(JUMP_EQUAL, value_low, 0, FAIL),
        ]),
    }
}

#[cfg(test)]
#[path = "compile_tests.rs"]
mod tests;
