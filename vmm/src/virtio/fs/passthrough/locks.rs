// SPDX-License-Identifier: Apache-2.0
//! Locks of the guest's processes as locks of the host's: others that have the
//! directory, guests or the host's own programs, are kept out, too.
//!
//! `flock` locks belong to an open file, in the guest as on the host. Record locks
//! (`fcntl`) belong to a process, or to an open file, by whatever handles it has
//! them: each owner gets an open file of its own for each inode, whose locks they
//! are (`F_OFD_SETLK`). It is closed when the owner has no lock there any more,
//! closes one of its descriptors of the file, or the handle by which it came goes.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, RawFd},
};

use rustix::fs::{flock, FlockOperation};

use super::{ranges::Ranges, table::Inode, Passthrough};

/// Most parts of files that a guest has locked: the host's kernel keeps each.
const MOST_RANGES: usize = 4096;
/// The last byte that a file can have, which means its end, wherever that is.
const LAST: u64 = i64::MAX as u64;

/// How something is locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// With others.
    Shared,
    /// For oneself.
    Exclusive,
    /// Not at all.
    Unlocked,
}

/// Bytes of a file, the last one among them, and how they are locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    pub start: u64,
    pub end: u64,
    pub kind: Kind,
}

/// What an owner has locked of an inode.
pub struct Held {
    file: File,
    /// The handle by which it came first.
    pub via: u64,
    ranges: Ranges,
}

impl Passthrough {
    /// Locks or unlocks bytes of a file for an owner; false: others have locked
    /// some of them.
    ///
    /// # Errors
    /// There are too many locks (ENOLCK), or no such handle.
    pub fn lock(&self, inode: u64, handle: u64, owner: u64, record: Record) -> io::Result<bool> {
        let wanted = description(record)?;
        let known = self.inode(inode)?;
        let mut table = self.table();
        table.handle(handle, inode)?;
        let key = (inode, owner);
        let mut held = match table.locks.remove(&key) {
            Some(held) => held,
            None if record.kind == Kind::Unlocked => return Ok(true),
            None => {
                table.check_room()?;
                Held {
                    file: self.lockable(&known)?,
                    via: handle,
                    ranges: Ranges::default(),
                }
            }
        };
        let exclusive = match record.kind {
            Kind::Shared => Some(false),
            Kind::Exclusive => Some(true),
            Kind::Unlocked => None,
        };
        let change = |ranges: &mut Ranges| ranges.set(record.start, record.end, exclusive);
        let others: usize = table.locks.values().map(|held| held.ranges.len()).sum();
        let most = MOST_RANGES.saturating_sub(others).max(held.ranges.len());
        // A lock in the midst of another one makes three of it.
        let fits = held.ranges.len() + 2 <= most || {
            let mut ranges = held.ranges.clone();
            change(&mut ranges);
            ranges.len() <= most
        };
        let outcome = match fits {
            true => set(held.file.as_raw_fd(), &wanted),
            false => Err(io::Error::from_raw_os_error(libc::ENOLCK)),
        };
        if matches!(outcome, Ok(true)) {
            change(&mut held.ranges);
        }
        if !held.ranges.is_empty() {
            table.locks.insert(key, held);
        }
        outcome
    }

    /// A lock of others that keeps an owner from having one; none: it could.
    ///
    /// # Errors
    /// There is no such handle.
    pub fn locked(
        &self,
        inode: u64,
        handle: u64,
        owner: u64,
        record: Record,
    ) -> io::Result<Option<Record>> {
        let mut wanted = description(record)?;
        let mut table = self.table();
        let of_handle = table.handle(handle, inode)?.file.as_raw_fd();
        let held = table.locks.get(&(inode, owner));
        let fd = held.map_or(of_handle, |held| held.file.as_raw_fd());
        // SAFETY: the structure outlives the call; the descriptor is open, for the
        // table is held.
        if unsafe { libc::fcntl(fd, libc::F_OFD_GETLK, &raw mut wanted) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let kind = match libc::c_int::from(wanted.l_type) {
            libc::F_UNLCK => return Ok(None),
            libc::F_RDLCK => Kind::Shared,
            _ => Kind::Exclusive,
        };
        let start = u64::try_from(wanted.l_start).unwrap_or(0);
        let end = match u64::try_from(wanted.l_len) {
            Ok(length) if length > 0 => start.saturating_add(length - 1).min(LAST),
            _ => LAST,
        };
        Ok(Some(Record { start, end, kind }))
    }

    /// Locks or unlocks an open file as a whole; false: others have it.
    ///
    /// # Errors
    /// There is no such handle, or the file system has no such locks.
    pub fn flock(&self, inode: u64, handle: u64, kind: Kind) -> io::Result<bool> {
        let operation = match kind {
            Kind::Shared => FlockOperation::NonBlockingLockShared,
            Kind::Exclusive => FlockOperation::NonBlockingLockExclusive,
            Kind::Unlocked => FlockOperation::Unlock,
        };
        let mut table = self.table();
        match flock(&table.handle(handle, inode)?.file, operation) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// An owner has closed a descriptor of the file, and so has no record locks
    /// there any more.
    pub fn unlock_all(&self, inode: u64, owner: u64) {
        self.table().locks.remove(&(inode, owner));
    }

    /// A file of its own, to be locked in both ways where that is possible.
    fn lockable(&self, inode: &Inode) -> io::Result<File> {
        let both = self.reopen(inode, libc::O_RDWR as u32);
        both.or_else(|_| self.reopen(inode, libc::O_RDONLY as u32))
    }
}

/// Tries to; false: others are in the way.
fn set(fd: RawFd, wanted: &libc::flock) -> io::Result<bool> {
    // SAFETY: the structure outlives the call, which only reads it.
    if unsafe { libc::fcntl(fd, libc::F_OFD_SETLK, wanted as *const libc::flock) } == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        error if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        error => Err(error),
    }
}

fn description(record: Record) -> io::Result<libc::flock> {
    let Record { start, end, kind } = record;
    if start > end || end > LAST {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let length = match end {
        LAST => 0,
        // Both are at most the last byte.
        end => (end - start + 1) as i64,
    };
    let kind = match kind {
        Kind::Shared => libc::F_RDLCK,
        Kind::Exclusive => libc::F_WRLCK,
        Kind::Unlocked => libc::F_UNLCK,
    };
    Ok(libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start as i64,
        l_len: length,
        // Of no process.
        l_pid: 0,
    })
}
