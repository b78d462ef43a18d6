// SPDX-License-Identifier: Apache-2.0

mod known;
mod locks;
mod requests;
mod window;

use std::{
    fs::{self, File},
    os::{
        fd::OwnedFd,
        unix::fs::{chown, MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use bulkhead_vmm_api::{FsCache, FsConfig};
use vmm_sys_util::tempdir::TempDir;

use super::{device::QUEUES, passthrough::ATTR_SUBMOUNT, Fs, Window};
use crate::confine::{
    self,
    seccomp::{Worker, LEFT_OUT},
};
use crate::virtio::{
    device::VirtioDevice,
    testing::{Driver, READ_ONLY, READ_WRITE},
};

/// Queues by their use.
const HIGH_PRIORITY: usize = 0;
const REQUESTS: usize = 1;
/// `fuse_in_header` and `fuse_out_header`.
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
/// `fuse_entry_out`, and where its inode, and that one's number, mode and
/// flags are.
const ENTRY: usize = 128;
const ENTRY_NUMBER: usize = 40;
const ENTRY_MODE: usize = 100;
const ENTRY_FLAGS: usize = 124;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const MKDIR: u32 = 9;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const RELEASE: u32 = 18;
const SETXATTR: u32 = 21;
const GETXATTR: u32 = 22;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const CREATE: u32 = 35;
const READDIRPLUS: u32 = 44;
const ROOT: u64 = 1;

struct Guest {
    driver: Driver<Fs>,
    directory: TempDir,
    uid: u32,
    gid: u32,
}

fn config(tag: &str) -> FsConfig {
    FsConfig {
        tag: tag.into(),
        directory: 0,
        cache: FsCache::Auto,
        dax_mib: 0,
        host_locks: false,
    }
}

fn open(path: &Path) -> OwnedFd {
    File::open(path).unwrap().into()
}

impl Guest {
    /// A guest that has mounted a directory with one file.
    fn new() -> Self {
        Self::with_window(None)
    }

    fn with_window(window: Option<Window>) -> Self {
        Self::with_config(&config("shared"), window)
    }

    fn with_config(config: &FsConfig, window: Option<Window>) -> Self {
        let directory = TempDir::new().unwrap();
        fs::write(directory.as_path().join("file"), b"0123456789").unwrap();
        let device = Fs::new(config, open(directory.as_path())).unwrap();
        let device = device.with_window(window);
        let mut guest = Self {
            driver: Driver::new(device),
            directory,
            uid: 0,
            gid: 0,
        };
        guest.init();
        guest
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.as_path().join(name)
    }

    fn init(&mut self) -> Vec<u8> {
        let mut body = Vec::new();
        for word in [7, 36, 1 << 17, u32::MAX, u32::MAX] {
            body.extend_from_slice(&u32::to_le_bytes(word));
        }
        body.resize(64, 0);
        self.call(INIT, 0, &body, 64).unwrap()
    }

    fn header(&self, length: usize, opcode: u32, inode: u64) -> Vec<u8> {
        let mut header = Vec::new();
        header.extend_from_slice(&(length as u32).to_le_bytes());
        header.extend_from_slice(&opcode.to_le_bytes());
        header.extend_from_slice(&77_u64.to_le_bytes());
        header.extend_from_slice(&inode.to_le_bytes());
        for word in [self.uid, self.gid, 1, 0] {
            header.extend_from_slice(&word.to_le_bytes());
        }
        header
    }

    /// Sends bytes as a request; the answer, of at most `room` bytes.
    fn send(&mut self, queue: usize, request: &[u8], room: usize) -> Vec<u8> {
        let input = self.driver.buffer(request.len() as u64);
        self.driver.write(input, request);
        let mut chain = vec![(input, request.len() as u32, READ_ONLY)];
        let output = self.driver.buffer(room as u64);
        if room > 0 {
            chain.push((output, room as u32, READ_WRITE));
        }
        self.driver.queue(queue, &chain);
        self.driver.kick(queue);
        let used = self.driver.used(queue);
        assert_eq!(used.len(), 1);
        self.driver.read(output, used[0] as usize)
    }

    /// A request's answer without its header, or its error.
    fn call(&mut self, opcode: u32, inode: u64, body: &[u8], room: usize) -> Result<Vec<u8>, i32> {
        let mut request = self.header(IN_HEADER + body.len(), opcode, inode);
        request.extend_from_slice(body);
        let answer = self.send(REQUESTS, &request, OUT_HEADER + room);
        assert_eq!(word(&answer, 0) as usize, answer.len());
        assert_eq!(long(&answer, 8), 77);
        match word(&answer, 4) as i32 {
            0 => Ok(answer[OUT_HEADER..].to_vec()),
            error => Err(-error),
        }
    }

    fn lookup(&mut self, parent: u64, name: &[u8]) -> Result<Vec<u8>, i32> {
        self.call(LOOKUP, parent, &[name, b"\0"].concat(), ENTRY)
    }

    fn forget(&mut self, inode: u64, count: u64) {
        let mut request = self.header(IN_HEADER + 8, FORGET, inode);
        request.extend_from_slice(&count.to_le_bytes());
        assert_eq!(self.send(HIGH_PRIORITY, &request, 0), b"");
    }

    fn open(&mut self, opcode: u32, inode: u64, flags: i32) -> u64 {
        let mut body = (flags as u32).to_le_bytes().to_vec();
        body.resize(8, 0);
        long(&self.call(opcode, inode, &body, 16).unwrap(), 0)
    }

    fn read(&mut self, opcode: u32, inode: u64, handle: u64, size: u32) -> Result<Vec<u8>, i32> {
        let mut body = handle.to_le_bytes().to_vec();
        body.extend_from_slice(&0_u64.to_le_bytes());
        body.extend_from_slice(&size.to_le_bytes());
        body.resize(40, 0);
        self.call(opcode, inode, &body, 4096)
    }

    /// Descriptors of this process on what lies in the directory.
    fn descriptors(&self, below: &str) -> usize {
        let prefix = self.path(below);
        fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
            .filter(|target| target.starts_with(&prefix))
            .count()
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn is_root() -> bool {
    fs::metadata("/proc/self").unwrap().uid() == 0
}

#[test]
fn the_tag_and_the_number_of_queues_are_in_the_configuration() {
    let directory = TempDir::new().unwrap();
    let device = Fs::new(&config("shared"), open(directory.as_path())).unwrap();
    let mut space = [0xff; 44];
    device.read_config(0, &mut space);
    assert_eq!(space[..7], *b"shared\0");
    assert_eq!(space[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(device.queue_sizes().len(), QUEUES);
    for tag in ["", "0123456789012345678901234567890123456"] {
        assert!(Fs::new(&config(tag), open(directory.as_path())).is_err());
    }
}

#[test]
fn files_are_looked_up_and_read() {
    let mut guest = Guest::new();
    let entry = guest.lookup(ROOT, b"file").unwrap();
    let inode = long(&entry, 0);
    let file = fs::metadata(guest.path("file")).unwrap();
    assert_eq!(long(&entry, ENTRY_NUMBER), file.ino());
    assert_eq!(word(&entry, ENTRY_MODE), file.mode());
    assert_eq!(guest.lookup(ROOT, b"none").unwrap_err(), libc::ENOENT);
    let handle = guest.open(OPEN, inode, libc::O_RDONLY);
    assert_eq!(guest.read(READ, inode, handle, 4).unwrap(), b"0123");
    assert_eq!(
        guest.read(READ, inode, handle, 4096).unwrap(),
        b"0123456789"
    );
    // More than the buffers hold, and a handle that is another file's.
    assert!(guest.read(READ, inode, handle, u32::MAX).is_err());
    assert_eq!(guest.read(READ, ROOT, handle, 4).unwrap_err(), libc::EBADF);
    let mut body = handle.to_le_bytes().to_vec();
    body.resize(24, 0);
    assert!(guest.call(RELEASE, inode, &body, 0).is_ok());
    assert_eq!(guest.read(READ, inode, handle, 4).unwrap_err(), libc::EBADF);
}

#[test]
fn what_a_user_makes_is_the_users() {
    if !is_root() {
        println!("SKIPPED: what_a_user_makes_is_the_users: not root");
        return;
    }
    // This thread serves the files here, where no other does.
    if std::env::var_os(LEFT_OUT).is_none() {
        confine::enter(Worker::Files);
    }
    let mut guest = Guest::new();
    // A group's directory; that the user is one of the group, only the guest
    // knows.
    fs::create_dir(guest.path("group")).unwrap();
    chown(guest.path("group"), Some(0), Some(4242)).unwrap();
    fs::set_permissions(guest.path("group"), fs::Permissions::from_mode(0o770)).unwrap();
    let group = long(&guest.lookup(ROOT, b"group").unwrap(), 0);
    (guest.uid, guest.gid) = (1234, 1235);
    let mut body = Vec::new();
    for word in [libc::O_RDWR as u32, 0o100_666, 0o022, 0] {
        body.extend_from_slice(&word.to_le_bytes());
    }
    body.extend_from_slice(b"new\0");
    let answer = guest.call(CREATE, group, &body, ENTRY + 16).unwrap();
    let (inode, handle) = (long(&answer, 0), long(&answer, ENTRY));
    let mut body = handle.to_le_bytes().to_vec();
    body.extend_from_slice(&0_u64.to_le_bytes());
    body.extend_from_slice(&5_u32.to_le_bytes());
    body.resize(40, 0);
    body.extend_from_slice(b"bytes");
    assert_eq!(word(&guest.call(WRITE, inode, &body, 8).unwrap(), 0), 5);
    let made = fs::metadata(guest.path("group/new")).unwrap();
    assert_eq!((made.uid(), made.gid()), (1234, 1235));
    assert_eq!(made.mode() & 0o7777, 0o644);
    assert_eq!(fs::read(guest.path("group/new")).unwrap(), b"bytes");
    // The thread is itself again.
    let thread = fs::metadata("/proc/thread-self").unwrap();
    assert_eq!((thread.uid(), thread.gid()), (0, 0));
}

#[test]
fn names_that_lead_out_are_refused() {
    let mut guest = Guest::new();
    fs::create_dir(guest.path("below")).unwrap();
    let below = long(&guest.lookup(ROOT, b"below").unwrap(), 0);
    for name in [&b".."[..], b".", b"../..", b"below/..", b"/etc"] {
        for parent in [ROOT, below] {
            assert_eq!(guest.lookup(parent, name).unwrap_err(), libc::EINVAL);
            let mut body = vec![0; 8];
            body.extend_from_slice(name);
            body.push(0);
            assert!(guest.call(MKDIR, parent, &body, ENTRY).is_err());
        }
    }
    // The root cannot be forgotten, nor an inode made up.
    guest.forget(ROOT, u64::MAX);
    assert!(guest.lookup(ROOT, b"file").is_ok());
    assert_eq!(guest.lookup(999, b"file").unwrap_err(), libc::EBADF);
}

#[test]
fn a_symbolic_link_of_the_host_is_not_followed() {
    let mut guest = Guest::new();
    std::os::unix::fs::symlink("/etc", guest.path("link")).unwrap();
    let entry = guest.lookup(ROOT, b"link").unwrap();
    assert_eq!(word(&entry, ENTRY_MODE) & libc::S_IFMT, libc::S_IFLNK);
    let inode = long(&entry, 0);
    assert!(guest.lookup(inode, b"passwd").is_err());
    let flags = (libc::O_RDONLY as u32).to_le_bytes();
    let body = [flags, [0; 4]].concat();
    assert_eq!(guest.call(OPEN, inode, &body, 16).unwrap_err(), libc::EBADF);
}

#[test]
fn forgotten_files_are_closed() {
    let mut guest = Guest::new();
    let inode = long(&guest.lookup(ROOT, b"file").unwrap(), 0);
    assert_eq!(long(&guest.lookup(ROOT, b"file").unwrap(), 0), inode);
    assert_eq!(guest.descriptors("file"), 1);
    guest.forget(inode, 1);
    assert_eq!(guest.descriptors("file"), 1);
    guest.forget(inode, 1);
    assert_eq!(guest.descriptors("file"), 0);
}

#[test]
fn a_reset_forgets_everything_and_a_second_mount_works() {
    let mut guest = Guest::new();
    let inode = long(&guest.lookup(ROOT, b"file").unwrap(), 0);
    guest.open(OPEN, inode, libc::O_RDWR);
    assert_eq!(guest.descriptors("file"), 2);
    guest.driver.restart();
    assert_eq!(guest.descriptors("file"), 0);
    guest.init();
    assert_eq!(guest.call(GETATTR, inode, &[0; 16], 104), Err(libc::EBADF));
    assert!(guest.lookup(ROOT, b"file").is_ok());
}

#[test]
fn listings_agree_with_stat() {
    let mut guest = Guest::new();
    fs::create_dir(guest.path("below")).unwrap();
    let handle = guest.open(OPENDIR, ROOT, libc::O_DIRECTORY);
    for (opcode, prefix) in [(READDIR, 0), (READDIRPLUS, ENTRY)] {
        let listing = guest.read(opcode, ROOT, handle, 4096).unwrap();
        let mut names = Vec::new();
        let mut at = 0;
        while at < listing.len() {
            let dirent = at + prefix;
            let length = word(&listing, dirent + 16) as usize;
            let name = String::from_utf8(listing[dirent + 24..][..length].to_vec()).unwrap();
            let number = fs::metadata(guest.path(&name)).unwrap().ino();
            assert_eq!(long(&listing, dirent), number);
            if prefix > 0 {
                assert_eq!(long(&listing, at + ENTRY_NUMBER), number);
                assert_eq!(word(&listing, at + ENTRY_FLAGS), 0);
            }
            names.push(name);
            at = dirent + (24 + length).next_multiple_of(8);
        }
        names.sort();
        assert_eq!(names, ["below", "file"]);
        // Only the listing with attributes makes the guest know the files.
        assert_eq!(guest.descriptors("file"), usize::from(prefix > 0));
    }
}

#[test]
fn extended_attributes_pass() {
    let mut guest = Guest::new();
    let inode = long(&guest.lookup(ROOT, b"file").unwrap(), 0);
    let mut body = 3_u32.to_le_bytes().to_vec();
    body.extend_from_slice(&0_u32.to_le_bytes());
    body.extend_from_slice(b"user.colour\0red");
    match guest.call(SETXATTR, inode, &body, 0) {
        Err(libc::EOPNOTSUPP) => {
            println!("SKIPPED: extended_attributes_pass: not of the temporary directory");
            return;
        }
        outcome => assert_eq!(outcome, Ok(vec![])),
    }
    // A size that no attribute has, which must not be allocated.
    for size in [64, u32::MAX] {
        let mut body = size.to_le_bytes().to_vec();
        body.extend_from_slice(&0_u32.to_le_bytes());
        body.extend_from_slice(b"user.colour\0");
        assert_eq!(guest.call(GETXATTR, inode, &body, 64).unwrap(), b"red");
    }
}

#[test]
fn nonsense_is_answered_with_an_error_or_not_at_all() {
    let mut guest = Guest::new();
    // No whole header; no room for an answer.
    let request = guest.header(IN_HEADER, LOOKUP, ROOT);
    assert_eq!(guest.send(REQUESTS, &request[..20], 128), b"");
    assert_eq!(guest.send(REQUESTS, &request, 0), b"");
    assert_eq!(guest.send(REQUESTS, &request, 8), b"");
    // A length that is too small, too large, more than there is.
    for length in [0, 10, usize::MAX, IN_HEADER + 100] {
        let request = guest.header(length, LOOKUP, ROOT);
        let answer = guest.send(REQUESTS, &request, 128);
        assert_eq!(answer.len(), OUT_HEADER);
        assert_ne!(word(&answer, 4), 0);
    }
    assert_eq!(guest.call(12345, ROOT, &[], 64), Err(libc::ENOSYS));
    // No name, a name without its end, bodies that are too short.
    assert!(guest.call(LOOKUP, ROOT, &[], 128).is_err());
    assert!(guest.call(LOOKUP, ROOT, b"file", 128).is_err());
    for opcode in 1..52 {
        // Those that are never answered, and the end of the connection.
        if ![FORGET, 36, 38, 41, 42].contains(&opcode) {
            assert!(guest.call(opcode, 999, &[], 128).is_err(), "{opcode}");
        }
    }
    assert!(!guest.driver.broken());
    assert!(guest.lookup(ROOT, b"file").is_ok());
}

#[test]
fn descriptors_outside_of_memory_stop_the_device() {
    let mut guest = Guest::new();
    guest
        .driver
        .queue(REQUESTS, &[(u64::MAX - 10, 100, READ_ONLY)]);
    guest.driver.kick(REQUESTS);
    assert!(guest.driver.broken());
}

/// What is mounted below the directory later on is seen, told as another file
/// system, and can be unmounted once forgotten.
#[test]
fn mounts_come_and_go() {
    // In a thread of its own, which has a mount namespace of its own.
    let test = || {
        // SAFETY: changes this thread only.
        if unsafe { libc::unshare(libc::CLONE_NEWNS) } < 0 {
            let error = std::io::Error::last_os_error();
            println!("SKIPPED: mounts_come_and_go: {error}");
            return;
        }
        let mount = |source: *const libc::c_char, target: &Path, flags| {
            let target = std::ffi::CString::new(target.to_str().unwrap()).unwrap();
            // SAFETY: all strings end with a zero byte and outlive the call.
            let result =
                unsafe { libc::mount(source, target.as_ptr(), source, flags, std::ptr::null()) };
            assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        };
        mount(
            c"none".as_ptr(),
            Path::new("/"),
            libc::MS_REC | libc::MS_PRIVATE,
        );
        let mut guest = Guest::new();
        let target = guest.path("below");
        fs::create_dir(&target).unwrap();
        let before = guest.lookup(ROOT, b"below").unwrap();
        assert_eq!(word(&before, ENTRY_FLAGS), 0);
        mount(c"tmpfs".as_ptr(), &target, 0);
        fs::write(target.join("inside"), b"").unwrap();
        let after = guest.lookup(ROOT, b"below").unwrap();
        assert_eq!(word(&after, ENTRY_FLAGS), ATTR_SUBMOUNT);
        let (old, new) = (long(&before, 0), long(&after, 0));
        assert_ne!(old, new);
        let inside = guest.lookup(new, b"inside").unwrap();
        assert_eq!(word(&inside, ENTRY_FLAGS), 0);
        assert_eq!(guest.lookup(old, b"inside").unwrap_err(), libc::ENOENT);
        let target = std::ffi::CString::new(target.to_str().unwrap()).unwrap();
        // SAFETY: the string ends with a zero byte and outlives the call.
        let unmount = || unsafe { libc::umount(target.as_ptr()) };
        assert_eq!(unmount(), -1);
        guest.forget(long(&inside, 0), 1);
        guest.forget(new, 1);
        assert_eq!(unmount(), 0);
    };
    std::thread::spawn(test).join().unwrap();
}
