// SPDX-License-Identifier: Apache-2.0
//! Rules as a program of the kernel's packet filter (seccomp(2)), made by the
//! compiler. Two things cost: the kernel runs a new filter for every call there
//! is, to find those that it always allows, and translates it to machine code;
//! and a vCPU's filter runs at each of its entries to the guest. So programs are
//! short, and find a call by halving what is left, in a dozen steps.

use seccompiler::sock_filter;

use super::rules::{Condition, Rule, Test};

/// What the kernel calls x86-64 (linux/audit.h), whose calls these are. Those of
/// the other kinds that a processor can make have the same numbers for others.
const ARCHITECTURE: u32 = 0xc000_003e;
/// Where in `struct seccomp_data` (linux/seccomp.h) the words are.
const NUMBER_AT: u32 = 0;
const ARCHITECTURE_AT: u32 = 4;
const ARGUMENTS_AT: u32 = 16;

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const AND: u32 = libc::BPF_ALU | libc::BPF_AND | libc::BPF_K;
const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const NOT_BELOW: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

/// SECCOMP_RET_ALLOW and SECCOMP_RET_KILL_PROCESS (linux/seccomp.h).
const ALLOW: u32 = 0x7fff_0000;
const KILL: u32 = 0x8000_0000;

/// Most steps of a program: as far as a jump reaches.
const STEPS: usize = 256;
/// Most things that are allowed.
const ENTRIES: usize = 128;
/// Most calls that are compared one after the other.
const LEAF: usize = 4;
/// Most tests for the process's id.
const OWN: usize = 4;

/// A filter, whatever becomes of what it does not allow, and whose it is.
pub struct Program {
    /// From `start` on.
    steps: [sock_filter; STEPS],
    start: usize,
    /// What all else comes to: the last step but one.
    otherwise: usize,
    /// Steps that compare with the process's id.
    own: [usize; OWN],
    owns: usize,
}

impl Program {
    /// The filter that allows what the rules do but for one thing of it, by its
    /// number; without any, they are not as many.
    pub const fn new(rules: [&[Rule]; 2], left_out: usize) -> Self {
        let calls = Calls::new(rules, left_out);
        let mut program = Self {
            steps: [const { plain(RETURN, KILL) }; STEPS],
            start: STEPS,
            otherwise: STEPS - 2,
            own: [0; OWN],
            owns: 0,
        };
        // From the end on: how far jumps go is known then.
        program.put(plain(RETURN, ALLOW));
        program.put(plain(RETURN, KILL));
        program.tree(&calls, 0, calls.count);
        program.put(plain(LOAD, NUMBER_AT));
        program.put(plain(RETURN, KILL));
        program.put(branch(EQUAL, ARCHITECTURE, 1, 0));
        program.put(plain(LOAD, ARCHITECTURE_AT));
        program
    }

    /// The filter for a process; what it does not allow comes to `otherwise`.
    pub fn finish(&self, otherwise: u32, process: u32) -> Vec<sock_filter> {
        let mut steps = self.steps[self.start..].to_vec();
        steps[self.otherwise - self.start].k = otherwise;
        for at in &self.own[..self.owns] {
            steps[at - self.start].k = process;
        }
        steps
    }

    /// For calls from one place to another; the number is loaded.
    const fn tree(&mut self, calls: &Calls, from: usize, to: usize) {
        if to - from <= LEAF {
            self.leaf(calls, from, to);
            return;
        }
        let middle = from + (to - from) / 2;
        self.tree(calls, middle, to);
        let high = self.start;
        self.tree(calls, from, middle);
        let pivot = calls.number(middle);
        self.put(branch(NOT_BELOW, pivot, self.reach(high), 0));
    }

    /// Compares with each in turn; behind are the tests of those that have some.
    const fn leaf(&mut self, calls: &Calls, from: usize, to: usize) {
        let mut targets = [STEPS - 1; LEAF];
        let mut at = to;
        while at > from {
            at -= 1;
            if !calls.is_free(at) {
                self.tests(calls, at);
                targets[at - from] = self.start;
            }
        }
        at = to;
        let mut next = self.otherwise;
        while at > from {
            at -= 1;
            let (there, else_there) = (self.reach(targets[at - from]), self.reach(next));
            self.put(branch(EQUAL, calls.number(at), there, else_there));
            next = self.start;
        }
    }

