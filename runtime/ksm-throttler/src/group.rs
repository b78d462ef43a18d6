// SPDX-License-Identifier: Apache-2.0
//! Merge groups: pods that may share pages with each other, and with no others.
//!
//! The kernel merges all mergeable memory that has the same contents, whoever
//! it belongs to: it keeps no groups apart. So one group at a time may have
//! mergeable memory on a host. Its name is in a file, and each of its virtual
//! machines holds a shared lock (flock) on that file for as long as its memory
//! is there: the kernel takes the lock away from whatever dies, however it does.
//! The name is only replaced by who gets the lock for itself alone. Nobody needs
//! to run for it, and a daemon that is absent makes nothing unsafe.
//!
//! Looking and locking are two steps; a second file lets one do both at a time.

use std::{
    fmt,
    fs::{File, OpenOptions},
    io::{self, Read},
    os::{
        fd::OwnedFd,
        unix::fs::{FileExt, OpenOptionsExt},
    },
    path::Path,
    str::FromStr,
    thread,
    time::{Duration, Instant},
};

use rustix::fs::{flock, FlockOperation};

use crate::socket;

/// Where the group's name is. One for the host, as KSM is, wherever pods keep
/// their state.
pub const RECORD: &str = "/run/bulkhead/merge-group";

/// Longest name.
pub const LONGEST: usize = 63;

/// How long others may take for the two steps.
const PATIENCE: Duration = Duration::from_secs(1);

/// A group's name: letters, digits, `_`, `.` and `-`, beginning with a letter or
/// digit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name(String);

/// What is wrong with a name.
#[derive(Debug, thiserror::Error)]
#[error(
    "{0:?} is not a group's name: letters, digits, '_', '.' and '-', at most {LONGEST}, beginning with a letter or digit"
)]
pub struct BadName(String);

