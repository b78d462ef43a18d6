// SPDX-License-Identifier: Apache-2.0
//! Requests, one after another (virtio 1.2 §5.2.6).

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::{
    disk::{transfer, Direction, Disk, Erase, MAX_SEGMENTS, RANGE},
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
        let timer = self.timer_token();
        let Some(active) = &mut self.active else {
            return;
        };
        let queues = if token == timer {
            if let Some(timer) = &mut active.timer {
                // It is not ready any more. What it is ready for follows.
                let _ = timer.clear();
            }
            if active.queues.is_broken() {
                return;
            }
            0..timer as usize
        } else {
            let index = token as usize;
            if !active.queues.notified(index) {
                return;
            }
            index..index + 1
        };
        let memory = active.queues.memory.memory();
        let disk = &self.disk;
        let counters = Arc::clone(&active.queues.counters);
        let mut longest = Duration::ZERO;
        for index in queues {
            active.queues.drain_while(
                index,
                ROUND,
                &mut self.limiter,
                |limiter| {
                    let wait = match limiter {
                        Some(limiter) => limiter.wait(Instant::now()),
                        None => Duration::ZERO,
                    };
                    longest = longest.max(wait);
                    if !wait.is_zero() {
                        counters.throttled();
                    }
                    wait.is_zero()
                },
                |limiter, chain| {
                    let done = serve(&memory, disk, chain)?;
                    counters.from_guest(done.written);
                    counters.to_guest(done.read);
                    if done.failed {
                        counters.error();
                    }
                    if let Some(limiter) = limiter {
                        limiter.take(done.read + done.written);
                    }
                    Ok(done.used)
                },
            );
        }
        if let (false, Some(timer)) = (longest.is_zero(), &mut active.timer) {
            if let Err(error) = timer.reset(longest, None) {
                tracing::error!(%error, "a disk's timer cannot be set");
                active.queues.break_device();
            }
        }
    }
}

/// What a request came to.
struct Done {
    /// Bytes written to the guest, the status included.
    used: u32,
    /// Bytes from the disk, and to it.
    read: u64,
    written: u64,
    failed: bool,
}

/// Serves one request.
fn serve(memory: &GuestMemoryMmap, disk: &Disk, chain: Chain<'_>) -> Result<Done, Broken> {
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
    let (mut read, mut stored) = (0, 0);
    let (answer, written) = match u32::from_le(kind) {
        VIRTIO_BLK_T_IN => match disk.offset(sector, data_in) {
            Some(offset) => {
                let (status, moved) = transfer(memory, disk, offset, data_in, Direction::In)?;
                read = moved.into();
                (status, moved)
            }
            None => (VIRTIO_BLK_S_IOERR, 0),
        },
        VIRTIO_BLK_T_OUT if disk.read_only => (VIRTIO_BLK_S_IOERR, 0),
        VIRTIO_BLK_T_OUT => match disk.offset(sector, data_out) {
            Some(offset) => {
                // All of it or an error: the driver takes the status for the
                // whole request.
                let (status, written) = transfer(memory, disk, offset, data_out, Direction::Out)?;
                stored = written.into();
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
        kind @ (VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) => {
            let what = match kind {
                VIRTIO_BLK_T_DISCARD => Erase::Discard,
                _ => Erase::WriteZeroes,
            };
            match gather(memory, data_out, MAX_SEGMENTS as usize * RANGE)? {
                Some(ranges) => (disk.erase(what, &ranges), 0),
                None => (VIRTIO_BLK_S_IOERR, 0),
            }
        }
        _ => (VIRTIO_BLK_S_UNSUPP, 0),
    };
    memory
        .write_obj(answer as u8, status.address)
        .map_err(|_| Broken)?;
    // At most what 256 descriptors hold was read; a status that overflows is
    // nobody's concern but the guest's.
    Ok(Done {
        used: written.saturating_add(1),
        read,
        written: stored,
        failed: answer != VIRTIO_BLK_S_OK,
    })
}

/// What the guest wrote, if it is at most so many bytes.
fn gather(
    memory: &GuestMemoryMmap,
    segments: &[Segment],
    most: usize,
) -> Result<Option<Vec<u8>>, Broken> {
    let length: u64 = segments.iter().map(|s| u64::from(s.length)).sum();
    if length > most as u64 {
        return Ok(None);
    }
    let mut bytes = vec![0; length as usize];
    let mut rest = &mut bytes[..];
    for segment in segments {
        let (part, left) = rest.split_at_mut(segment.length as usize);
        memory
            .read_slice(part, segment.address)
            .map_err(|_| Broken)?;
        rest = left;
    }
    Ok(Some(bytes))
}
