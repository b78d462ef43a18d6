// SPDX-License-Identifier: Apache-2.0
//! Locks that are the host's.

use std::os::fd::AsRawFd;

use rustix::fs::{flock, FlockOperation};

use super::*;
use crate::virtio::fs::{device::TIMER, locks::MOST_WAITING};

const FLUSH: u32 = 25;
const GETLK: u32 = 31;
const SETLK: u32 = 32;
const SETLKW: u32 = 33;
const INTERRUPT: u32 = 36;
const READ_LOCK: i32 = libc::F_RDLCK;
const WRITE_LOCK: i32 = libc::F_WRLCK;
const UNLOCK: i32 = libc::F_UNLCK;
const LAST: u64 = i64::MAX as u64;

/// A lock of a process of the guest's.
#[derive(Clone, Copy)]
struct Lock {
    inode: u64,
    handle: u64,
    owner: u64,
    flock: bool,
}

impl Lock {
    fn body(self, start: u64, end: u64, kind: i32) -> Vec<u8> {
        let mut body = Vec::new();
        for number in [self.handle, self.owner, start, end] {
            body.extend_from_slice(&number.to_le_bytes());
        }
        for number in [kind as u32, 1, u32::from(self.flock), 0] {
            body.extend_from_slice(&number.to_le_bytes());
        }
        body
    }
}

impl Guest {
    fn locking() -> Self {
        let config = FsConfig {
            host_locks: true,
            ..config("shared")
        };
        Self::with_config(&config, None)
    }

    fn lock_of(&mut self, inode: u64, owner: u64) -> Lock {
        Lock {
            inode,
            handle: self.open(OPEN, inode, libc::O_RDWR),
            owner,
            flock: false,
        }
    }

    fn lock(&mut self, lock: Lock, range: (u64, u64), kind: i32) -> Result<(), i32> {
        let body = lock.body(range.0, range.1, kind);
        self.call(SETLK, lock.inode, &body, 0).map(drop)
    }

    /// Who is in the way: start, end and kind.
    fn holder(&mut self, lock: Lock, range: (u64, u64), kind: i32) -> (u64, u64, i32) {
        let body = lock.body(range.0, range.1, kind);
        let answer = self.call(GETLK, lock.inode, &body, 24).unwrap();
        (long(&answer, 0), long(&answer, 8), word(&answer, 16) as i32)
    }

    /// Asks for a lock that is waited for; where the answer will be.
    fn wait(&mut self, lock: Lock, range: (u64, u64), kind: i32, unique: u64) -> u64 {
        let body = lock.body(range.0, range.1, kind);
        let mut request = self.header(IN_HEADER + body.len(), SETLKW, lock.inode);
        request[8..16].copy_from_slice(&unique.to_le_bytes());
        request.extend_from_slice(&body);
        let input = self.driver.buffer(request.len() as u64);
        self.driver.write(input, &request);
        let output = self.driver.buffer(OUT_HEADER as u64);
        let chain = [
            (input, request.len() as u32, READ_ONLY),
            (output, OUT_HEADER as u32, READ_WRITE),
        ];
        self.driver.queue(REQUESTS, &chain);
        self.driver.kick(REQUESTS);
        output
    }

    /// The answer there, to that request.
    fn answered(&mut self, at: u64, unique: u64) -> i32 {
        let answer = self.driver.read(at, OUT_HEADER);
        assert_eq!(word(&answer, 0), OUT_HEADER as u32);
        assert_eq!(long(&answer, 8), unique);
        -(word(&answer, 4) as i32)
    }

    fn close(&mut self, lock: Lock) {
        let mut body = lock.handle.to_le_bytes().to_vec();
        body.resize(24, 0);
        self.call(RELEASE, lock.inode, &body, 0).unwrap();
    }

    fn flush(&mut self, lock: Lock) {
        let mut body = lock.handle.to_le_bytes().to_vec();
        body.resize(16, 0);
        body.extend_from_slice(&lock.owner.to_le_bytes());
        self.call(FLUSH, lock.inode, &body, 0).unwrap();
    }

    /// A file of the host's own.
    fn host(&self) -> File {
        File::options()
            .read(true)
            .write(true)
            .open(self.path("file"))
            .unwrap()
    }
}

/// Locks one of the host's files from a byte on, if nobody else has.
fn host_locks(file: &File, from: i64, kind: i32) -> bool {
    let lock = libc::flock {
        l_type: kind as i16,
        l_whence: 0,
        l_start: from,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the structure outlives the call.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) == 0 }
}

