// SPDX-License-Identifier: Apache-2.0
//! What the library's file system is to this device: its answers, less what a
//! guest need not have, plus what it does not negotiate by itself.

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
    passthrough::PassthroughFs,
    transport::FsCacheReqHandler,
};

/// FUSE_ATTR_SUBMOUNT of Linux's fuse.h: the directory is the root of another
/// file system.
pub(super) const ATTR_SUBMOUNT: u32 = 1;

/// Longest extended attribute, and list of their names, in bytes (Linux's
/// XATTR_SIZE_MAX and XATTR_LIST_MAX).
const XATTR_MAX: u32 = 64 * 1024;
/// Longest part of a directory in one answer, in bytes.
const DIRECTORY_MAX: u32 = 1 << 20;

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
    inner: PassthroughFs<()>,
    /// Somebody else than the guest may change files.
    shared: bool,
    /// The guest has begun a session.
    mounted: Arc<AtomicBool>,
}

impl Files {
    /// `shared`: somebody else than the guest may change files. `mounted` is
    /// set while the guest has a session.
    pub fn new(inner: PassthroughFs<()>, shared: bool, mounted: Arc<AtomicBool>) -> Self {
        Self {
            inner,
            shared,
            mounted,
        }
    }

    /// The file system that a directory lies in.
    fn device(&self, ctx: &Context, inode: u64) -> io::Result<u64> {
        Ok(self.inner.getattr(ctx, inode, None)?.0.st_dev)
    }

    /// Tells the guest when `entry` is the root of another file system than
    /// its parent's: equal inode numbers of different file systems would be
    /// the same file to programs otherwise.
    fn mark(&self, device: u64, mut entry: Entry) -> Entry {
        if entry.attr.st_mode & libc::S_IFMT == libc::S_IFDIR && entry.attr.st_dev != device {
            entry.attr_flags |= ATTR_SUBMOUNT;
        }
        entry
    }
}

/// A name the guest may look up. Its kernel resolves `.` and `..` itself; a
/// guest that asks for them wants out.
fn name_allowed(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"." | b".." => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        _ => Ok(()),
    }
}

