// SPDX-License-Identifier: Apache-2.0
//! Requests, one after another (virtio 1.2 §5.2.6).

use std::os::fd::AsRawFd;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use vm_memory::{Bytes, GuestAddressSpace, GuestMemory, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::{
    device::{Disk, SECTOR},
    Blk,
};
use crate::{
    event::EventHandler,
    virtio::chain::{segments, Broken, Chain, Segment},
};

/// `struct virtio_blk_outhdr`.
const HEADER: u32 = 16;
/// Most requests per wake-up.
const ROUND: usize = 32;

impl EventHandler for Blk {
    fn handle(&mut self, token: u32, _events: EventSet) {
        let Some(queues) = &mut self.active else {
            return;
        };
        if queues.notified(token as usize) {
            let memory = queues.memory.memory();
            let disk = &self.disk;
            queues.drain(0, ROUND, |chain| serve(&memory, disk, chain));
        }
    }
}

/// Serves one request; how many bytes were written to the guest.
fn serve(memory: &GuestMemoryMmap, disk: &Disk, chain: Chain<'_>) -> Result<u32, Broken> {
    let (readable, writable) = segments(chain);
    // The status byte is the last writable one.
    let (status, data_in) = writable.split_last().ok_or(Broken)?;
    let (header, data_out) = readable.split_first().ok_or(Broken)?;
    if header.length != HEADER || status.length != 1 {
        return Err(Broken);
    }
    let kind: u32 = memory.read_obj(header.address).map_err(|_| Broken)?;
    let sector: u64 = memory
        .read_obj(
            header
                .address
                .0
                .checked_add(8)
                .map(vm_memory::GuestAddress)
                .ok_or(Broken)?,
        )
        .map_err(|_| Broken)?;
    let sector = u64::from_le(sector);
    let (answer, written) = match u32::from_le(kind) {
        VIRTIO_BLK_T_IN => match disk.offset(sector, data_in) {
            Some(offset) => transfer(memory, disk, offset, data_in, Direction::In)?,
            None => (VIRTIO_BLK_S_IOERR, 0),
        },
        VIRTIO_BLK_T_OUT if disk.read_only => (VIRTIO_BLK_S_IOERR, 0),
        VIRTIO_BLK_T_OUT => match disk.offset(sector, data_out) {
            Some(offset) => {
                // All of it or an error: the driver takes the status for the
                // whole request.
                let (status, _) = transfer(memory, disk, offset, data_out, Direction::Out)?;
                (status, 0)
            }
            None => (VIRTIO_BLK_S_IOERR, 0),
        },
        VIRTIO_BLK_T_FLUSH => match disk.file.sync_data() {
            Ok(()) => (VIRTIO_BLK_S_OK, 0),
            Err(_) => (VIRTIO_BLK_S_IOERR, 0),
        },
        VIRTIO_BLK_T_GET_ID => match data_in.first() {
            Some(buffer) => {
                let length = disk.serial.len().min(buffer.length as usize);
                memory
                    .write_slice(&disk.serial[..length], buffer.address)
                    .map_err(|_| Broken)?;
                (VIRTIO_BLK_S_OK, length as u32)
            }
            None => (VIRTIO_BLK_S_IOERR, 0),
        },
        _ => (VIRTIO_BLK_S_UNSUPP, 0),
    };
    memory
        .write_obj(answer as u8, status.address)
        .map_err(|_| Broken)?;
    Ok(written + 1)
}

impl Disk {
    /// Where a transfer starts in the file; none when it is not of whole
    /// sectors or reaches beyond the disk's end.
    fn offset(&self, sector: u64, segments: &[Segment]) -> Option<u64> {
        let length: u64 = segments.iter().map(|s| u64::from(s.length)).sum();
        let end = sector.checked_add(length / SECTOR)?;
        (length % SECTOR == 0 && end <= self.sectors).then_some(sector * SECTOR)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    In,
    Out,
}

/// Moves data between file and guest memory without a copy in between.
fn transfer(
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
