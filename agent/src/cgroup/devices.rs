// SPDX-License-Identifier: Apache-2.0
//! Device rules as a BPF_PROG_TYPE_CGROUP_DEVICE program.
//!
//! The specification's rules apply in order, so the last one that matches
//! decides; the program tests them from last to first. What every container
//! may use comes after the specification's own rules; what no rule mentions
//! is denied.

use std::os::fd::BorrowedFd;

use bulkhead_agent_protocol::oci;
use bulkhead_bpf::Kind;

use crate::container::numbers;
use crate::error::{AgentError, Context, Result};

// struct bpf_cgroup_dev_ctx: access and type, major, minor; 32 bits each.
const TYPE_BLOCK: u32 = 1;
const TYPE_CHAR: u32 = 2;
const ACCESS_MKNOD: u32 = 1;
const ACCESS_READ: u32 = 2;
const ACCESS_WRITE: u32 = 4;
const ACCESS_ALL: u32 = ACCESS_MKNOD | ACCESS_READ | ACCESS_WRITE;

/// One rule; `None`: any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

/// What every container may do: make any node, and use the default devices
/// and terminals.
const DEFAULTS: [Rule; 10] = [
    default(TYPE_CHAR, None, None, ACCESS_MKNOD),
    default(TYPE_BLOCK, None, None, ACCESS_MKNOD),
    default(TYPE_CHAR, Some(1), Some(3), ACCESS_ALL),
    default(TYPE_CHAR, Some(1), Some(5), ACCESS_ALL),
    default(TYPE_CHAR, Some(1), Some(7), ACCESS_ALL),
    default(TYPE_CHAR, Some(1), Some(8), ACCESS_ALL),
    default(TYPE_CHAR, Some(1), Some(9), ACCESS_ALL),
    default(TYPE_CHAR, Some(5), Some(0), ACCESS_ALL),
    default(TYPE_CHAR, Some(5), Some(2), ACCESS_ALL),
    default(TYPE_CHAR, Some(136), None, ACCESS_ALL),
];

const fn default(kind: u32, major: Option<u32>, minor: Option<u32>, access: u32) -> Rule {
    Rule {
        allow: true,
        kind: Some(kind),
        major,
        minor,
        access,
    }
}

impl Rule {
    /// Whether every request matches.
    fn covers_all(&self) -> bool {
        self.kind.is_none()
            && self.major.is_none()
            && self.minor.is_none()
            && self.access == ACCESS_ALL
    }
}

/// None: it is about what the guest has not.
fn rule(from: &oci::DeviceRule) -> Result<Option<Rule>> {
    let invalid = |field: &str, value: &dyn std::fmt::Debug| {
        AgentError::Invalid(format!("linux.resources.devices: {field} {value:?}"))
    };
    let kind = match from.type_.as_str() {
        "" | "a" => None,
        "b" => Some(TYPE_BLOCK),
        "c" | "u" => Some(TYPE_CHAR),
        other => return Err(invalid("type", &other)),
    };
    let number = |value: Option<i64>, field: &str| match value {
        // -1 is "any" to some writers.
        None | Some(-1) => Ok(None),
        Some(value) => i32::try_from(value)
            .ok()
            .and_then(|value| u32::try_from(value).ok())
            .map(Some)
            .ok_or_else(|| invalid(field, &value)),
    };
    let mut access = 0;
    for letter in from.access.chars() {
        access |= match letter {
            'r' => ACCESS_READ,
            'w' => ACCESS_WRITE,
            'm' => ACCESS_MKNOD,
            _ => return Err(invalid("access", &from.access)),
        };
    }
    if from.access.is_empty() {
        access = ACCESS_ALL;
    }
    let (mut major, mut minor) = (number(from.major, "major")?, number(from.minor, "minor")?);
    let block = kind == Some(TYPE_BLOCK);
    if !from.name.is_empty() {
        let Some(found) = numbers::device(&from.name, block) else {
            return Ok(None);
        };
        (major, minor) = (Some(libc::major(found)), Some(libc::minor(found)));
    } else if !from.driver.is_empty() {
        let Some(found) = numbers::major(&from.driver, block) else {
            return Ok(None);
        };
        major = Some(found);
    }
    Ok(Some(Rule {
        allow: from.allow,
        kind,
        major,
        minor,
        access,
    }))
}

