// SPDX-License-Identifier: Apache-2.0
//! What is known of a file besides its data, and how that is changed.

use std::{ffi::CStr, io, os::fd::AsFd, time::Duration};

use fuse_backend_rs::{
    abi::fuse_abi::{stat64, statvfs64},
    api::filesystem::{GetxattrReply, ListxattrReply, SetattrValid},
};
use rustix::fs::{
    chmodat, chownat, fstatvfs, ftruncate, getxattr, listxattr, removexattr, setxattr, utimensat,
    AtFlags, Gid, Mode, Statx, Timespec, Timestamps, Uid, XattrFlags, UTIME_NOW, UTIME_OMIT,
};

use super::{identity::killing_privileges, link_name, table::status, Inode, Passthrough};

/// As fuse.h has them.
pub fn attributes(status: &Statx) -> stat64 {
    // SAFETY: a structure of numbers, for which zero is one.
    let mut attr: stat64 = unsafe { std::mem::zeroed() };
    attr.st_dev = libc::makedev(status.stx_dev_major, status.stx_dev_minor);
    attr.st_ino = status.stx_ino;
    attr.st_mode = status.stx_mode.into();
    attr.st_nlink = status.stx_nlink.into();
    attr.st_uid = status.stx_uid;
    attr.st_gid = status.stx_gid;
    attr.st_rdev = libc::makedev(status.stx_rdev_major, status.stx_rdev_minor);
    attr.st_size = status.stx_size as i64;
    attr.st_blksize = status.stx_blksize.into();
    attr.st_blocks = status.stx_blocks as i64;
    attr.st_atime = status.stx_atime.tv_sec;
    attr.st_atime_nsec = status.stx_atime.tv_nsec.into();
    attr.st_mtime = status.stx_mtime.tv_sec;
    attr.st_mtime_nsec = status.stx_mtime.tv_nsec.into();
    attr.st_ctime = status.stx_ctime.tv_sec;
    attr.st_ctime_nsec = status.stx_ctime.tv_nsec.into();
    attr
}

impl Passthrough {
    /// A file's attributes, and for how long they hold.
    pub fn getattr(&self, inode: u64) -> io::Result<(stat64, Duration)> {
        let inode = self.inode(inode)?;
        let status = status(&inode.fd)?;
        Ok((attributes(&status), self.caching.valid))
    }

    /// Changes those that `valid` names. `handle`: where the guest has the file
    /// open, to change its size.
    pub fn setattr(
        &self,
        number: u64,
        attr: &stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        let inode = self.inode(number)?;
        let name = link_name(inode.fd.as_fd());
        // First, for it takes set-user-id bits away, which the mode may have.
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let user = valid.contains(SetattrValid::UID);
            let group = valid.contains(SetattrValid::GID);
            let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW;
            chownat(
                &inode.fd,
                c"",
                user.then(|| Uid::from_raw_unchecked(attr.st_uid)),
                group.then(|| Gid::from_raw_unchecked(attr.st_gid)),
                flags,
            )?;
        }
        if valid.contains(SetattrValid::MODE) {
            let mode = Mode::from_bits_truncate(attr.st_mode & 0o7777);
            chmodat(&self.descriptors, name.as_c_str(), mode, AtFlags::empty())?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let size = u64::try_from(attr.st_size)
                .map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
            let kill = valid.contains(SetattrValid::KILL_SUIDGID);
            killing_privileges(kill, || self.truncate(number, &inode, handle, size))?;
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            let time = |set, now, seconds, nanoseconds| Timespec {
                tv_sec: seconds,
                tv_nsec: match (valid.contains(set), valid.contains(now)) {
                    (_, true) => UTIME_NOW,
                    (true, false) => nanoseconds,
                    (false, false) => UTIME_OMIT,
                },
            };
            let times = Timestamps {
                last_access: time(
                    SetattrValid::ATIME,
                    SetattrValid::ATIME_NOW,
                    attr.st_atime,
                    attr.st_atime_nsec,
                ),
                last_modification: time(
                    SetattrValid::MTIME,
                    SetattrValid::MTIME_NOW,
                    attr.st_mtime,
                    attr.st_mtime_nsec,
                ),
            };
            let flags = AtFlags::empty();
            utimensat(&self.descriptors, name.as_c_str(), &times, flags)?;
        }
        self.getattr(number)
    }

    fn truncate(
        &self,
        number: u64,
        inode: &Inode,
        handle: Option<u64>,
        size: u64,
    ) -> io::Result<()> {
        if let Some(handle) = handle {
            return Ok(ftruncate(&self.table().handle(handle, number)?.file, size)?);
        }
        let flags = libc::O_WRONLY | libc::O_NONBLOCK;
        Ok(ftruncate(self.reopen(inode, flags as u32)?, size)?)
    }

    /// Of the file system that a file lies in.
    pub fn statfs(&self, inode: u64) -> io::Result<statvfs64> {
        let inode = self.inode(inode)?;
        let found = fstatvfs(&inode.fd)?;
        // SAFETY: a structure of numbers, for which zero is one.
        let mut out: statvfs64 = unsafe { std::mem::zeroed() };
        out.f_bsize = found.f_bsize;
        out.f_frsize = found.f_frsize;
        out.f_blocks = found.f_blocks;
        out.f_bfree = found.f_bfree;
        out.f_bavail = found.f_bavail;
        out.f_files = found.f_files;
        out.f_ffree = found.f_ffree;
        out.f_favail = found.f_favail;
        out.f_namemax = found.f_namemax;
        Ok(out)
    }

    /// The path by which a file's extended attributes are had, which an `O_PATH`
    /// descriptor has no calls for.
    fn with_path<T>(
        &self,
        inode: u64,
        work: impl FnOnce(&str) -> rustix::io::Result<T>,
    ) -> io::Result<T> {
        use std::os::fd::AsRawFd;

        let inode = self.inode(inode)?;
        let path = format!("/proc/self/fd/{}", inode.fd.as_raw_fd());
        Ok(work(&path)?)
    }

    /// Sets an extended attribute.
    pub fn setxattr(&self, inode: u64, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        let flags = XattrFlags::from_bits_retain(flags);
        self.with_path(inode, |path| setxattr(path, name, value, flags))
    }

    /// An extended attribute, or, for no bytes, how many it has.
    pub fn getxattr(&self, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let mut value = vec![0; size as usize];
        let length = self.with_path(inode, |path| getxattr(path, name, &mut value[..]))?;
        if size == 0 {
            return Ok(GetxattrReply::Count(length as u32));
        }
        value.truncate(length);
        Ok(GetxattrReply::Value(value))
    }

    /// The names of all, or, for no bytes, how many they are.
    pub fn listxattr(&self, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        let mut names = vec![0; size as usize];
        let length = self.with_path(inode, |path| listxattr(path, &mut names[..]))?;
        if size == 0 {
            return Ok(ListxattrReply::Count(length as u32));
        }
        names.truncate(length);
        Ok(ListxattrReply::Names(names))
    }

    /// Removes one.
    pub fn removexattr(&self, inode: u64, name: &CStr) -> io::Result<()> {
        self.with_path(inode, |path| removexattr(path, name))
    }
}