    /// The tests of a call, one after the other.
    const fn tests(&mut self, calls: &Calls, at: usize) {
        let (first, end) = calls.entries(at);
        let mut next = self.otherwise;
        let mut entry = end;
        while entry > first {
            entry -= 1;
            let test = calls.test(entry);
            let mut position = test.len();
            // Where it goes on when the condition holds.
            let mut then = STEPS - 1;
            while position > 0 {
                position -= 1;
                let (argument, mask, value) = match test[position] {
                    Condition::Is(argument, value) => (argument, None, value as u32),
                    Condition::Bits(argument, mask, value) => {
                        (argument, Some(mask as u32), value as u32)
                    }
                    Condition::OwnProcess(argument) => (argument, None, 0),
                };
                let (there, else_there) = (self.reach(then), self.reach(next));
                self.put(branch(EQUAL, value, there, else_there));
                if let Condition::OwnProcess(_) = test[position] {
                    self.own[self.owns] = self.start;
                    self.owns += 1;
                }
                // What the test before has loaded need not be loaded again.
                let loaded = position == 0
                    && mask.is_none()
                    && entry > first
                    && loads_only(calls.test(entry - 1), argument);
                if !loaded {
                    if let Some(mask) = mask {
                        self.put(plain(AND, mask));
                    }
                    self.put(plain(LOAD, ARGUMENTS_AT + 8 * argument as u32));
                }
                then = self.start;
            }
            next = self.start;
        }
    }

    /// How far it is from the next step's place to one that is there.
    const fn reach(&self, there: usize) -> u8 {
        // No program is longer.
        (there - self.start) as u8
    }

    const fn put(&mut self, step: sock_filter) {
        self.start -= 1;
        self.steps[self.start] = step;
    }
}

/// What is allowed: a call, and what must hold.
#[derive(Clone, Copy)]
struct Entry {
    number: u32,
    test: Option<&'static Test>,
}

/// All that is allowed, in the order of the calls' numbers.
struct Calls {
    entries: [Entry; ENTRIES],
    /// Of each call, where its first entry is; and of the one after the last.
    firsts: [usize; ENTRIES + 1],
    count: usize,
}

impl Calls {
    const fn new(rules: [&[Rule]; 2], left_out: usize) -> Self {
        let nothing = Entry {
            number: 0,
            test: None,
        };
        let mut entries = [nothing; ENTRIES];
        let (mut length, mut number) = (0, 0);
        let mut table = 0;
        while table < rules.len() {
            let mut index = 0;
            while index < rules[table].len() {
                let rule = &rules[table][index];
                let mut test = 0;
                // One without tests is one thing as well.
                while test == 0 || test < rule.tests.len() {
                    if number != left_out {
                        let entry = Entry {
                            number: rule.call as u32,
                            test: match rule.tests.len() {
                                0 => None,
                                _ => Some(rule.tests[test]),
                            },
                        };
                        insert(&mut entries, length, entry);
                        length += 1;
                    }
                    number += 1;
                    test += 1;
                }
                index += 1;
            }
            table += 1;
        }
        let mut firsts = [length; ENTRIES + 1];
        let (mut count, mut at) = (0, 0);
        while at < length {
            if at == 0 || entries[at].number != entries[at - 1].number {
                firsts[count] = at;
                count += 1;
            }
            at += 1;
        }
        Self {
            entries,
            firsts,
            count,
        }
    }

    const fn number(&self, at: usize) -> u32 {
        self.entries[self.firsts[at]].number
    }

    const fn entries(&self, at: usize) -> (usize, usize) {
        (self.firsts[at], self.firsts[at + 1])
    }

    /// Whether a call is allowed always.
    const fn is_free(&self, at: usize) -> bool {
        let (mut entry, end) = self.entries(at);
        while entry < end {
            if self.entries[entry].test.is_none() {
                return true;
            }
            entry += 1;
        }
        false
    }

    const fn test(&self, entry: usize) -> &'static Test {
        match self.entries[entry].test {
            Some(test) => test,
            None => &[],
        }
    }
}

/// Puts an entry where it belongs among those that are there, behind its like.
const fn insert(entries: &mut [Entry; ENTRIES], length: usize, entry: Entry) {
    let mut at = length;
    while at > 0 && entries[at - 1].number > entry.number {
        entries[at] = entries[at - 1];
        at -= 1;
    }
    entries[at] = entry;
}

/// Whether after a test, whichever way it ends, that argument is what was loaded.
const fn loads_only(test: &Test, wanted: u8) -> bool {
    match test {
        [Condition::Is(argument, _) | Condition::OwnProcess(argument)] => *argument == wanted,
        _ => false,
    }
}

const fn plain(code: u32, value: u32) -> sock_filter {
    branch(code, value, 0, 0)
}

