// SPDX-License-Identifier: Apache-2.0
//! Open files and their data.

use std::{io, os::fd::AsRawFd};

use fuse_backend_rs::{
    abi::{
        fuse_abi::{FOPEN_IN_KILL_SUIDGID, WRITE_KILL_PRIV},
        virtio_fs::SetupmappingFlags,
    },
    api::filesystem::{OpenOptions, ZeroCopyReader, ZeroCopyWriter},
    transport::FsCacheReqHandler,
};
use rustix::{
    fs::{fallocate, fdatasync, fsync, FallocateFlags},
    io::dup,
};

use super::{identity::killing_privileges, Handle, Passthrough};

impl Passthrough {
    /// Opens a file, or a directory; its handle.
    pub fn open(&self, number: u64, flags: u32, kill: u32) -> io::Result<(u64, OpenOptions)> {
        let inode = self.inode(number)?;
        let kill = kill & FOPEN_IN_KILL_SUIDGID != 0;
        let file = killing_privileges(kill, || self.reopen(&inode, flags))?;
        let handle = self.table().open(Handle::new(number, file, flags))?;
        let directory = inode.kind == libc::S_IFDIR;
        Ok((handle, self.open_options(directory)))
    }

    /// Closes a handle.
    pub fn release(&self, inode: u64, handle: u64) -> io::Result<()> {
        self.table().close(handle, inode)
    }

    /// Reads; how many bytes there were.
    pub fn read(
        &self,
        inode: u64,
        handle: u64,
        to: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        flags: u32,
    ) -> io::Result<usize> {
        let mut table = self.table();
        let file = table.handle(handle, inode)?.with_flags(flags)?;
        to.write_from(file, size as usize, offset)
    }

    /// Writes; how many bytes.
    #[allow(clippy::too_many_arguments)] // As many as the request has.
    pub fn write(
        &self,
        inode: u64,
        handle: u64,
        from: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let mut table = self.table();
        let file = table.handle(handle, inode)?.with_flags(flags)?;
        killing_privileges(fuse_flags & WRITE_KILL_PRIV != 0, || {
            from.read_to(file, size as usize, offset)
        })
    }

    /// One of the guest's descriptors for the handle was closed, as one of ours is
    /// then: file systems tell of errors there.
    pub fn flush(&self, inode: u64, handle: u64) -> io::Result<()> {
        let copy = dup(&self.table().handle(handle, inode)?.file)?;
        // SAFETY: the descriptor is this function's, and is not used any more.
        match unsafe { libc::close(std::os::fd::IntoRawFd::into_raw_fd(copy)) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Makes a file, or its data only, durable.
    pub fn fsync(&self, inode: u64, data_only: bool, handle: u64) -> io::Result<()> {
        let mut table = self.table();
        let file = &table.handle(handle, inode)?.file;
        let synced = match data_only {
            true => fdatasync(file),
            false => fsync(file),
        };
        Ok(synced?)
    }

    /// Reserves or frees space, with a mode of fallocate(2).
    pub fn fallocate(
        &self,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let mut table = self.table();
        let file = &table.handle(handle, inode)?.file;
        let mode = FallocateFlags::from_bits_retain(mode);
        Ok(fallocate(file, mode, offset, length)?)
    }

    /// Where data, or a hole, begins, or the end (lseek(2)).
    pub fn lseek(&self, inode: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
        let offset = i64::try_from(offset).map_err(|_| invalid())?;
        let whence = i32::try_from(whence).map_err(|_| invalid())?;
        let mut table = self.table();
        let file = &table.handle(handle, inode)?.file;
        // SAFETY: takes no pointers.
        let at = unsafe { libc::lseek64(file.as_raw_fd(), offset, whence) };
        u64::try_from(at).map_err(|_| io::Error::last_os_error())
    }

    /// Puts a part of a file into the DAX window.
    pub fn setupmapping(
        &self,
        inode: u64,
        file_offset: u64,
        length: u64,
        flags: u64,
        offset: u64,
        window: &mut dyn FsCacheReqHandler,
    ) -> io::Result<()> {
        let inode = self.inode(inode)?;
        let access = match flags & SetupmappingFlags::WRITE.bits() {
            0 => libc::O_RDONLY,
            _ => libc::O_RDWR,
        };
        let file = self.reopen(&inode, access as u32)?;
        window.map(file_offset, offset, length, flags, file.as_raw_fd())
    }
}
