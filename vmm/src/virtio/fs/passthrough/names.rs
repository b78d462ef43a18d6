// SPDX-License-Identifier: Apache-2.0
//! Names: finding, making, moving and removing.

use std::{ffi::CStr, io, os::fd::OwnedFd};

use fuse_backend_rs::{
    abi::fuse_abi::{CreateIn, FOPEN_IN_KILL_SUIDGID},
    api::filesystem::{Context, Entry, OpenOptions},
};
use rustix::fs::{
    linkat, mkdirat, mknodat, openat, readlinkat, renameat_with, symlinkat, unlinkat, AtFlags,
    FileType, Mode, OFlags, RenameFlags,
};

use super::{
    attributes::attributes,
    check,
    identity::{as_user, killing_privileges},
    table::{status, Inode},
    Handle, Passthrough,
};

/// FUSE_ATTR_SUBMOUNT of Linux's fuse.h: the directory is the root of another
/// file system.
pub const ATTR_SUBMOUNT: u32 = 1;

/// Permission bits.
fn mode(bits: u32) -> Mode {
    Mode::from_bits_truncate(bits)
}

impl Passthrough {
    /// What the name stands for, which the guest knows from now on.
    pub fn lookup(&self, parent: u64, name: &CStr) -> io::Result<Entry> {
        let parent = self.inode(parent)?;
        self.find(&parent, name)
    }

    /// As [`Self::lookup`].
    pub(super) fn find(&self, parent: &Inode, name: &CStr) -> io::Result<Entry> {
        check(name)?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let found = openat(&parent.fd, name, flags, Mode::empty())?;
        self.entry(parent, found)
    }

    /// What the guest is told of a file.
    fn entry(&self, parent: &Inode, fd: OwnedFd) -> io::Result<Entry> {
        let status = status(&fd)?;
        let attr = attributes(&status);
        // Equal inode numbers of different file systems would be the same file
        // to programs otherwise.
        let directory = attr.st_mode & libc::S_IFMT == libc::S_IFDIR;
        let submount = directory && attr.st_dev != parent.device();
        Ok(Entry {
            inode: self.table().tell(fd, &status)?,
            generation: 0,
            attr,
            attr_flags: if submount { ATTR_SUBMOUNT } else { 0 },
            attr_timeout: self.caching.valid,
            entry_timeout: self.caching.valid,
        })
    }

    /// The guest forgets a file that it was told of so often.
    pub fn forget(&self, inode: u64, count: u64) {
        self.table().forget(inode, count);
    }

    /// A symbolic link's target.
    pub fn readlink(&self, inode: u64) -> io::Result<Vec<u8>> {
        let inode = self.inode(inode)?;
        Ok(readlinkat(&inode.fd, c"", Vec::new())?.into_bytes())
    }

    /// Makes a symbolic link.
    pub fn symlink(
        &self,
        ctx: &Context,
        target: &CStr,
        parent: u64,
        name: &CStr,
    ) -> io::Result<Entry> {
        self.make(ctx, parent, name, |parent| {
            symlinkat(target, &parent.fd, name)
        })
    }

    /// Makes a file that is not opened: a device, a FIFO, a socket.
    pub fn mknod(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        bits: u32,
        device: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        let kind = FileType::from_raw_mode(bits);
        self.make(ctx, parent, name, |parent| {
            mknodat(&parent.fd, name, kind, mode(bits & !umask), device.into())
        })
    }

    /// Makes a directory.
    pub fn mkdir(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        bits: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.make(ctx, parent, name, |parent| {
            mkdirat(&parent.fd, name, mode(bits & !umask))
        })
    }

    /// Makes something that belongs to who asks.
    fn make(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        make: impl FnOnce(&Inode) -> rustix::io::Result<()>,
    ) -> io::Result<Entry> {
        check(name)?;
        let parent = self.inode(parent)?;
        as_user(ctx.uid, ctx.gid, || Ok(make(&parent)?))?;
        self.find(&parent, name)
    }

    /// Removes a name of a file.
    pub fn unlink(&self, parent: u64, name: &CStr) -> io::Result<()> {
        self.remove(parent, name, AtFlags::empty())
    }

    /// Removes a directory.
    pub fn rmdir(&self, parent: u64, name: &CStr) -> io::Result<()> {
        self.remove(parent, name, AtFlags::REMOVEDIR)
    }

    fn remove(&self, parent: u64, name: &CStr, flags: AtFlags) -> io::Result<()> {
        check(name)?;
        let parent = self.inode(parent)?;
        Ok(unlinkat(&parent.fd, name, flags)?)
    }

    /// Moves a name, with flags of renameat2(2).
    pub fn rename(
        &self,
        old_parent: u64,
        old_name: &CStr,
        new_parent: u64,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        check(old_name)?;
        check(new_name)?;
        let (from, to) = (self.inode(old_parent)?, self.inode(new_parent)?);
        let flags = RenameFlags::from_bits_retain(flags);
        Ok(renameat_with(&from.fd, old_name, &to.fd, new_name, flags)?)
    }

    /// Gives a file another name.
    pub fn link(&self, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        check(name)?;
        let (inode, parent) = (self.inode(inode)?, self.inode(parent)?);
        linkat(&inode.fd, c"", &parent.fd, name, AtFlags::EMPTY_PATH)?;
        self.find(&parent, name)
    }

    /// Makes a file that belongs to who asks, or finds it where the flags let it be
    /// there, and opens it.
    pub fn create(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, u64, OpenOptions)> {
        check(name)?;
        let parent = self.inode(parent)?;
        let flags = OFlags::from_bits_retain(args.flags) | OFlags::CLOEXEC;
        let new = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let bits = mode(args.mode & !(args.umask & 0o777));
        let made = as_user(ctx.uid, ctx.gid, || {
            Ok(openat(&parent.fd, name, new, bits)?)
        });
        let exists = |error: &io::Error| error.kind() == io::ErrorKind::AlreadyExists;
        let made = match made {
            Err(error) if exists(&error) && !flags.contains(OFlags::EXCL) => None,
            other => Some(other?),
        };
        let entry = self.find(&parent, name)?;
        let opened = match made {
            Some(made) => Ok(made.into()),
            None => {
                let kill = args.fuse_flags & FOPEN_IN_KILL_SUIDGID != 0;
                let inode = self.inode(entry.inode)?;
                killing_privileges(kill, || self.reopen(&inode, args.flags))
            }
        };
        let opened = opened.and_then(|file| {
            let handle = Handle::new(entry.inode, file, args.flags);
            self.table().open(handle)
        });
        match opened {
            Ok(handle) => Ok((entry, handle, self.open_options(false))),
            Err(error) => {
                // The guest is not told of it.
                self.forget(entry.inode, 1);
                Err(error)
            }
        }
    }
}
