// SPDX-License-Identifier: Apache-2.0
//! The shared directory as the protocol's library asks for it: less what a guest
//! need not have, and with what is negotiated.

use std::{
    ffi::CStr,
    io,
    sync::{
        atomic::{AtomicBool, Ordering},
        Arc,
    },
    time::Duration,
};

use fuse_backend_rs::{
    abi::{
        fuse_abi::{stat64, statvfs64, CreateIn},
        virtio_fs::RemovemappingOne,
    },
    api::filesystem::{
        Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply,
        OpenOptions, SetattrValid, ZeroCopyReader, ZeroCopyWriter,
    },
    transport::FsCacheReqHandler,
};

use super::passthrough::Passthrough;

/// Longest extended attribute, and list of their names, in bytes (Linux's
/// XATTR_SIZE_MAX and XATTR_LIST_MAX).
const XATTR_MAX: u32 = 64 * 1024;

/// What the guest may set when it opens a file. O_DIRECT is not among it: the
/// host's page cache has the file anyway, and not every file system of the
/// host knows it.
const OPEN_FLAGS: u32 = (libc::O_ACCMODE
    | libc::O_APPEND
    | libc::O_CREAT
    | libc::O_DIRECTORY
    | libc::O_DSYNC
    | libc::O_EXCL
    | libc::O_NOATIME
    | libc::O_NOFOLLOW
    | libc::O_NONBLOCK
    | libc::O_SYNC
    | libc::O_TRUNC) as u32;

/// Seconds and nanoseconds of the time that the guest's agent gives to a file
/// that others have changed (`bulkhead_agent_protocol::ANNOUNCED`): its kernel
/// tells those who watch the file, which is all that it is for.
const ANNOUNCED: (i64, i64) = (13_569_465_600, 141_592_653);

/// A shared directory, served to one connection.
pub(super) struct Files {
    inner: Arc<Passthrough>,
    /// Somebody else than the guest may change files.
    shared: bool,
    /// Its processes' locks are the host's.
    locks: bool,
    /// The guest has begun a session.
    mounted: Arc<AtomicBool>,
}

impl Files {
    /// `shared`: somebody else than the guest may change files. `locks`: what its
    /// processes lock, is locked on the host. `mounted` is set while the guest has
    /// a session.
    pub fn new(
        inner: Arc<Passthrough>,
        shared: bool,
        locks: bool,
        mounted: Arc<AtomicBool>,
    ) -> Self {
        Self {
            inner,
            shared,
            locks,
            mounted,
        }
    }
}

