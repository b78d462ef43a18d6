// SPDX-License-Identifier: Apache-2.0
//! What the child of clone3 and the agent tell each other over their socket.
//!
//! The child of a new user namespace first waits for "mapped": its ids are
//! known now. A child sends at most one terminal and one seccomp listener, then
//! "ready" or a failure.
//! The agent answers "ready" with "go"; then the socket closes because the
//! program was executed, or a failure comes. Each message is one packet: a
//! letter, then its contents.

use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::path::Path;

use nix::errno::Errno;

use crate::error::AgentError;
use crate::steps::Steps;
use crate::sys::fd;

/// Longest message; texts are cut to fit.
pub const LONGEST: usize = 4096;

/// Why a child gave up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What it was doing; the whole message when `errno` is 0.
    pub step: String,
    /// What it did it to; may be empty.
    pub path: String,
    /// The kernel's answer, or 0.
    pub errno: i32,
    /// Whether the request is to blame and not the guest.
    pub invalid: bool,
}

/// Results within the child.
pub type Done<T> = Result<T, Failure>;

impl Failure {
    /// The request asks for something that cannot be.
    pub fn invalid(text: impl Into<String>) -> Self {
        Self {
            step: text.into(),
            path: String::new(),
            errno: 0,
            invalid: true,
        }
    }

    /// Something that the request wants run has failed.
    pub fn other(text: String) -> Self {
        Self {
            invalid: false,
            ..Self::invalid(text)
        }
    }

    /// A system call failed.
    pub fn step(step: &str, path: &Path, errno: Errno) -> Self {
        Self {
            step: step.to_owned(),
            path: path.display().to_string(),
            errno: errno as i32,
            invalid: false,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.step)?;
        if !self.path.is_empty() {
            write!(f, " {}", self.path)?;
        }
        if self.errno != 0 {
            write!(f, ": {}", Errno::from_raw(self.errno).desc())?;
        }
        Ok(())
    }
}

impl From<Failure> for AgentError {
    fn from(failure: Failure) -> Self {
        let text = failure.to_string();
        if failure.invalid {
            Self::Invalid(text)
        } else {
            Self::Internal(text)
        }
    }
}

/// Names the step and the path in which a system call failed.
pub trait At<T> {
    /// Turns an errno into a [`Failure`].
    fn at(self, step: &str, path: impl AsRef<Path>) -> Done<T>;
}

impl<T> At<T> for nix::Result<T> {
    fn at(self, step: &str, path: impl AsRef<Path>) -> Done<T> {
        self.map_err(|errno| Failure::step(step, path.as_ref(), errno))
    }
}

impl<T> At<T> for std::io::Result<T> {
    fn at(self, step: &str, path: impl AsRef<Path>) -> Done<T> {
        self.map_err(|error| Failure::step(step, path.as_ref(), crate::error::errno_of(&error)))
    }
}

/// A message from the child.
#[derive(Debug)]
pub enum Report {
    /// Everything is set up; waiting for "go".
    Ready(Steps),
    /// The master of the process's terminal.
    Terminal(OwnedFd),
    /// The child's number of the descriptor for its seccomp listener.
    Listener(RawFd),
    /// It is over.
    Failed(Failure),
}

const READY: u8 = b'R';
const TERMINAL: u8 = b'T';
const LISTENER: u8 = b'L';
const FAILED: u8 = b'F';
const GO: u8 = b'G';
const MAPPED: u8 = b'M';

/// From the child by plain write(2): a seccomp profile that is in force by now
/// need not allow more.
fn say(socket: BorrowedFd<'_>, message: &[u8]) -> nix::Result<()> {
    fd::write(socket, message).map(drop)
}

/// Sends [`Report::Ready`].
pub fn send_ready(socket: BorrowedFd<'_>, steps: &Steps) -> nix::Result<()> {
    let mut message = vec![READY];
    message.extend(steps.encode());
    say(socket, &message)
}

/// Sends [`Report::Terminal`].
pub fn send_terminal(socket: BorrowedFd<'_>, master: BorrowedFd<'_>) -> nix::Result<()> {
    fd::send_with_fd(socket, &[TERMINAL], master)
}

/// Sends [`Report::Listener`]: the agent takes the descriptor itself, for the
/// filter need not allow sendmsg(2).
pub fn send_listener(socket: BorrowedFd<'_>, number: RawFd) -> nix::Result<()> {
    let mut message = vec![LISTENER];
    message.extend(number.to_le_bytes());
    say(socket, &message)
}

/// Sends [`Report::Failed`].
pub fn send_failure(socket: BorrowedFd<'_>, failure: &Failure) -> nix::Result<()> {
    say(socket, &encode(failure))
}

/// Answers [`Report::Ready`].
pub fn send_go(socket: BorrowedFd<'_>) -> nix::Result<()> {
    crate::sys::socket::send(socket, &[GO])
}