// Registers of the program: the context arrives in R1.
const R0: u8 = 0;
const SCRATCH: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

// Operation codes of the instruction set (Linux: bpf/standardization).
const LOAD_WORD: u8 = 0x61;
const MOVE_IMMEDIATE: u8 = 0xb7;
const MOVE_REGISTER: u8 = 0xbf;
const AND_IMMEDIATE: u8 = 0x57;
const SHIFT_RIGHT_IMMEDIATE: u8 = 0x77;
const JUMP_EQUAL_IMMEDIATE: u8 = 0x15;
const JUMP_NOT_EQUAL_IMMEDIATE: u8 = 0x55;
const JUMP_NOT_EQUAL_REGISTER: u8 = 0x5d;
const EXIT: u8 = 0x95;

fn instruction(code: u8, destination: u8, source: u8, offset: i16, immediate: u32) -> u64 {
    u64::from(code)
        | u64::from(destination) << 8
        | u64::from(source) << 12
        | u64::from(offset as u16) << 16
        | u64::from(immediate) << 32
}

/// Compiles the rules.
///
/// # Errors
/// [`AgentError::Invalid`] naming the field.
pub fn compile(rules: &[oci::DeviceRule]) -> Result<Vec<u64>> {
    let mut program = vec![
        instruction(LOAD_WORD, KIND, SCRATCH, 0, 0),
        instruction(MOVE_REGISTER, ACCESS, KIND, 0, 0),
        instruction(AND_IMMEDIATE, KIND, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT_IMMEDIATE, ACCESS, 0, 0, 16),
        instruction(LOAD_WORD, MAJOR, SCRATCH, 4, 0),
        instruction(LOAD_WORD, MINOR, SCRATCH, 8, 0),
    ];
    let own = rules.iter().filter_map(|from| rule(from).transpose());
    let own = own.collect::<Result<Vec<_>>>()?;
    for rule in own.iter().chain(&DEFAULTS).rev() {
        emit(&mut program, rule);
        if rule.covers_all() {
            // The kernel refuses instructions that are never reached.
            return Ok(program);
        }
    }
    program.push(instruction(MOVE_IMMEDIATE, R0, 0, 0, 0));
    program.push(instruction(EXIT, 0, 0, 0, 0));
    Ok(program)
}

/// One rule: tests that jump past it, then the verdict.
fn emit(program: &mut Vec<u64>, rule: &Rule) {
    // (operation, register, other register, immediate, is a jump)
    let mut body: Vec<(u8, u8, u8, u32, bool)> = Vec::new();
    if let Some(kind) = rule.kind {
        body.push((JUMP_NOT_EQUAL_IMMEDIATE, KIND, 0, kind, true));
    }
    if rule.access != ACCESS_ALL {
        body.push((MOVE_REGISTER, SCRATCH, ACCESS, 0, false));
        body.push((AND_IMMEDIATE, SCRATCH, 0, rule.access, false));
        if rule.allow {
            // Everything asked for must be allowed.
            body.push((JUMP_NOT_EQUAL_REGISTER, SCRATCH, ACCESS, 0, true));
        } else {
            // Anything denied denies the whole.
            body.push((JUMP_EQUAL_IMMEDIATE, SCRATCH, 0, 0, true));
        }
    }
    for (register, number) in [(MAJOR, rule.major), (MINOR, rule.minor)] {
        if let Some(number) = number {
            body.push((JUMP_NOT_EQUAL_IMMEDIATE, register, 0, number, true));
        }
    }
    let total = body.len() + 2;
    for (index, (code, register, other, immediate, jump)) in body.into_iter().enumerate() {
        let offset = if jump { (total - index - 1) as i16 } else { 0 };
        program.push(instruction(code, register, other, offset, immediate));
    }
    program.push(instruction(MOVE_IMMEDIATE, R0, 0, 0, u32::from(rule.allow)));
    program.push(instruction(EXIT, 0, 0, 0, 0));
}