const fn branch(code: u32, value: u32, if_so: u8, if_not: u8) -> sock_filter {
    sock_filter {
        // Codes are less than 2^8.
        code: code as u16,
        jt: if_so,
        jf: if_not,
        k: value,
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            rules::{allowed, Condition},
            seccomp::{unfinished, Worker},
        },
        *,
    };

    const PROCESS: u32 = 4711;
    const OTHERWISE: u32 = 2;

    /// What the kernel would do, and how many steps it takes.
    fn run(
        program: &[sock_filter],
        architecture: u32,
        number: u32,
        arguments: [u64; 6],
    ) -> (u32, usize) {
        let (mut at, mut accumulator, mut steps) = (0, 0, 0);
        loop {
            let step = &program[at];
            (at, steps) = (at + 1, steps + 1);
            match u32::from(step.code) {
                LOAD => {
                    accumulator = match step.k {
                        NUMBER_AT => number,
                        ARCHITECTURE_AT => architecture,
                        word => {
                            let word = (word - ARGUMENTS_AT) as usize;
                            assert_eq!(word % 8, 0);
                            arguments[word / 8] as u32
                        }
                    }
                }
                AND => accumulator &= step.k,
                RETURN => return (step.k, steps),
                code @ (EQUAL | NOT_BELOW) => {
                    let so = match code {
                        EQUAL => accumulator == step.k,
                        _ => accumulator >= step.k,
                    };
                    at += usize::from(if so { step.jt } else { step.jf });
                }
                code => panic!("{code:#x}"),
            }
        }
    }

    /// What the rules say.
    fn is_allowed(worker: Worker, number: u32, arguments: [u64; 6]) -> bool {
        let holds = |condition: &Condition| {
            let low = |argument: u8| arguments[usize::from(argument)] & u64::from(u32::MAX);
            match *condition {
                Condition::Is(argument, value) => low(argument) == value,
                Condition::Bits(argument, mask, value) => low(argument) & mask == value,
                Condition::OwnProcess(argument) => low(argument) == u64::from(PROCESS),
            }
        };
        allowed(worker).any(|allowed| {
            allowed.call == i64::from(number)
                && allowed.test.is_none_or(|test| test.iter().all(holds))
        })
    }

    fn filter(worker: Worker) -> Vec<sock_filter> {
        unfinished(worker).finish(OTHERWISE, PROCESS)
    }

    /// Arguments that fulfil a test, and those that miss one condition of it.
    fn tried(test: &Test) -> Vec<[u64; 6]> {
        let mut good = [0; 6];
        for condition in test {
            match *condition {
                Condition::Is(argument, value) => good[usize::from(argument)] = value,
                Condition::Bits(argument, _, value) => good[usize::from(argument)] = value,
                Condition::OwnProcess(argument) => good[usize::from(argument)] = PROCESS.into(),
            }
        }
        let mut all = vec![good];
        for argument in 0..6 {
            for bit in [0, 1, 2, 5, 31, 32, 63] {
                let mut other = good;
                other[argument] ^= 1 << bit;
                all.push(other);
            }
        }
        all
    }

    #[test]
    fn a_filter_says_what_the_rules_say() {
        for worker in Worker::ALL {
            let program = filter(worker);
            let mut all: Vec<[u64; 6]> = allowed(worker)
                .filter_map(|allowed| allowed.test)
                .flat_map(tried)
                .collect();
            all.extend([[0; 6], [u64::MAX; 6]]);
            for number in (0..600).chain([u32::MAX, 1 << 30, (1 << 30) + 1]) {
                for arguments in &all {
                    let (verdict, _) = run(&program, ARCHITECTURE, number, *arguments);
                    let expected = match is_allowed(worker, number, *arguments) {
                        true => ALLOW,
                        false => OTHERWISE,
                    };
                    assert_eq!(verdict, expected, "{worker:?}: {number} {arguments:x?}");
                }
            }
        }
    }

    #[test]
    fn calls_of_another_kind_are_not_looked_at() {
        for worker in Worker::ALL {
            let program = filter(worker);
            for number in 0..600 {
                // i386's.
                let (verdict, steps) = run(&program, 0x4000_0003, number, [0; 6]);
                assert_eq!((verdict, steps), (KILL, 3));
            }
        }
    }

    #[test]
    fn filters_are_short_and_find_a_call_in_few_steps() {
        for worker in Worker::ALL {
            let program = filter(worker);
            assert!(program.len() < 250, "{worker:?}: {}", program.len());
            for number in 0..600 {
                // No argument is what a test wants.
                let (_, steps) = run(&program, ARCHITECTURE, number, [u64::MAX; 6]);
                let tests = allowed(worker).filter(|a| a.call == i64::from(number));
                let most = 16 + 4 * tests.filter(|a| a.test.is_some()).count();
                assert!(steps <= most, "{worker:?}: {number}: {steps}");
            }
        }
    }
}
