// SPDX-License-Identifier: Apache-2.0
//! The guest's receive buffers, and packets into them.

use std::{collections::VecDeque, fs::File, io, os::fd::AsRawFd, sync::Arc};

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};

use super::{
    device::HEADER,
    event::{add_piece, MAX_PIECES, ROUND},
    throttle::Throttle,
};
use crate::virtio::chain::{
    add_used_together, pop, segments, wants_interrupt, Broken, Queues, Segment,
};

/// The largest packet a tap gives with segmentation offload, with its header.
const LARGEST: usize = 65535 + 14 + HEADER;
/// Where `num_buffers` lies in the header.
const NUM_BUFFERS: u64 = 10;

/// A receive buffer of the guest.
struct Buffer {
    head: u16,
    segments: Vec<Segment>,
    length: usize,
    /// Pieces of the vector it is in.
    pieces: usize,
}

/// Buffers that were taken off the queue and wait for packets: as many as the
/// largest takes, since none says how large it is before it is read. Most are
/// small, and leave the rest to the next.
#[derive(Default)]
pub(super) struct Ready {
    buffers: VecDeque<Buffer>,
    /// Bytes of all of them.
    room: usize,
}

impl Ready {
    /// Receives what the tap has, as far as the limit lets it; whether it should
    /// be watched on.
    pub fn receive(
        &mut self,
        queues: &mut Queues,
        index: usize,
        tap: &File,
        mut limit: Option<&mut Throttle>,
    ) -> Result<bool, Broken> {
        let memory = queues.memory.memory();
        let mergeable = queues.has_feature(VIRTIO_NET_F_MRG_RXBUF);
        let counters = Arc::clone(&queues.counters);
        let interrupt = Arc::clone(&queues.interrupt);
        let queue = queues.get(index).ok_or(Broken)?;
        let before = queue.next_used();
        let mut vector = Vec::new();
        // Of the vector: what earlier packets are in.
        let mut done = 0;
        for buffer in &mut self.buffers {
            buffer.add_to(&memory, &mut vector)?;
        }
        let mut more = true;
        for _ in 0..ROUND {
            if !self.fill(queue, &memory, mergeable, &mut vector)? {
                // The driver's next notification continues.
                more = false;
                break;
            }
            let pieces = &vector[done..];
            if pieces.len() > MAX_PIECES {
                return Err(Broken);
            }
            // SAFETY: every piece lies in guest memory that `memory` keeps mapped.
            let got = unsafe {
                libc::readv(
                    tap.as_raw_fd(),
                    pieces.as_ptr(),
                    pieces.len() as libc::c_int,
                )
            };
            let Ok(got) = usize::try_from(got) else {
                // Otherwise the tap is down or gone: nothing comes until it changes.
                more = io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock;
                break;
            };
            counters.requests(1);
            counters.to_guest(got as u64);
            done += self.use_up(queue, &memory, got, mergeable)?;
            if let Some(limit) = &mut limit {
                limit.take(got);
                if !limit.wait().is_zero() {
                    // If there is another, the tap tells.
                    break;
                }
            }
        }
        if queue.next_used() != before && wants_interrupt(queue, &memory, before) {
            interrupt.signal_queue(index);
        }
        Ok(more)
    }

    /// Takes buffers until a packet of any size fits; false when the driver has
    /// none at all.
    fn fill(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        mergeable: bool,
        vector: &mut Vec<libc::iovec>,
    ) -> Result<bool, Broken> {
        // Without merging, a packet is in one buffer.
        while self.buffers.is_empty() || (mergeable && self.room < LARGEST) {
            let Some(chain) = pop(queue, memory)? else {
                if queue.enable_notification(memory).map_err(|_| Broken)? {
                    continue;
                }
                // Big packets come only to a guest that took the offloads, and it
                // keeps the queue full: some room is enough to try.
                break;
            };
            let head = chain.head_index();
            let (_, segments) = segments(chain);
            // Each may be a packet's first (virtio 1.2 §5.1.6.3.1).
            let first = segments.first().ok_or(Broken)?;
            if (first.length as usize) < HEADER {
                return Err(Broken);
            }
            let mut buffer = Buffer {
                head,
                length: segments.iter().map(|s| s.length as usize).sum(),
                segments,
                pieces: 0,
            };
            buffer.add_to(memory, vector)?;
            self.room += buffer.length;
            self.buffers.push_back(buffer);
        }
        Ok(!self.buffers.is_empty())
    }

    /// Gives the driver the buffers that a packet of `got` bytes is in; how many
    /// pieces of the vector these were.
    fn use_up(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemoryMmap,
        got: usize,
        mergeable: bool,
    ) -> Result<usize, Broken> {
        let Some(header) = self.buffers.front().map(|first| first.segments[0].address) else {
            return Err(Broken);
        };
        let (mut left, mut pieces) = (got, 0);
        let mut filled = Vec::new();
        while left > 0 {
            let buffer = self.buffers.pop_front().ok_or(Broken)?;
            let part = left.min(buffer.length);
            filled.push((buffer.head, part as u32));
            self.room -= buffer.length;
            pieces += buffer.pieces;
            left -= part;
        }
        if mergeable && got >= HEADER {
            let at = header.0.checked_add(NUM_BUFFERS).ok_or(Broken)?;
            memory
                .write_obj((filled.len() as u16).to_le(), GuestAddress(at))
                .map_err(|_| Broken)?;
        }
        add_used_together(queue, memory, &filled)?;
        Ok(pieces)
    }

    /// Leaves to the queue what no packet came for.
    pub fn give_back(&mut self, queue: &mut Queue) {
        let next = queue.next_avail().wrapping_sub(self.buffers.len() as u16);
        queue.set_next_avail(next);
        *self = Self::default();
    }
}

impl Buffer {
    /// Adds it to an iovec, for as long as that is used.
    fn add_to(
        &mut self,
        memory: &GuestMemoryMmap,
        vector: &mut Vec<libc::iovec>,
    ) -> Result<(), Broken> {
        let before = vector.len();
        for segment in &self.segments {
            add_piece(memory, segment, vector)?;
        }
        self.pieces = vector.len() - before;
        Ok(())
    }
}
