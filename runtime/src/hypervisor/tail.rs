// SPDX-License-Identifier: Apache-2.0
//! The end of what somebody untrusted has written.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

/// The last bytes of a stream; shared between who reads it and who tells.
#[derive(Debug, Clone)]
pub struct Tail {
    bytes: Arc<Mutex<VecDeque<u8>>>,
    limit: usize,
}

impl Tail {
    /// Keeps `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self {
            bytes: Arc::default(),
            limit,
        }
    }

    /// Adds what was read.
    pub fn push(&self, data: &[u8]) {
        let data = &data[data.len().saturating_sub(self.limit)..];
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let surplus = (bytes.len() + data.len()).saturating_sub(self.limit);
        bytes.drain(..surplus);
        bytes.extend(data);
    }

    /// The last `lines` lines, fit to be shown: the other side could have
    /// written anything, so control characters do not pass.
    pub fn lines(&self, lines: usize) -> Vec<String> {
        let bytes: Vec<u8> = {
            let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
            bytes.iter().copied().collect()
        };
        let text = String::from_utf8_lossy(&bytes);
        let mut kept: Vec<String> = text
            .lines()
            .rev()
            .map(printable)
            .filter(|line| !line.is_empty())
            .take(lines)
            .collect();
        kept.reverse();
        kept
    }
}

/// A line without control characters and escape sequences.
pub fn printable(line: &str) -> String {
    let mut text = String::with_capacity(line.len());
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        if c == '\u{1b}' {
            // A control sequence ends with a byte from @ to ~ (ECMA-48 §5.4).
            if chars.as_str().starts_with('[') {
                chars.next();
                for c in chars.by_ref() {
                    if ('@'..='~').contains(&c) {
                        break;
                    }
                }
            }
        } else if c == '\t' {
            text.push(' ');
        } else if !c.is_control() {
            text.push(c);
        }
    }
    text.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_is_kept() {
        let tail = Tail::new(8);
        tail.push(b"first\nsecond\n");
        tail.push(b"3\n");
        assert_eq!(tail.lines(9), ["econd", "3"]);
        assert_eq!(tail.lines(1), ["3"]);
    }

    #[test]
    fn what_a_guest_writes_cannot_drive_a_terminal() {
        let tail = Tail::new(100);
        tail.push(b"\x1b[31;1mred\x1b[0m\x07 and\r\tplain\xff\n\n");
        assert_eq!(tail.lines(5), ["red and plain\u{fffd}"]);
    }
}