/// Waits for "go" (in the child). `false`: the agent is gone.
pub fn await_go(socket: BorrowedFd<'_>) -> nix::Result<bool> {
    await_letter(socket, GO)
}

/// Tells a child that its user namespace has its ids.
pub fn send_mapped(socket: BorrowedFd<'_>) -> nix::Result<()> {
    crate::sys::socket::send(socket, &[MAPPED])
}

/// Waits for "mapped" (in the child). `false`: the agent is gone.
pub fn await_mapped(socket: BorrowedFd<'_>) -> nix::Result<bool> {
    await_letter(socket, MAPPED)
}

fn await_letter(socket: BorrowedFd<'_>, letter: u8) -> nix::Result<bool> {
    let mut buffer = [0u8; 8];
    loop {
        match fd::read(socket, &mut buffer) {
            Err(Errno::EINTR) => {}
            other => return other.map(|count| count == 1 && buffer[0] == letter),
        }
    }
}

/// Receives one message; `None` when the child's end is closed.
///
/// # Errors
/// EAGAIN when there is none yet, EPROTO for one that makes no sense.
pub fn receive(socket: BorrowedFd<'_>) -> nix::Result<Option<Report>> {
    let mut buffer = [0u8; LONGEST];
    let (count, passed) = fd::receive_with_fd(socket, &mut buffer)?;
    match count {
        0 => Ok(None),
        count => understand(&buffer[..count], passed).map(Some),
    }
}

/// What a message says.
///
/// # Errors
/// EPROTO for one that makes no sense.
pub fn understand(message: &[u8], passed: Option<OwnedFd>) -> nix::Result<Report> {
    let (letter, rest) = message.split_first().ok_or(Errno::EPROTO)?;
    match (*letter, passed) {
        (READY, None) => Steps::decode(rest).map(Report::Ready).ok_or(Errno::EPROTO),
        (TERMINAL, Some(master)) => Ok(Report::Terminal(master)),
        (LISTENER, None) => match <[u8; 4]>::try_from(rest) {
            Ok(number) => Ok(Report::Listener(RawFd::from_le_bytes(number))),
            Err(_) => Err(Errno::EPROTO),
        },
        (FAILED, None) => decode(rest).map(Report::Failed).ok_or(Errno::EPROTO),
        _ => Err(Errno::EPROTO),
    }
}

/// For a fuzz target: a message of a child's.
#[cfg(feature = "fuzzing")]
pub fn fuzz(bytes: &[u8]) {
    if let Ok(Report::Failed(failure)) = understand(bytes, None) {
        assert!(encode(&failure).len() <= LONGEST);
    }
}

fn encode(failure: &Failure) -> Vec<u8> {
    let mut bytes = vec![FAILED, u8::from(failure.invalid)];
    bytes.extend(failure.errno.to_le_bytes());
    bytes.extend(
        failure
            .step
            .bytes()
            .filter(|byte| *byte != 0)
            .take(LONGEST / 2),
    );
    bytes.push(0);
    bytes.extend(failure.path.bytes().take(LONGEST / 2 - 8));
    bytes
}

fn decode(bytes: &[u8]) -> Option<Failure> {
    let (invalid, rest) = bytes.split_first()?;
    let (errno, rest) = rest.split_first_chunk::<4>()?;
    let end = rest.iter().position(|byte| *byte == 0)?;
    Some(Failure {
        step: String::from_utf8_lossy(&rest[..end]).into_owned(),
        path: String::from_utf8_lossy(&rest[end + 1..]).into_owned(),
        errno: i32::from_le_bytes(*errno),
        invalid: *invalid != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn failures_survive_the_socket() {
        let (a, b) = fd::packet_pair().unwrap();
        let failure = Failure::step("mount", Path::new("/proc"), Errno::EPERM);
        send_failure(a.as_fd(), &failure).unwrap();
        drop(a);
        let Some(Report::Failed(got)) = receive(b.as_fd()).unwrap() else {
            panic!("no failure");
        };
        assert_eq!(got, failure);
        assert_eq!(got.to_string(), "mount /proc: Operation not permitted");
        assert!(receive(b.as_fd()).unwrap().is_none());
    }

    #[test]
    fn long_texts_fit_one_message() {
        let failure = Failure {
            step: "s".repeat(9000),
            path: "p".repeat(9000),
            errno: 1,
            invalid: true,
        };
        let bytes = encode(&failure);
        assert!(bytes.len() <= LONGEST, "{}", bytes.len());
        assert!(decode(&bytes[1..]).is_some());
    }

    #[test]
    fn a_terminal_comes_with_its_descriptor() {
        let (a, b) = fd::packet_pair().unwrap();
        let (read, _write) = fd::pipe().unwrap();
        send_terminal(a.as_fd(), read.as_fd()).unwrap();
        assert!(matches!(
            receive(b.as_fd()).unwrap(),
            Some(Report::Terminal(_))
        ));
    }
}