impl FileSystem for Files {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        // Not ATOMIC_O_TRUNC: a guest's kernel looks whether a file is a program
        // that runs only after it was opened, and by then it would be empty.
        let mut wanted = capable & FsOptions::HANDLE_KILLPRIV_V2
            | FsOptions::ASYNC_READ
            | FsOptions::BIG_WRITES
            | FsOptions::CACHE_SYMLINKS
            | FsOptions::DO_READDIRPLUS
            | FsOptions::MAX_PAGES
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::READDIRPLUS_AUTO
            | FsOptions::SUBMOUNTS;
        if self.shared {
            wanted |= FsOptions::AUTO_INVAL_DATA;
        }
        if self.locks {
            wanted |= FsOptions::POSIX_LOCKS | FsOptions::FLOCK_LOCKS;
        }
        self.mounted.store(true, Ordering::SeqCst);
        Ok(wanted)
    }

    fn destroy(&self) {
        if let Err(error) = self.inner.clear() {
            limited!(error, %error, "shared directory cannot be looked into again");
        }
        self.mounted.store(false, Ordering::SeqCst);
    }

    fn lookup(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.inner.lookup(parent, name)
    }

    fn forget(&self, _: &Context, inode: u64, count: u64) {
        self.inner.forget(inode, count);
    }

    fn batch_forget(&self, _: &Context, requests: Vec<(u64, u64)>) {
        for (inode, count) in requests {
            self.inner.forget(inode, count);
        }
    }

    fn getattr(
        &self,
        _: &Context,
        inode: u64,
        _handle: Option<u64>,
    ) -> io::Result<(stat64, Duration)> {
        self.inner.getattr(inode)
    }

    fn setattr(
        &self,
        _: &Context,
        inode: u64,
        attr: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        let times = SetattrValid::ATIME | SetattrValid::MTIME;
        if valid.intersects(times)
            && (times | SetattrValid::CTIME).contains(valid)
            && (attr.st_mtime, attr.st_mtime_nsec) == ANNOUNCED
        {
            return self.inner.getattr(inode);
        }
        self.inner.setattr(inode, &attr, handle, valid)
    }

    fn readlink(&self, _: &Context, inode: u64) -> io::Result<Vec<u8>> {
        self.inner.readlink(inode)
    }

    fn symlink(&self, ctx: &Context, target: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.inner.symlink(ctx, target, parent, name)
    }

    fn mknod(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.inner.mknod(ctx, parent, name, mode, rdev, umask)
    }

    fn mkdir(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.inner.mkdir(ctx, parent, name, mode, umask)
    }

    fn unlink(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.inner.unlink(parent, name)
    }

    fn rmdir(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.inner.rmdir(parent, name)
    }

    fn rename(
        &self,
        _: &Context,
        old_parent: u64,
        old_name: &CStr,
        new_parent: u64,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        self.inner
            .rename(old_parent, old_name, new_parent, new_name, flags)
    }

    fn link(&self, _: &Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.inner.link(inode, parent, name)
    }

    fn open(
        &self,
        _: &Context,
        inode: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let (handle, options) = self.inner.open(inode, flags & OPEN_FLAGS, fuse_flags)?;
        Ok((Some(handle), options, None))
    }

    fn create(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mut args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        args.flags &= OPEN_FLAGS;
        let (entry, handle, options) = self.inner.create(ctx, parent, name, args)?;
        Ok((entry, Some(handle), options, None))
    }

    fn read(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        to: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        self.inner.read(inode, handle, to, size, offset, flags)
    }

    fn write(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        from: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _delayed: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        self.inner
            .write(inode, handle, from, size, offset, flags, fuse_flags)
    }

    fn flush(&self, _: &Context, inode: u64, handle: u64, owner: u64) -> io::Result<()> {
        self.inner.unlock_all(inode, owner);
        self.inner.flush(inode, handle)
    }

    fn fsync(&self, _: &Context, inode: u64, data_only: bool, handle: u64) -> io::Result<()> {
        self.inner.fsync(inode, data_only, handle)
    }

    fn fallocate(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.inner.fallocate(inode, handle, mode, offset, length)
    }

    fn release(
        &self,
        _: &Context,
        inode: u64,
        _flags: u32,
        handle: u64,
        _flush: bool,
        _unlock: bool,
        _lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.inner.release(inode, handle)
    }

    fn statfs(&self, _: &Context, inode: u64) -> io::Result<statvfs64> {
        self.inner.statfs(inode)
    }

    fn setxattr(
        &self,
        _: &Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        self.inner.setxattr(inode, name, value, flags)
    }

    fn getxattr(
        &self,
        _: &Context,
        inode: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        self.inner.getxattr(inode, name, size.min(XATTR_MAX))
    }

    fn listxattr(&self, _: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        self.inner.listxattr(inode, size.min(XATTR_MAX))
    }

    fn removexattr(&self, _: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        self.inner.removexattr(inode, name)
    }

    fn opendir(
        &self,
        _: &Context,
        inode: u64,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let flags = flags & OPEN_FLAGS | libc::O_DIRECTORY as u32;
        let (handle, options) = self.inner.open(inode, flags, 0)?;
        Ok((Some(handle), options))
    }

    fn readdir(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        _size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.inner.readdir(inode, handle, offset, add)
    }

    fn readdirplus(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        _size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.inner.readdirplus(inode, handle, offset, add)
    }

    fn fsyncdir(&self, _: &Context, inode: u64, data_only: bool, handle: u64) -> io::Result<()> {
        self.inner.fsync(inode, data_only, handle)
    }

    fn releasedir(&self, _: &Context, inode: u64, _flags: u32, handle: u64) -> io::Result<()> {
        self.inner.release(inode, handle)
    }

    /// The guest's kernel checks permissions.
    fn access(&self, _: &Context, inode: u64, _mask: u32) -> io::Result<()> {
        self.inner.getattr(inode).map(drop)
    }

    fn setupmapping(
        &self,
        _: &Context,
        inode: u64,
        _handle: u64,
        file_offset: u64,
        length: u64,
        flags: u64,
        offset: u64,
        window: &mut dyn FsCacheReqHandler,
    ) -> io::Result<()> {
        self.inner
            .setupmapping(inode, file_offset, length, flags, offset, window)
    }

    fn removemapping(
        &self,
        _: &Context,
        _inode: u64,
        requests: Vec<RemovemappingOne>,
        window: &mut dyn FsCacheReqHandler,
    ) -> io::Result<()> {
        window.unmap(requests)
    }

    fn lseek(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        self.inner.lseek(inode, handle, offset, whence)
    }
}