#[test]
fn locks_are_negotiated_where_they_are_wanted() {
    let flags = |mut guest: Guest| {
        let mut body = Vec::new();
        for word in [7, 36, 1 << 17, u32::MAX, u32::MAX] {
            body.extend_from_slice(&u32::to_le_bytes(word));
        }
        body.resize(64, 0);
        word(&guest.call(INIT, 0, &body, 64).unwrap(), 12)
    };
    // FUSE_POSIX_LOCKS and FUSE_FLOCK_LOCKS.
    let both = 1 << 1 | 1 << 10;
    assert_eq!(flags(Guest::locking()) & both, both);
    assert_eq!(flags(Guest::new()) & both, 0);
    let mut guest = Guest::new();
    let inode = long(&guest.lookup(ROOT, b"file").unwrap(), 0);
    let lock = guest.lock_of(inode, 1);
    assert_eq!(guest.lock(lock, (0, 9), READ_LOCK), Err(libc::ENOSYS));
}

#[test]
fn record_locks_keep_out_other_owners_and_the_host() {
    let mut guest = Guest::locking();
    let inode = long(&guest.lookup(ROOT, b"file").unwrap(), 0);
    let (first, second) = (guest.lock_of(inode, 1), guest.lock_of(inode, 2));
    let host = guest.host();
    guest.lock(first, (0, 9), WRITE_LOCK).unwrap();
    assert_eq!(guest.lock(second, (9, 20), READ_LOCK), Err(libc::EAGAIN));
    guest.lock(second, (10, 20), WRITE_LOCK).unwrap();
    assert_eq!(guest.holder(first, (0, LAST), WRITE_LOCK), (10, 20, 1));
    assert_eq!(guest.holder(second, (0, 100), READ_LOCK), (0, 9, 1));
    assert_eq!(guest.holder(first, (0, 9), WRITE_LOCK), (0, 9, UNLOCK));
    assert!(!host_locks(&host, 20, READ_LOCK));
    assert!(host_locks(&host, 21, WRITE_LOCK));
    assert_eq!(guest.lock(first, (30, LAST), READ_LOCK), Err(libc::EAGAIN));
    assert_eq!(
        guest.holder(first, (30, LAST), READ_LOCK),
        (21, LAST, WRITE_LOCK)
    );
    assert!(host_locks(&host, 21, UNLOCK));
    // The same owner by another handle: it is his.
    let other = Lock {
        handle: second.handle,
        ..first
    };
    guest.lock(other, (0, 9), UNLOCK).unwrap();
    guest.lock(second, (0, 9), READ_LOCK).unwrap();
    guest.lock(first, (0, 9), READ_LOCK).unwrap();
    assert_eq!(guest.lock(first, (5, 5), WRITE_LOCK), Err(libc::EAGAIN));
    // What no process can ask for.
    for (range, kind) in [((5, 4), 0), ((0, LAST + 1), 0), ((0, 1), 9)] {
        assert_eq!(guest.lock(first, range, kind), Err(libc::EINVAL));
    }
    let nobody = Lock {
        handle: 99,
        ..first
    };
    assert_eq!(guest.lock(nobody, (0, 1), READ_LOCK), Err(libc::EBADF));
    assert_eq!(guest.call(SETLK, inode, &[0; 10], 0), Err(libc::EINVAL));
}

#[test]
fn locks_go_with_what_is_closed() {
    let mut guest = Guest::locking();
    let inode = long(&guest.lookup(ROOT, b"file").unwrap(), 0);
    let host = guest.host();
    let before = guest.descriptors("file");
    let free = || host_locks(&host, 0, WRITE_LOCK) && host_locks(&host, 0, UNLOCK);
    let lock = guest.lock_of(inode, 1);
    // Its owner closes one of its descriptors.
    guest.lock(lock, (0, 9), READ_LOCK).unwrap();
    assert!(!free());
    guest.flush(Lock { owner: 2, ..lock });
    assert!(!free());
    guest.flush(lock);
    assert!(free());
    // The handle by which it came goes.
    guest.lock(lock, (0, 9), READ_LOCK).unwrap();
    guest.lock(lock, (20, 29), READ_LOCK).unwrap();
    guest.close(lock);
    assert!(free());
    // It is unlocked, part by part.
    let lock = guest.lock_of(inode, 1);
    guest.lock(lock, (0, 9), READ_LOCK).unwrap();
    guest.lock(lock, (5, LAST), UNLOCK).unwrap();
    assert!(!free());
    guest.lock(lock, (0, 4), UNLOCK).unwrap();
    assert!(free());
    // Of locks, no descriptor is left: the handle's alone.
    assert_eq!(guest.descriptors("file"), before + 1);
    // The driver goes.
    guest.lock(lock, (0, 9), READ_LOCK).unwrap();
    let whole = Lock {
        flock: true,
        ..lock
    };
    guest.lock(whole, (0, LAST), WRITE_LOCK).unwrap();
    guest.driver.restart();
    assert!(free());
    assert!(flock(&host, FlockOperation::NonBlockingLockExclusive).is_ok());
}