impl FromStr for Name {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        let good = text.len() <= LONGEST
            && text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
        if good {
            Ok(Self(text.into()))
        } else {
            Err(BadName(text.into()))
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for Name {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

/// What came of joining.
#[derive(Debug)]
pub enum Joined {
    /// A member for as long as any copy of this descriptor is open.
    Member(OwnedFd),
    /// Not a member: this other group has mergeable memory now.
    Refused(Name),
}

/// Joins a group, if no other has members.
///
/// # Errors
/// The record cannot be used; it then is not known who has mergeable memory.
pub fn join(record: &Path, name: &Name) -> io::Result<Joined> {
    socket::make_parent(record)?;
    let _gate = gate(record)?;
    let file = options().create(true).open(record)?;
    if lock(&file, FlockOperation::NonBlockingLockExclusive)? {
        // No group has members.
        file.set_len(0)?;
        file.write_all_at(name.as_ref().as_bytes(), 0)?;
    } else {
        let current = read(&file)?;
        if current != *name {
            return Ok(Joined::Refused(current));
        }
    }
    // Nobody else's turn in between: they would have to pass the gate.
    match lock(&file, FlockOperation::NonBlockingLockShared)? {
        true => Ok(Joined::Member(file.into())),
        false => Err(io::Error::other("locked by another program")),
    }
}

/// The group that has members now.
///
/// # Errors
/// The record cannot be used.
pub fn current(record: &Path) -> io::Result<Option<Name>> {
    let file = match options().open(record) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let _gate = gate(record)?;
    if lock(&file, FlockOperation::NonBlockingLockExclusive)? {
        return Ok(None);
    }
    read(&file).map(Some)
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    options
}

/// Closing it opens the gate for the next one.
fn gate(record: &Path) -> io::Result<File> {
    let mut path = record.as_os_str().to_owned();
    path.push(".lock");
    let file = options().create(true).open(path)?;
    let end = Instant::now() + PATIENCE;
    // Not waited for in the kernel: who holds it may have been stopped.
    while !lock(&file, FlockOperation::NonBlockingLockExclusive)? {
        if Instant::now() > end {
            return Err(io::ErrorKind::TimedOut.into());
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(file)
}

/// Whether it got the lock.
fn lock(file: &File, how: FlockOperation) -> io::Result<bool> {
    loop {
        return match flock(file, how) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => Err(error.into()),
        };
    }
}

fn read(file: &File) -> io::Result<Name> {
    let mut text = String::new();
    file.take(LONGEST as u64 + 1).read_to_string(&mut text)?;
    text.parse()
        .map_err(|error: BadName| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    fn member(record: &Path, text: &str) -> OwnedFd {
        match join(record, &name(text)).unwrap() {
            Joined::Member(fd) => fd,
            Joined::Refused(other) => panic!("{other} is there"),
        }
    }

    /// What other tests start has copies for a moment, until its exec.
    fn is_free(record: &Path) {
        let end = Instant::now() + Duration::from_secs(5);
        while current(record).unwrap().is_some() {
            assert!(Instant::now() < end, "it still has members");
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn names_are_words() {
        for good in ["a", "team-a", "A.b_c-1", &"x".repeat(63)] {
            assert_eq!(name(good).to_string(), *good);
        }
        for bad in ["", "-a", "a b", "a/b", "\u{e4}", "a\n", &"x".repeat(64)] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn one_group_at_a_time_has_members() {
        let dir = tempfile::tempdir().unwrap();
        let record = dir.path().join("run/group");
        assert_eq!(current(&record).unwrap(), None);
        let first = member(&record, "red");
        let second = member(&record, "red");
        assert_eq!(current(&record).unwrap(), Some(name("red")));
        for _ in 0..2 {
            match join(&record, &name("blue")).unwrap() {
                Joined::Refused(other) => assert_eq!(other, name("red")),
                Joined::Member(_) => panic!("two groups"),
            }
        }
        // One member is a member, and a copy of its descriptor is as good.
        drop(first);
        let copy = second.try_clone().unwrap();
        drop(second);
        assert!(matches!(
            join(&record, &name("blue")).unwrap(),
            Joined::Refused(_)
        ));
        drop(copy);
        is_free(&record);
        let _blue = member(&record, "blue");
        assert_eq!(current(&record).unwrap(), Some(name("blue")));
    }

    #[test]
    fn many_at_once_agree() {
        let dir = tempfile::tempdir().unwrap();
        let record = dir.path().join("group");
        let all: Vec<(String, Option<OwnedFd>)> = thread::scope(|scope| {
            let threads: Vec<_> = (0..16)
                .map(|number| {
                    let record = &record;
                    scope.spawn(move || {
                        let text = format!("g{}", number % 2);
                        let joined = match join(record, &name(&text)).unwrap() {
                            Joined::Member(fd) => Some(fd),
                            Joined::Refused(_) => None,
                        };
                        (text, joined)
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let winner = current(&record).unwrap().unwrap();
        for (text, joined) in &all {
            assert_eq!(joined.is_some(), text == winner.as_ref(), "{text}");
        }
    }

    #[test]
    fn the_lock_of_a_killed_process_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let record = dir.path().join("group");
        let held = member(&record, "red");
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .stdin(std::process::Stdio::from(held))
            .spawn()
            .unwrap();
        assert_eq!(current(&record).unwrap(), Some(name("red")));
        child.kill().unwrap();
        child.wait().unwrap();
        is_free(&record);
    }

    #[test]
    fn a_damaged_record_is_refused_while_it_is_held() {
        let dir = tempfile::tempdir().unwrap();
        let record = dir.path().join("group");
        let held = member(&record, "red");
        std::fs::write(&record, "a b").unwrap();
        let error = join(&record, &name("red")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        drop(held);
        let end = Instant::now() + Duration::from_secs(5);
        while join(&record, &name("red")).is_err() {
            assert!(Instant::now() < end, "it is still held");
            thread::sleep(Duration::from_millis(5));
        }
    }
}
