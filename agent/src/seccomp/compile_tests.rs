// SPDX-License-Identifier: Apache-2.0
//! The compiled program against the rules it was made from.

use super::*;

const ALLOW: u32 = 0x7fff_0000;
const EPERM: u32 = 0x0005_0001;
const EACCES: u32 = 0x0005_000d;

/// `struct seccomp_data`, as far as filters read it.
#[derive(Clone, Copy, Debug)]
struct Call {
    number: u32,
    architecture: u32,
    arguments: [u64; 6],
}

impl Call {
    fn new(number: u32, arguments: [u64; 6]) -> Self {
        Self {
            number,
            architecture: ARCHITECTURE,
            arguments,
        }
    }

    fn word(&self, offset: u32) -> u32 {
        match offset {
            NUMBER_OFFSET => self.number,
            ARCHITECTURE_OFFSET => self.architecture,
            _ => {
                let place = offset - ARGUMENTS_OFFSET;
                let argument = self.arguments[place as usize / 8];
                (if place % 8 == 0 {
                    argument
                } else {
                    argument >> 32
                }) as u32
            }
        }
    }
}

/// Runs a program as the kernel would; panics where it would refuse it.
fn run(program: &[sock_filter], call: &Call) -> u32 {
    let mut accumulator = 0;
    let mut at = 0;
    loop {
        let sock_filter { code, jt, jf, k } = program[at];
        at += 1;
        let mut jump = |taken: bool| at += usize::from(if taken { jt } else { jf });
        match code {
            LOAD => accumulator = call.word(k),
            AND => accumulator &= k,
            JUMP => at += k as usize,
            JUMP_EQUAL => jump(accumulator == k),
            JUMP_GREATER => jump(accumulator > k),
            JUMP_GREATER_EQUAL => jump(accumulator >= k),
            RETURN => return k,
            other => panic!("operation {other:#x}"),
        }
    }
}

/// What the rules say, read without cleverness.
fn expected(profile: &Profile, call: &Call) -> u32 {
    let mut of_call = profile
        .rules
        .iter()
        .filter(|rule| rule.number == call.number);
    if let Some(rule) = of_call.clone().find(|rule| rule.conditions.is_empty()) {
        return rule.action;
    }
    let newest = profile.rules.iter().map(|rule| rule.number).max();
    if profile.unknown_is_missing && newest.is_some_and(|newest| call.number > newest) {
        return NO_SUCH_CALL;
    }
    let holds = |condition: &Condition| {
        let argument = call.arguments[usize::from(condition.index)];
        let value = condition.value;
        match condition.comparison {
            Comparison::Equal => argument == value,
            Comparison::NotEqual => argument != value,
            Comparison::Less => argument < value,
            Comparison::LessEqual => argument <= value,
            Comparison::Greater => argument > value,
            Comparison::GreaterEqual => argument >= value,
            Comparison::MaskedEqual(mask) => argument & mask == value,
        }
    };
    of_call
        .find(|rule| rule.conditions.iter().all(holds))
        .map_or(profile.default, |rule| rule.action)
}

fn condition(index: u8, comparison: Comparison, value: u64) -> Condition {
    Condition {
        index,
        comparison,
        value,
    }
}

fn rule(number: u32, action: u32, conditions: Vec<Condition>) -> Rule {
    Rule {
        number,
        action,
        conditions,
    }
}

#[test]
fn every_comparison_on_both_halves() {
    let comparisons = [
        Comparison::Equal,
        Comparison::NotEqual,
        Comparison::Less,
        Comparison::LessEqual,
        Comparison::Greater,
        Comparison::GreaterEqual,
        Comparison::MaskedEqual(0xff00_0000_00ff),
        Comparison::MaskedEqual(u64::MAX),
    ];
    let values = [
        0,
        1,
        0xff,
        1 << 32,
        (1 << 32) + 1,
        0x1_0000_00fe,
        u64::MAX,
        u64::MAX - 1,
    ];
    for comparison in comparisons {
        for value in values {
            let profile = Profile {
                default: EPERM,
                rules: vec![rule(10, ALLOW, vec![condition(3, comparison, value)])],
                ..Profile::default()
            };
            let program = compile(&profile).unwrap();
            for argument in values {
                let call = Call::new(10, [9, 9, 9, argument, 9, 9]);
                assert_eq!(
                    run(&program, &call),
                    expected(&profile, &call),
                    "{argument:#x} {comparison:?} {value:#x}"
                );
            }
        }
    }
}

/// A generator of numbers that repeats: xorshift64.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

#[test]
fn random_profiles_agree_with_the_plain_reading() {
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    for _ in 0..200 {
        let count = numbers.next(120);
        let rules = (0..count)
            .map(|_| {
                let conditions = (0..numbers.next(4).saturating_sub(1))
                    .map(|index| {
                        let comparison = match numbers.next(7) {
                            0 => Comparison::Equal,
                            1 => Comparison::NotEqual,
                            2 => Comparison::Less,
                            3 => Comparison::LessEqual,
                            4 => Comparison::Greater,
                            5 => Comparison::GreaterEqual,
                            _ => Comparison::MaskedEqual(numbers.next(16)),
                        };
                        condition(index as u8, comparison, numbers.next(4))
                    })
                    .collect();
                let action = [ALLOW, EPERM, EACCES][numbers.next(3) as usize];
                rule(numbers.next(300) as u32, action, conditions)
            })
            .collect();
        let profile = Profile {
            default: [ALLOW, EPERM][numbers.next(2) as usize],
            unknown_is_missing: numbers.next(2) == 0,
            rules,
            flags: 0,
            listener: None,
        };
        let program = compile(&profile).unwrap();
        for number in 0..310 {
            let arguments = std::array::from_fn(|_| numbers.next(5));
            let call = Call::new(number, arguments);
            assert_eq!(run(&program, &call), expected(&profile, &call), "{call:?}");
        }
    }
}

#[test]
fn other_architectures_are_killed_and_x32_is_missing() {
    let profile = Profile {
        default: ALLOW,
        ..Profile::default()
    };
    let program = compile(&profile).unwrap();
    let mut call = Call::new(1, [0; 6]);
    assert_eq!(run(&program, &call), ALLOW);
    call.number = X32 + 1;
    assert_eq!(run(&program, &call), NO_SUCH_CALL);
    call.architecture = 0x4000_0003;
    assert_eq!(run(&program, &call), KILL_PROCESS);
}

#[test]
fn a_profile_that_is_too_big_is_refused() {
    let rules = (0..462)
        .flat_map(|number| {
            (0..4)
                .map(move |value| rule(number, ALLOW, vec![condition(0, Comparison::Equal, value)]))
        })
        .collect();
    let profile = Profile {
        default: EPERM,
        rules,
        ..Profile::default()
    };
    assert_eq!(compile(&profile).map(|program| program.len()), Err(TooLong));
}

#[test]
fn allowing_everything_else_is_cheap() {
    // Every second call allowed: the worst case for ranges.
    let rules = (0..450)
        .step_by(2)
        .map(|n| rule(n, ALLOW, vec![]))
        .collect();
    let profile = Profile {
        default: EPERM,
        rules,
        ..Profile::default()
    };
    let program = compile(&profile).unwrap();
    assert!(program.len() < 1000, "{}", program.len());
}