#[test]
fn whole_files_are_locked_by_their_handles() {
    let mut guest = Guest::locking();
    let inode = long(&guest.lookup(ROOT, b"file").unwrap(), 0);
    let host = guest.host();
    let [first, second] = [1, 2].map(|owner| Lock {
        flock: true,
        ..guest.lock_of(inode, owner)
    });
    let all = (0, LAST);
    guest.lock(first, all, READ_LOCK).unwrap();
    guest.lock(second, all, READ_LOCK).unwrap();
    assert_eq!(guest.lock(second, all, WRITE_LOCK), Err(libc::EAGAIN));
    assert!(flock(&host, FlockOperation::NonBlockingLockExclusive).is_err());
    guest.lock(second, all, UNLOCK).unwrap();
    guest.close(first);
    flock(&host, FlockOperation::NonBlockingLockExclusive).unwrap();
    assert_eq!(guest.lock(second, all, READ_LOCK), Err(libc::EAGAIN));
    flock(&host, FlockOperation::Unlock).unwrap();
    guest.lock(second, all, WRITE_LOCK).unwrap();
}

#[test]
fn who_waits_is_answered_later_and_holds_nobody_up() {
    let mut guest = Guest::locking();
    let inode = long(&guest.lookup(ROOT, b"file").unwrap(), 0);
    let (first, second) = (guest.lock_of(inode, 1), guest.lock_of(inode, 2));
    guest.lock(first, (0, 9), WRITE_LOCK).unwrap();
    let waits = guest.wait(second, (5, 9), WRITE_LOCK, 501);
    assert!(guest.driver.used(REQUESTS).is_empty());
    // Others are served, and who lets go lets the waiting in.
    assert!(guest.lookup(ROOT, b"file").is_ok());
    let body = first.body(0, 9, UNLOCK);
    let mut request = guest.header(IN_HEADER + body.len(), SETLK, inode);
    request.extend_from_slice(&body);
    let input = guest.driver.buffer(request.len() as u64);
    guest.driver.write(input, &request);
    let output = guest.driver.buffer(OUT_HEADER as u64);
    guest.driver.queue(
        REQUESTS,
        &[
            (input, request.len() as u32, READ_ONLY),
            (output, OUT_HEADER as u32, READ_WRITE),
        ],
    );
    guest.driver.kick(REQUESTS);
    assert_eq!(guest.driver.used(REQUESTS), [16, 16]);
    assert_eq!(guest.answered(waits, 501), 0);
    assert_eq!(guest.holder(first, (0, 9), WRITE_LOCK), (5, 9, WRITE_LOCK));
    guest.flush(second);

    // The host tells nobody: it is tried again.
    let host = guest.host();
    flock(&host, FlockOperation::NonBlockingLockExclusive).unwrap();
    let whole = Lock {
        flock: true,
        ..second
    };
    let waits = guest.wait(whole, (0, LAST), WRITE_LOCK, 502);
    guest.driver.event(TIMER);
    assert!(guest.driver.used(REQUESTS).is_empty());
    flock(&host, FlockOperation::Unlock).unwrap();
    guest.driver.event(TIMER);
    assert_eq!(guest.driver.used(REQUESTS), [16]);
    assert_eq!(guest.answered(waits, 502), 0);

    // An interrupt ends it, and nobody else's wait.
    let third = guest.lock_of(inode, 3);
    let whole = Lock {
        flock: true,
        ..third
    };
    let waits = [601, 602].map(|unique| guest.wait(whole, (0, LAST), READ_LOCK, unique));
    let mut request = guest.header(IN_HEADER + 8, INTERRUPT, 0);
    for unique in [7_u64, 602] {
        request.truncate(IN_HEADER);
        request.extend_from_slice(&unique.to_le_bytes());
        assert_eq!(guest.send(HIGH_PRIORITY, &request, 0), b"");
    }
    assert_eq!(guest.driver.used(REQUESTS), [16]);
    assert_eq!(guest.answered(waits[1], 602), libc::EINTR);
    // Whose handle is closed waits for nothing.
    let mut body = third.handle.to_le_bytes().to_vec();
    body.resize(24, 0);
    let mut request = guest.header(IN_HEADER + body.len(), RELEASE, inode);
    request.extend_from_slice(&body);
    let input = guest.driver.buffer(request.len() as u64);
    guest.driver.write(input, &request);
    guest
        .driver
        .queue(REQUESTS, &[(input, request.len() as u32, READ_ONLY)]);
    guest.driver.kick(REQUESTS);
    assert_eq!(guest.driver.used(REQUESTS).len(), 2);
    assert_eq!(guest.answered(waits[0], 601), libc::EBADF);
    assert!(!guest.driver.broken());
}

