// SPDX-License-Identifier: Apache-2.0
//! Each kind of request, and what it does to the directory.

use std::os::unix::fs::FileTypeExt;

use super::*;

const READLINK: u32 = 5;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const UNLINK: u32 = 10;
const RMDIR: u32 = 11;
const RENAME: u32 = 12;
const LINK: u32 = 13;
const STATFS: u32 = 17;
const FSYNC: u32 = 20;
const LISTXATTR: u32 = 23;
const REMOVEXATTR: u32 = 24;
const FLUSH: u32 = 25;
const FALLOCATE: u32 = 43;
const RENAME2: u32 = 45;
const LSEEK: u32 = 46;

/// A request's body: numbers of four and eight bytes, and names.
#[derive(Default)]
struct Body(Vec<u8>);

impl Body {
    fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }
    fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }
    fn name(mut self, name: &str) -> Self {
        self.0.extend_from_slice(name.as_bytes());
        self.0.push(0);
        self
    }
}

fn body() -> Body {
    Body::default()
}

impl Guest {
    fn ask(&mut self, opcode: u32, inode: u64, body: Body, room: usize) -> Vec<u8> {
        self.call(opcode, inode, &body.0, room)
            .unwrap_or_else(|error| panic!("{opcode}: error {error}"))
    }

    pub(super) fn inode(&mut self, name: &str) -> u64 {
        long(&self.lookup(ROOT, name.as_bytes()).unwrap(), 0)
    }

    /// `valid`: which of size, mode, owner and times are to be set.
    fn set_attributes(&mut self, inode: u64, valid: u32, handle: u64) {
        let times = body().u64(1_000).u64(2_000).u64(0).u32(0).u32(0).u32(0);
        let head = body().u32(valid).u32(0).u64(handle).u64(4).u64(0);
        let tail = body().u32(0o100_640).u32(0).u32(0).u32(0).u32(0);
        let all = Body([head.0, times.0, tail.0].concat());
        assert_eq!(all.0.len(), 88);
        self.ask(SETATTR, inode, all, 104);
    }
}

/// What the guest's agent announces a change with changes nothing; any other
/// time does.
#[test]
fn a_mount_negotiates_what_the_device_can_do() {
    let mut guest = Guest::new();
    let answer = guest.init();
    let (flags, max_write) = (word(&answer, 12), word(&answer, 20));
    for (bit, wanted) in [
        (0, true),   // asynchronous reads
        (1, false),  // POSIX locks
        (3, false),  // opening truncates: it would truncate a program that runs
        (4, false),  // lookup of "." and ".."
        (5, true),   // writes of more than a page
        (12, true),  // data is invalid when its file changed
        (13, true),  // READDIRPLUS
        (16, false), // write-back cache
        (22, true),  // many pages a request
        (27, true),  // file systems below
        (28, true),  // set-user-id bits go with writes
    ] {
        assert_eq!(flags & (1 << bit) != 0, wanted, "bit {bit}");
    }
    assert_eq!(max_write, 1 << 20);
}

#[test]
fn an_announced_change_leaves_the_file_alone() {
    let mut guest = Guest::new();
    let file = guest.inode("file");
    let before = fs::metadata(guest.path("file")).unwrap();
    let (atime, mtime) = (1 << 4, 1 << 5);
    let mut set = |valid: u32, seconds: u64, nanoseconds: u32| {
        let times = body().u64(seconds).u64(seconds).u64(0);
        let parts = times.u32(nanoseconds).u32(nanoseconds).u32(0);
        let head = body().u32(valid).u32(0).u64(0).u64(0).u64(0);
        let tail = body().u32(0).u32(0).u32(0).u32(0).u32(0);
        let all = Body([head.0, parts.0, tail.0].concat());
        let answer = guest.ask(SETATTR, file, all, 104);
        // The answer is what the file has: its attributes follow two words.
        assert_eq!(long(&answer, 16 + 8), 10);
        fs::metadata(guest.path("file")).unwrap()
    };
    for valid in [mtime, atime | mtime] {
        let after = set(valid, 13_569_465_600, 141_592_653);
        let times = |m: &fs::Metadata| (m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec());
        assert_eq!(times(&after), times(&before));
        assert_eq!(after.atime(), before.atime());
    }
    let after = set(mtime, 13_569_465_600, 141_592_654);
    assert_eq!(after.mtime(), 13_569_465_600);
}

#[test]
fn names_are_made_moved_and_removed() {
    let mut guest = Guest::new();
    let made = body().u32(0o755).u32(0).name("sub");
    guest.ask(MKDIR, ROOT, made, ENTRY);
    assert!(guest.path("sub").is_dir());
    let node = body().u32(libc::S_IFIFO | 0o600).u32(0).u32(0).u32(0);
    guest.ask(MKNOD, ROOT, node.name("pipe"), ENTRY);
    let kind = fs::metadata(guest.path("pipe")).unwrap().file_type();
    assert!(kind.is_fifo());
    guest.ask(SYMLINK, ROOT, body().name("link").name("file"), ENTRY);
    let link = guest.inode("link");
    assert_eq!(guest.ask(READLINK, link, body(), 64), b"file");
    let file = guest.inode("file");
    guest.ask(LINK, ROOT, body().u64(file).name("other"), ENTRY);
    assert_eq!(fs::metadata(guest.path("other")).unwrap().nlink(), 2);
    let sub = guest.inode("sub");
    guest.ask(RENAME, ROOT, body().u64(sub).name("other").name("moved"), 0);
    assert!(guest.path("sub/moved").exists());
    let flags = libc::RENAME_NOREPLACE;
    let again = body().u64(ROOT).u32(flags).u32(0);
    let again = again.name("moved").name("back");
    guest.ask(RENAME2, sub, again, 0);
    assert!(guest.path("back").exists());
    for name in ["back", "pipe", "link"] {
        guest.ask(UNLINK, ROOT, body().name(name), 0);
        assert!(!guest.path(name).exists());
    }
    guest.ask(RMDIR, ROOT, body().name("sub"), 0);
    assert!(!guest.path("sub").exists());
    assert_eq!(guest.ask(STATFS, ROOT, body(), 80).len(), 80);
}

