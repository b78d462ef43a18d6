// SPDX-License-Identifier: Apache-2.0
//! The DAX window (virtio 1.2 §5.11.6.2): a region of the guest's physical
//! memory where it has the host's page cache of files instead of a copy.

use std::{io, os::fd::RawFd, sync::Arc};

use fuse_backend_rs::{
    abi::virtio_fs::{RemovemappingOne, SetupmappingFlags},
    transport::FsCacheReqHandler,
};
use vm_memory::MmapRegion;

use crate::{arch::x86_64::layout::WINDOW_ALIGN, virtio::device::SharedMemory};

/// What a window is mapped in, in bytes: what Linux asks for (its FUSE_DAX_SZ).
/// Smaller pieces would let a guest use up the process's mappings.
const PIECE: u64 = WINDOW_ALIGN;

/// A window in this process. What has no file has no access either: a guest that
/// looks there ends its machine.
pub struct Window {
    address: u64,
    mapping: Arc<MmapRegion>,
}

impl Window {
    /// Room for `size` bytes, a multiple of [`WINDOW_ALIGN`], without a file.
    ///
    /// # Errors
    /// It is more than this process can have.
    pub fn reserve(size: u64) -> io::Result<Arc<MmapRegion>> {
        let size = usize::try_from(size).map_err(io::Error::other)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        MmapRegion::build(None, size, libc::PROT_NONE, flags)
            .map(Arc::new)
            .map_err(io::Error::other)
    }

    /// The room, which the guest has at `address`.
    pub fn new(address: u64, mapping: Arc<MmapRegion>) -> Self {
        Self { address, mapping }
    }

    /// Where the guest has it.
    pub fn region(&self) -> SharedMemory {
        SharedMemory {
            // VIRTIO_FS_SHMCAP_ID_CACHE.
            id: 0,
            address: self.address,
            size: self.mapping.size() as u64,
        }
    }

    /// Takes all files out of it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn clear(&mut self) -> io::Result<()> {
        self.place(0, self.mapping.size() as u64, None)
    }

    /// Whether whole pieces of the window begin at `offset`.
    fn check(&self, offset: u64, length: u64) -> io::Result<()> {
        let whole = offset % PIECE == 0 && length % PIECE == 0 && length > 0;
        let end = offset.checked_add(length);
        if whole && end.is_some_and(|end| end <= self.mapping.size() as u64) {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::EINVAL))
        }
    }

    /// Puts a file there, from an offset on and with a protection, or nothing.
    fn place(
        &mut self,
        offset: u64,
        length: u64,
        file: Option<(RawFd, libc::off_t, i32)>,
    ) -> io::Result<()> {
        self.check(offset, length)?;
        let (flags, (fd, from, protection)) = match file {
            Some(file) => (libc::MAP_SHARED, file),
            None => (
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                (-1, 0, libc::PROT_NONE),
            ),
        };
        // SAFETY: the range was checked to lie in the mapping, which is there as
        // long as `self`, and of which nobody in this process has references:
        // only the guest looks into it.
        let placed = unsafe {
            libc::mmap(
                self.mapping.as_ptr().add(offset as usize).cast(),
                length as usize,
                protection,
                flags | libc::MAP_FIXED,
                fd,
                from,
            )
        };
        if placed == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl FsCacheReqHandler for Window {
    fn map(
        &mut self,
        file_offset: u64,
        offset: u64,
        length: u64,
        flags: u64,
        fd: RawFd,
    ) -> io::Result<()> {
        let from = libc::off_t::try_from(file_offset)
            .ok()
            .filter(|from| from % PIECE as libc::off_t == 0)
            .ok_or(io::Error::from_raw_os_error(libc::EINVAL))?;
        let writable = flags & SetupmappingFlags::WRITE.bits() != 0;
        let protection = match writable {
            true => libc::PROT_READ | libc::PROT_WRITE,
            false => libc::PROT_READ,
        };
        self.place(offset, length, Some((fd, from, protection)))
    }

    fn unmap(&mut self, requests: Vec<RemovemappingOne>) -> io::Result<()> {
        for request in requests {
            self.place(request.moffset, request.len, None)?;
        }
        Ok(())
    }
}
