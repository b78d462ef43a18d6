// SPDX-License-Identifier: Apache-2.0
//! The file behind the device: what requests do to it.

use std::{
    fs::File,
    io,
    os::{fd::AsRawFd, unix::fs::FileExt},
};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};
use vm_memory::{GuestMemory, GuestMemoryMmap};

use crate::virtio::chain::{Broken, Segment};

/// Bytes per sector, whatever the file's own block size.
pub const SECTOR: u64 = 512;
/// Most sectors that one segment discards: 2 GiB.
pub const MAX_DISCARD: u32 = 1 << 22;
/// Most sectors that are zeroed at once, 16 MiB: they may have to be written.
pub const MAX_ZEROES: u32 = 1 << 15;
/// Most segments to discard in one request.
pub const MAX_SEGMENTS: u32 = 16;
/// Bytes of `struct virtio_blk_discard_write_zeroes`.
pub const RANGE: usize = 16;
/// Its flag: the space may be taken away.
const UNMAP: u32 = 1;

/// The disk behind the device.
pub struct Disk {
    pub file: File,
    pub sectors: u64,
    pub read_only: bool,
    pub serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
}

/// What a request wants of ranges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Erase {
    /// They are not needed any more.
    Discard,
    /// They read as zero from now on.
    WriteZeroes,
}

impl Erase {
    fn limits(self) -> (u32, u32) {
        match self {
            Self::Discard => (MAX_DISCARD, MAX_SEGMENTS),
            Self::WriteZeroes => (MAX_ZEROES, 1),
        }
    }
}

impl Disk {
    /// Discards or zeroes what a request's ranges name (virtio 1.2 §5.2.6.1);
    /// nothing, when one of them is wrong.
    pub fn erase(&self, what: Erase, ranges: &[u8]) -> u32 {
        if self.read_only || ranges.is_empty() || ranges.len() % RANGE != 0 {
            return VIRTIO_BLK_S_IOERR;
        }
        let (most_sectors, most_ranges) = what.limits();
        if ranges.len() / RANGE > most_ranges as usize {
            return VIRTIO_BLK_S_IOERR;
        }
        let mut checked = Vec::new();
        for range in ranges.chunks_exact(RANGE) {
            let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| range[at + byte]));
            let sector = u64::from(word(0)) | u64::from(word(4)) << 32;
            let (count, flags) = (word(8), word(12));
            // Of others nothing is known, and this one is not for discarding.
            if flags & !UNMAP != 0 || (what == Erase::Discard && flags != 0) {
                return VIRTIO_BLK_S_UNSUPP;
            }
            let end = sector.checked_add(count.into());
            if count > most_sectors || end.is_none_or(|end| end > self.sectors) {
                return VIRTIO_BLK_S_IOERR;
            }
            checked.push((
                sector * SECTOR,
                u64::from(count) * SECTOR,
                flags & UNMAP != 0,
            ));
        }
        for (offset, length, unmap) in checked {
            let result = match what {
                _ if length == 0 => Ok(()),
                Erase::Discard => self.punch(offset, length),
                Erase::WriteZeroes => self.zero(offset, length, unmap),
            };
            match result {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    return VIRTIO_BLK_S_UNSUPP;
                }
                Err(_) => return VIRTIO_BLK_S_IOERR,
            }
        }
        VIRTIO_BLK_S_OK
    }

    /// Takes the space away; it reads as zero.
    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.allocate(libc::FALLOC_FL_PUNCH_HOLE, offset, length)
    }

    /// In the best way that the file has.
    fn zero(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        let modes = [libc::FALLOC_FL_PUNCH_HOLE, libc::FALLOC_FL_ZERO_RANGE];
        for mode in &modes[usize::from(!unmap)..] {
            match self.allocate(*mode, offset, length) {
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
                other => return other,
            }
        }
        let zeros = vec![0; 64 << 10];
        let mut done = 0;
        while done < length {
            let part = (length - done).min(zeros.len() as u64);
            self.file
                .write_all_at(&zeros[..part as usize], offset + done)?;
            done += part;
        }
        Ok(())
    }

    fn allocate(&self, mode: libc::c_int, offset: u64, length: u64) -> io::Result<()> {
        loop {
            // SAFETY: takes no pointers; the range was checked to be the disk's,
            // so both numbers fit.
            let result = unsafe {
                libc::fallocate(
                    self.file.as_raw_fd(),
                    mode | libc::FALLOC_FL_KEEP_SIZE,
                    offset as libc::off_t,
                    length as libc::off_t,
                )
            };
            let error = match result {
                0 => return Ok(()),
                _ => io::Error::last_os_error(),
            };
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// Where a transfer starts in the file; none when it is not of whole
    /// sectors or reaches beyond the disk's end.
    pub fn offset(&self, sector: u64, segments: &[Segment]) -> Option<u64> {
        let length: u64 = segments.iter().map(|s| u64::from(s.length)).sum();
        let end = sector.checked_add(length / SECTOR)?;
        (length % SECTOR == 0 && end <= self.sectors).then(|| sector * SECTOR)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    In,
    Out,
}

/// Moves data between file and guest memory without a copy in between.
pub fn transfer(
    memory: &GuestMemoryMmap,
    disk: &Disk,
    mut offset: u64,
    segments: &[Segment],
    direction: Direction,
) -> Result<(u32, u32), Broken> {
    let mut moved = 0_u32;
    for segment in segments {
        for slice in memory.get_slices(segment.address, segment.length as usize) {
            let slice = slice.map_err(|_| Broken)?;
            let guard = slice.ptr_guard_mut();
            let mut done = 0;
            while done < slice.len() {
                // A disk's offsets fit: its size came from the kernel.
                let at = offset as libc::off_t;
                let (fd, left) = (disk.file.as_raw_fd(), slice.len() - done);
                // SAFETY: the pointer and the rest of the length lie in one
                // slice of guest memory, which `memory` keeps mapped; the
                // guest may change it meanwhile, which the kernel tolerates.
                let result = unsafe {
                    let pointer = guard.as_ptr().add(done);
                    match direction {
                        Direction::In => libc::pread(fd, pointer.cast(), left, at),
                        Direction::Out => libc::pwrite(fd, pointer.cast(), left, at),
                    }
                };
                match usize::try_from(result) {
                    // The file has become shorter than it was.
                    Ok(0) => return Ok((VIRTIO_BLK_S_IOERR, moved)),
                    Ok(count) => {
                        done += count;
                        offset += count as u64;
                        moved = moved.saturating_add(count as u32);
                    }
                    Err(_) => {
                        if std::io::Error::last_os_error().kind() != std::io::ErrorKind::Interrupted
                        {
                            return Ok((VIRTIO_BLK_S_IOERR, moved));
                        }
                    }
                }
            }
        }
    }
    Ok((VIRTIO_BLK_S_OK, moved))
}
