// SPDX-License-Identifier: Apache-2.0
//! A directory of the host as the files of a guest: what each request of its
//! kernel (Linux's fuse.h) does to it.
//!
//! A file that the guest knows is an inode: a descriptor that leads to it
//! whatever becomes of its names (`O_PATH`), and a number, never used twice. It
//! stays until the guest forgets it. What it has opened are handles. Both take
//! descriptors of this process, so there are only so many.
//!
//! The guest's kernel checks permissions: it alone knows users' groups and
//! capabilities. Nothing here follows a link of the directory or a `..` out of it.

mod attributes;
mod data;
mod identity;
mod listing;
mod locks;
mod names;
mod ranges;
mod table;

use std::{
    ffi::{CStr, CString},
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use fuse_backend_rs::api::filesystem::OpenOptions;
use rustix::fs::{fcntl_setfl, openat, Mode, OFlags};

pub use self::locks::{Kind, Record};
#[cfg(test)]
pub use self::names::ATTR_SUBMOUNT;
use self::table::{Inode, Table};

/// The root's number (FUSE_ROOT_ID).
pub const ROOT: u64 = 1;

/// What the guest may keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caching {
    /// For how long names and attributes hold.
    pub valid: Duration,
    /// Whether the guest keeps data of files at all.
    pub data: bool,
    /// Whether it keeps data of files that it opens once more, and listings.
    pub always: bool,
}

/// The files of a directory.
pub struct Passthrough {
    root: Arc<OwnedFd>,
    /// `/proc/self/fd`, by which an inode's file is opened.
    descriptors: OwnedFd,
    caching: Caching,
    table: Mutex<Table>,
}

/// A file that was opened.
struct Handle {
    inode: u64,
    file: File,
    /// Of those that [`SETTABLE`] names, what the file has.
    flags: u32,
}

/// Flags of an open file that may change.
const SETTABLE: u32 = (libc::O_APPEND | libc::O_NONBLOCK | libc::O_NOATIME) as u32;

/// Only of use when a name is made or found.
const OF_NAMES: u32 = (libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW) as u32;

impl Passthrough {
    /// The files of `root`, with at most `room` descriptors for what the guest
    /// knows and opens.
    ///
    /// # Errors
    /// It is no directory that can be looked into, or /proc is missing.
    pub fn new(root: Arc<OwnedFd>, caching: Caching, room: usize) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let descriptors = openat(rustix::fs::CWD, c"/proc/self/fd", flags, Mode::empty())?;
        // The guest's kernel has taken its users' masks into account.
        rustix::process::umask(Mode::empty());
        let this = Self {
            table: Mutex::new(Table::new(table::inode(Arc::clone(&root))?, room)),
            root,
            descriptors,
            caching,
        };
        Ok(this)
    }

    /// Forgets all files and closes all handles.
    pub fn clear(&self) -> io::Result<()> {
        let root = table::inode(Arc::clone(&self.root))?;
        self.table().clear(root);
        Ok(())
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table
            .lock()
            .expect("a request that panicked ended the process")
    }

    fn inode(&self, number: u64) -> io::Result<Arc<Inode>> {
        self.table().inode(number)
    }

    /// Opens an inode's file or directory; nothing else can be opened.
    fn reopen(&self, inode: &Inode, flags: u32) -> io::Result<File> {
        if !matches!(inode.kind, libc::S_IFREG | libc::S_IFDIR) {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        }
        let flags = OFlags::from_bits_retain(flags & !OF_NAMES) | OFlags::CLOEXEC;
        let name = link_name(inode.fd.as_fd());
        let opened = openat(&self.descriptors, name.as_c_str(), flags, Mode::empty())?;
        Ok(opened.into())
    }

    /// What the guest may keep of a file or directory that it opens.
    fn open_options(&self, directory: bool) -> OpenOptions {
        let mut options = OpenOptions::empty();
        options.set(OpenOptions::DIRECT_IO, !self.caching.data && !directory);
        options.set(OpenOptions::KEEP_CACHE, self.caching.always);
        options.set(OpenOptions::CACHE_DIR, self.caching.always && directory);
        options
    }
}

impl Handle {
    fn new(inode: u64, file: File, flags: u32) -> Self {
        Self {
            inode,
            file,
            flags: flags & SETTABLE,
        }
    }

    /// The file, with the flags that it has in the guest by now.
    fn with_flags(&mut self, flags: u32) -> io::Result<&mut File> {
        let wanted = flags & SETTABLE;
        if wanted != self.flags {
            fcntl_setfl(&self.file, OFlags::from_bits_retain(wanted))?;
            self.flags = wanted;
        }
        Ok(&mut self.file)
    }
}

/// A descriptor's name in /proc/self/fd.
fn link_name(fd: BorrowedFd<'_>) -> CString {
    number(fd.as_raw_fd().unsigned_abs())
}

/// In decimal digits.
fn number(value: u32) -> CString {
    CString::new(value.to_string()).expect("digits have no zero byte")
}

/// A name that can be in a directory. The guest's kernel resolves `.` and `..`
/// itself; a guest that asks for them wants out.
fn check(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        _ => Ok(()),
    }
}