#[test]
fn attributes_are_set() {
    const MODE: u32 = 1;
    const OWNERS: u32 = 2 | 4;
    const SIZE: u32 = 8;
    const TIMES: u32 = 16 | 32;
    const HANDLE: u32 = 64;
    let mut guest = Guest::new();
    let inode = guest.inode("file");
    let handle = guest.open(OPEN, inode, libc::O_RDWR);
    for (valid, handle) in [(MODE, 0), (SIZE | HANDLE, handle), (TIMES, 0)] {
        guest.set_attributes(inode, valid, handle);
    }
    let found = fs::metadata(guest.path("file")).unwrap();
    assert_eq!((found.mode() & 0o7777, found.len()), (0o640, 4));
    assert_eq!((found.atime(), found.mtime()), (1_000, 2_000));
    guest.set_attributes(inode, MODE | HANDLE, handle);
    if is_root() {
        guest.set_attributes(inode, OWNERS, 0);
    }
    let set = body().u32(1).u32(0).name("user.key");
    let set = Body([set.0, b"v".to_vec()].concat());
    match guest.call(SETXATTR, inode, &set.0, 0) {
        Ok(_) => {
            let size = || body().u32(64).u32(0);
            assert_eq!(guest.ask(LISTXATTR, inode, size(), 64), b"user.key\0");
            let value = guest.ask(GETXATTR, inode, size().name("user.key"), 64);
            assert_eq!(value, b"v");
            guest.ask(REMOVEXATTR, inode, body().name("user.key"), 0);
            assert_eq!(guest.ask(LISTXATTR, inode, size(), 64), b"");
        }
        // Where temporary files have no such attributes.
        Err(error) => assert_eq!(error, libc::ENOTSUP),
    }
}

#[test]
fn files_are_written_and_made_durable() {
    let mut guest = Guest::new();
    let inode = guest.inode("file");
    let handle = guest.open(OPEN, inode, libc::O_RDWR);
    for flags in [0_u32, 1 << 2] {
        let write = body().u64(handle).u64(2).u32(4).u32(flags).u64(0);
        let write = write.u32(libc::O_RDWR as u32).u32(0);
        let write = Body([write.0, b"abcd".to_vec()].concat());
        assert_eq!(word(&guest.ask(WRITE, inode, write, 8), 0), 4);
    }
    assert_eq!(fs::read(guest.path("file")).unwrap(), b"01abcd6789");
    for only_data in [0, 1] {
        guest.ask(FSYNC, inode, body().u64(handle).u32(only_data).u32(0), 0);
    }
    guest.ask(FLUSH, inode, body().u64(handle).u64(0).u64(0), 0);
    let length = body().u64(handle).u64(0).u64(8192).u32(0).u32(0);
    guest.ask(FALLOCATE, inode, length, 0);
    assert_eq!(fs::metadata(guest.path("file")).unwrap().len(), 8192);
    let end = body().u64(handle).u64(0).u32(libc::SEEK_END as u32).u32(0);
    assert_eq!(long(&guest.ask(LSEEK, inode, end, 8), 0), 8192);
    // A guest that reads as if its cache were to be passed by.
    let read = body().u64(handle).u64(0).u32(16).u32(0).u64(0);
    let read = read.u32((libc::O_RDONLY | libc::O_APPEND) as u32).u32(0);
    assert_eq!(&guest.ask(READ, inode, read, 16)[..4], b"01ab");
}

/// More than one wake-up serves: the rest comes with the next.
#[test]
fn many_requests_at_once_are_served_in_turns() {
    let mut guest = Guest::new();
    let request = guest.header(IN_HEADER, STATFS, ROOT);
    let input = guest.driver.buffer(64);
    guest.driver.write(input, &request);
    let output = guest.driver.buffer(128);
    // The queue of the tests has 64 descriptors, two of which each takes; the
    // forgotten ones take one.
    let forget = [guest.header(IN_HEADER + 8, FORGET, 99), vec![0; 8]].concat();
    let forgotten = guest.driver.buffer(64);
    guest.driver.write(forgotten, &forget);
    for _ in 0..64 {
        guest
            .driver
            .queue(HIGH_PRIORITY, &[(forgotten, 48, READ_ONLY)]);
    }
    guest.driver.kick(HIGH_PRIORITY);
    assert_eq!(guest.driver.used(HIGH_PRIORITY).len(), 64);
    guest.driver.queue(
        REQUESTS,
        &[(input, 40, READ_ONLY), (output, 128, READ_WRITE)],
    );
    guest.driver.kick(REQUESTS);
    assert_eq!(guest.driver.used(REQUESTS), [96]);
}
