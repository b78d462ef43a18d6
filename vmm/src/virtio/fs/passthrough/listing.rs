// SPDX-License-Identifier: Apache-2.0
//! What is in a directory.

use std::{ffi::CStr, io, mem::MaybeUninit};

use fuse_backend_rs::api::filesystem::{DirEntry, Entry};
use rustix::fs::{seek, statx, AtFlags, RawDir, SeekFrom, StatxFlags};

use super::Passthrough;

/// Bytes of names that are read at once.
const READ: usize = 32 << 10;

impl Passthrough {
    /// Tells of a directory's entries from `offset` on, until `add` takes no more.
    pub fn readdir(
        &self,
        inode: u64,
        handle: u64,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        let parent = self.inode(inode)?;
        self.each(inode, handle, offset, |mut entry, name| {
            // What the directory says of a mount point is what lies below it.
            let flags = AtFlags::SYMLINK_NOFOLLOW;
            let status = statx(&parent.fd, name, flags, StatxFlags::INO);
            match status {
                Ok(status) => entry.ino = status.stx_ino,
                // It has just gone.
                Err(rustix::io::Errno::NOENT) => return Ok(true),
                Err(error) => return Err(error.into()),
            }
            Ok(add(entry)? > 0)
        })
    }

    /// As [`Self::readdir`], and the guest knows the files from then on.
    pub fn readdirplus(
        &self,
        inode: u64,
        handle: u64,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let parent = self.inode(inode)?;
        self.each(inode, handle, offset, |mut entry, name| {
            let found = match self.find(&parent, name) {
                Ok(found) => found,
                // It has just gone.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
                Err(error) => return Err(error),
            };
            let number = found.inode;
            entry.ino = found.attr.st_ino;
            let added = add(entry, found);
            if !matches!(added, Ok(1..)) {
                // The guest is not told of it.
                self.forget(number, 1);
            }
            Ok(added? > 0)
        })
    }

    /// Goes through a directory until `tell` says that it is enough. An error after
    /// the first entry ends the part that is told, and comes back with the next.
    fn each(
        &self,
        inode: u64,
        handle: u64,
        offset: u64,
        mut tell: impl FnMut(DirEntry<'_>, &CStr) -> io::Result<bool>,
    ) -> io::Result<()> {
        // Of its own: while it is read, files are looked up.
        let directory = self.table().handle(handle, inode)?.file.try_clone()?;
        seek(&directory, SeekFrom::Start(offset))?;
        let mut buffer = vec![MaybeUninit::uninit(); READ];
        let mut entries = RawDir::new(&directory, &mut buffer);
        let mut told = false;
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let shown = DirEntry {
                ino: entry.ino(),
                offset: entry.next_entry_cookie(),
                type_: kind(entry.file_type()),
                name: name.to_bytes(),
            };
            match tell(shown, name) {
                Ok(true) => told = true,
                Ok(false) => break,
                Err(_) if told => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// `DT_*` of a kind of file: S_IFMT of its mode, shifted (Linux's fs_types.h).
fn kind(kind: rustix::fs::FileType) -> u32 {
    match kind {
        rustix::fs::FileType::Unknown => 0,
        kind => kind.as_raw_mode() >> 12,
    }
}