impl FileSystem for Files {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        let mut wanted = self.inner.init(capable)?
            | FsOptions::ASYNC_READ
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::BIG_WRITES
            | FsOptions::CACHE_SYMLINKS
            | FsOptions::MAX_PAGES
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::SUBMOUNTS;
        if self.shared {
            wanted |= FsOptions::AUTO_INVAL_DATA;
        }
        self.mounted.store(true, Ordering::SeqCst);
        Ok(wanted)
    }

    fn destroy(&self) {
        self.inner.destroy();
        self.mounted.store(false, Ordering::SeqCst);
    }

    fn lookup(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        name_allowed(name)?;
        let device = self.device(ctx, parent)?;
        Ok(self.mark(device, self.inner.lookup(ctx, parent, name)?))
    }

    fn forget(&self, ctx: &Context, inode: u64, count: u64) {
        self.inner.forget(ctx, inode, count);
    }

    fn batch_forget(&self, ctx: &Context, requests: Vec<(u64, u64)>) {
        self.inner.batch_forget(ctx, requests);
    }

    fn getattr(
        &self,
        ctx: &Context,
        inode: u64,
        handle: Option<u64>,
    ) -> io::Result<(stat64, Duration)> {
        self.inner.getattr(ctx, inode, handle)
    }

    fn setattr(
        &self,
        ctx: &Context,
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
            return self.inner.getattr(ctx, inode, handle);
        }
        self.inner.setattr(ctx, inode, attr, handle, valid)
    }

    fn readlink(&self, ctx: &Context, inode: u64) -> io::Result<Vec<u8>> {
        self.inner.readlink(ctx, inode)
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

    fn unlink(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.inner.unlink(ctx, parent, name)
    }

    fn rmdir(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.inner.rmdir(ctx, parent, name)
    }

    fn rename(
        &self,
        ctx: &Context,
        old_parent: u64,
        old_name: &CStr,
        new_parent: u64,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        self.inner
            .rename(ctx, old_parent, old_name, new_parent, new_name, flags)
    }

    fn link(&self, ctx: &Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.inner.link(ctx, inode, parent, name)
    }

    fn open(
        &self,
        ctx: &Context,
        inode: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        self.inner.open(ctx, inode, flags & OPEN_FLAGS, fuse_flags)
    }

    fn create(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mut args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        args.flags &= OPEN_FLAGS;
        self.inner.create(ctx, parent, name, args)
    }

    fn read(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        to: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        let flags = flags & OPEN_FLAGS;
        self.inner
            .read(ctx, inode, handle, to, size, offset, lock_owner, flags)
    }

    fn write(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        from: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let flags = flags & OPEN_FLAGS;
        self.inner.write(
            ctx, inode, handle, from, size, offset, lock_owner, delayed, flags, fuse_flags,
        )
    }

    fn flush(&self, ctx: &Context, inode: u64, handle: u64, owner: u64) -> io::Result<()> {
        self.inner.flush(ctx, inode, handle, owner)
    }

    fn fsync(&self, ctx: &Context, inode: u64, data_only: bool, handle: u64) -> io::Result<()> {
        self.inner.fsync(ctx, inode, data_only, handle)
    }

    fn fallocate(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.inner
            .fallocate(ctx, inode, handle, mode, offset, length)
    }

    fn release(
        &self,
        ctx: &Context,
        inode: u64,
        flags: u32,
        handle: u64,
        flush: bool,
        unlock: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.inner
            .release(ctx, inode, flags, handle, flush, unlock, lock_owner)
    }

    fn statfs(&self, ctx: &Context, inode: u64) -> io::Result<statvfs64> {
        self.inner.statfs(ctx, inode)
    }

    fn setxattr(
        &self,
        ctx: &Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        self.inner.setxattr(ctx, inode, name, value, flags)
    }

    fn getxattr(
        &self,
        ctx: &Context,
        inode: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        self.inner.getxattr(ctx, inode, name, size.min(XATTR_MAX))
    }

    fn listxattr(&self, ctx: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        self.inner.listxattr(ctx, inode, size.min(XATTR_MAX))
    }

    fn removexattr(&self, ctx: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        self.inner.removexattr(ctx, inode, name)
    }

    fn opendir(
        &self,
        ctx: &Context,
        inode: u64,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        self.inner.opendir(ctx, inode, flags & OPEN_FLAGS)
    }

    fn readdir(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        // By way of the other kind of listing, which gives inode numbers that
        // agree with stat's; what it looks up, nobody holds.
        self.inner.readdirplus(
            ctx,
            inode,
            handle,
            size.min(DIRECTORY_MAX),
            offset,
            &mut |name, entry| {
                let added = add(name);
                if !matches!(added, Ok(0)) {
                    self.inner.forget(ctx, entry.inode, 1);
                }
                added
            },
        )
    }

    fn readdirplus(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let device = self.device(ctx, inode)?;
        self.inner.readdirplus(
            ctx,
            inode,
            handle,
            size.min(DIRECTORY_MAX),
            offset,
            &mut |name, entry| {
                let number = entry.inode;
                let added = add(name, self.mark(device, entry));
                if added.is_err() {
                    self.inner.forget(ctx, number, 1);
                }
                added
            },
        )
    }

    fn fsyncdir(&self, ctx: &Context, inode: u64, data_only: bool, handle: u64) -> io::Result<()> {
        self.inner.fsyncdir(ctx, inode, data_only, handle)
    }

    fn releasedir(&self, ctx: &Context, inode: u64, flags: u32, handle: u64) -> io::Result<()> {
        self.inner.releasedir(ctx, inode, flags, handle)
    }

    fn access(&self, ctx: &Context, inode: u64, mask: u32) -> io::Result<()> {
        self.inner.access(ctx, inode, mask)
    }

    fn setupmapping(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        file_offset: u64,
        length: u64,
        flags: u64,
        offset: u64,
        window: &mut dyn FsCacheReqHandler,
    ) -> io::Result<()> {
        self.inner.setupmapping(
            ctx,
            inode,
            handle,
            file_offset,
            length,
            flags,
            offset,
            window,
        )
    }

    fn removemapping(
        &self,
        ctx: &Context,
        inode: u64,
        requests: Vec<RemovemappingOne>,
        window: &mut dyn FsCacheReqHandler,
    ) -> io::Result<()> {
        self.inner.removemapping(ctx, inode, requests, window)
    }

    fn lseek(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        self.inner.lseek(ctx, inode, handle, offset, whence)
    }
}