#[test]
fn there_are_only_so_many_locks() {
    let mut guest = Guest::locking();
    let inode = long(&guest.lookup(ROOT, b"file").unwrap(), 0);
    let lock = guest.lock_of(inode, 1);
    for byte in 0..4096 {
        guest.lock(lock, (byte * 2, byte * 2), READ_LOCK).unwrap();
        guest.driver.forget_buffers();
    }
    let other = guest.lock_of(inode, 2);
    for lock in [lock, other] {
        let more = (1 << 20, 1 << 20);
        assert_eq!(guest.lock(lock, more, READ_LOCK), Err(libc::ENOLCK));
    }
    // Fewer parts than before, and then there is room.
    guest.lock(lock, (0, 10), READ_LOCK).unwrap();
    guest.lock(other, (0, 0), READ_LOCK).unwrap();
}

#[test]
fn a_live_device_looks_again_by_itself() {
    let directory = TempDir::new().unwrap();
    fs::write(directory.as_path().join("file"), b"").unwrap();
    let config = FsConfig {
        host_locks: true,
        ..config("shared")
    };
    let device = Fs::new(&config, open(directory.as_path())).unwrap();
    let mut guest = Guest {
        driver: Driver::live(device),
        directory,
        uid: 0,
        gid: 0,
    };
    let next = |guest: &mut Guest, request: &[u8], room: usize| {
        let input = guest.driver.buffer(request.len() as u64);
        guest.driver.write(input, request);
        let output = guest.driver.buffer(room as u64);
        let chain = [
            (input, request.len() as u32, READ_ONLY),
            (output, room as u32, READ_WRITE),
        ];
        guest.driver.queue(REQUESTS, &chain);
        guest.driver.notify(REQUESTS);
        output
    };
    let wait = |guest: &mut Guest| {
        while guest.driver.used(REQUESTS).is_empty() {
            std::thread::yield_now();
        }
    };
    let mut request = guest.header(IN_HEADER + 64, INIT, 0);
    for word in [7, 36, 1 << 17, u32::MAX, u32::MAX] {
        request.extend_from_slice(&u32::to_le_bytes(word));
    }
    request.resize(IN_HEADER + 64, 0);
    next(&mut guest, &request, 96);
    wait(&mut guest);
    let mut request = guest.header(IN_HEADER + 5, LOOKUP, ROOT);
    request.extend_from_slice(b"file\0");
    let at = next(&mut guest, &request, OUT_HEADER + ENTRY);
    wait(&mut guest);
    let inode = long(&guest.driver.read(at, OUT_HEADER + 8), OUT_HEADER);
    let mut request = guest.header(IN_HEADER + 8, OPEN, inode);
    request.extend_from_slice(&(libc::O_RDWR as u64).to_le_bytes());
    let at = next(&mut guest, &request, OUT_HEADER + 16);
    wait(&mut guest);
    let handle = long(&guest.driver.read(at, OUT_HEADER + 8), OUT_HEADER);
    let lock = Lock {
        inode,
        handle,
        owner: 1,
        flock: true,
    };
    let host = guest.host();
    flock(&host, FlockOperation::NonBlockingLockExclusive).unwrap();
    let body = lock.body(0, LAST, WRITE_LOCK);
    let mut request = guest.header(IN_HEADER + body.len(), SETLKW, inode);
    request.extend_from_slice(&body);
    let at = next(&mut guest, &request, OUT_HEADER);
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(guest.driver.used(REQUESTS).is_empty());
    flock(&host, FlockOperation::Unlock).unwrap();
    wait(&mut guest);
    assert_eq!(guest.answered(at, 77), 0);
    assert!(flock(&host, FlockOperation::NonBlockingLockExclusive).is_err());
    guest.driver.device().reset();
}

#[test]
fn too_many_who_wait_are_told_so() {
    let mut guest = Guest::locking();
    let inode = long(&guest.lookup(ROOT, b"file").unwrap(), 0);
    let host = guest.host();
    assert!(host_locks(&host, 0, WRITE_LOCK));
    let lock = guest.lock_of(inode, 1);
    // The driver's queue is shorter than what may wait: in two rounds it is not.
    let mut told = 0;
    for unique in 0..MOST_WAITING as u64 + 3 {
        let at = guest.wait(lock, (unique, unique), READ_LOCK, unique);
        let used = guest.driver.used(REQUESTS).len();
        if used > 0 {
            assert_eq!(guest.answered(at, unique), libc::ENOLCK);
        }
        told += used;
    }
    assert_eq!(told, 3);
}