/// Loads the program and attaches it to the group.
///
/// # Errors
/// When the kernel refuses either.
pub fn attach(group: BorrowedFd<'_>, program: &[u64]) -> Result<()> {
    use std::os::fd::AsFd;
    let loaded = bulkhead_bpf::load(Kind::CgroupDevice, program).step(|| "load device rules")?;
    bulkhead_bpf::attach_to_cgroup(loaded.as_fd(), group).step(|| "attach device rules")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would, on the instructions used here.
    fn run(program: &[u64], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0u64; 11];
        let mut at = 0usize;
        loop {
            let word = program[at];
            let destination = (word >> 8 & 0xf) as usize;
            let source = (word >> 12 & 0xf) as usize;
            let offset = (word >> 16) as u16 as i16;
            let immediate = (word >> 32) as u32;
            at += 1;
            let mut jump = |taken: bool| {
                if taken {
                    at = (at as i64 + i64::from(offset)) as usize;
                }
            };
            match word as u8 {
                LOAD_WORD => registers[destination] = context[offset as usize / 4].into(),
                MOVE_IMMEDIATE => registers[destination] = immediate.into(),
                MOVE_REGISTER => registers[destination] = registers[source],
                AND_IMMEDIATE => registers[destination] &= u64::from(immediate),
                SHIFT_RIGHT_IMMEDIATE => registers[destination] >>= immediate,
                JUMP_EQUAL_IMMEDIATE => jump(registers[destination] == u64::from(immediate)),
                JUMP_NOT_EQUAL_IMMEDIATE => jump(registers[destination] != u64::from(immediate)),
                JUMP_NOT_EQUAL_REGISTER => jump(registers[destination] != registers[source]),
                EXIT => return registers[0] != 0,
                other => panic!("operation {other:#x}"),
            }
        }
    }

    fn rule(
        allow: bool,
        kind: &str,
        major: Option<i64>,
        minor: Option<i64>,
        access: &str,
    ) -> oci::DeviceRule {
        oci::DeviceRule {
            allow,
            type_: kind.into(),
            major,
            minor,
            access: access.into(),
            ..Default::default()
        }
    }

    #[test]
    fn defaults_hold_under_deny_all() {
        let program = compile(&[rule(false, "a", None, None, "rwm")]).unwrap();
        assert!(
            run(&program, TYPE_CHAR, ACCESS_READ | ACCESS_WRITE, 1, 3),
            "null"
        );
        assert!(run(&program, TYPE_CHAR, ACCESS_READ, 136, 7), "pts/7");
        assert!(run(&program, TYPE_BLOCK, ACCESS_MKNOD, 8, 0), "mknod sda");
        assert!(!run(&program, TYPE_BLOCK, ACCESS_READ, 8, 0), "read sda");
        assert!(!run(&program, TYPE_CHAR, ACCESS_READ, 1, 1), "mem");
        assert!(
            !run(&program, TYPE_BLOCK, ACCESS_READ, 1, 3),
            "a block device 1:3"
        );
    }

    #[test]
    fn the_last_matching_rule_decides() {
        let program = compile(&[
            rule(false, "a", None, None, "rwm"),
            rule(true, "b", Some(8), None, "r"),
            rule(false, "b", Some(8), Some(1), "r"),
        ])
        .unwrap();
        assert!(run(&program, TYPE_BLOCK, ACCESS_READ, 8, 0));
        assert!(!run(&program, TYPE_BLOCK, ACCESS_READ, 8, 1));
        assert!(!run(&program, TYPE_BLOCK, ACCESS_READ | ACCESS_WRITE, 8, 0));
    }

    #[test]
    fn allow_all_allows_all() {
        let program = compile(&[rule(true, "a", None, None, "rwm")]).unwrap();
        assert!(run(&program, TYPE_BLOCK, ACCESS_ALL, 259, 3));
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in [
            rule(true, "x", None, None, "r"),
            rule(true, "c", Some(-7), None, "r"),
            rule(true, "c", Some(1), Some(1 << 40), "r"),
            rule(true, "c", Some(1), Some(1), "rx"),
        ] {
            assert!(compile(&[bad]).is_err());
        }
    }

    #[test]
    fn the_kernel_takes_the_program() {
        let program = compile(&[
            rule(false, "a", None, None, "rwm"),
            rule(true, "c", Some(10), Some(200), "rw"),
        ])
        .unwrap();
        match bulkhead_bpf::load(Kind::CgroupDevice, &program) {
            Ok(_) => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOSYS)) => {
                println!("SKIPPED: the_kernel_takes_the_program: bpf(2) is not allowed here");
            }
            Err(error) => panic!("{error}"),
        }
    }
}
