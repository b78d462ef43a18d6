// SPDX-License-Identifier: Apache-2.0
//! Packets between tap and queues, scattered and gathered in guest memory
//! itself (virtio 1.2 §5.1.6).

use std::{fs::File, io, os::fd::AsRawFd, sync::Arc};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_ERR, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_OK,
};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::{
    device::{HEADER, TAP},
    Net,
};
use crate::{
    event::EventHandler,
    virtio::chain::{
        add_used_together, pop, segments, wants_interrupt, Broken, Chain, Queues, Segment,
    },
};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL: usize = 2;
/// Most packets per wake-up and direction.
const ROUND: usize = 128;
/// The largest packet a tap gives with segmentation offload, with its header.
const LARGEST: usize = 65535 + 14 + HEADER;
/// Most pieces of one packet: the kernel's limit of an iovec.
const MAX_PIECES: usize = 1024;
/// Where `num_buffers` lies in the header.
const NUM_BUFFERS: u64 = 10;

impl EventHandler for Net {
    fn handle(&mut self, token: u32, _events: EventSet) {
        let Some(queues) = &mut self.active else {
            return;
        };
        if token == TAP {
            if queues.is_broken() {
                queues.event_loop.unregister(&self.tap);
                return;
            }
        } else if !queues.notified(token as usize) {
            return;
        }
        if token as usize == CONTROL {
            let memory = queues.memory.memory();
            let mut announced = false;
            queues.drain(CONTROL, ROUND, |chain| {
                let (length, done) = control(&memory, chain)?;
                announced |= done;
                Ok(length)
            });
            if announced {
                self.announced();
            }
            return;
        }
        if token as usize == TRANSMIT {
            let memory = queues.memory.memory();
            let tap = &self.tap;
            let counters = Arc::clone(&queues.counters);
            queues.drain(TRANSMIT, ROUND, |chain| {
                let (readable, _) = segments(chain);
                match transmit(&memory, tap, &readable)? {
                    Some(sent) => counters.from_guest(sent as u64),
                    None => counters.error(),
                }
                Ok(0)
            });
            return;
        }
        let wants_more = match receive(queues, &self.tap) {
            Ok(wants_more) => wants_more,
            Err(Broken) => {
                queues.break_device();
                false
            }
        };
        // A level-triggered tap would spin while the guest has no buffers.
        if wants_more != self.watched {
            let events = if wants_more {
                EventSet::IN
            } else {
                EventSet::empty()
            };
            if queues.event_loop.modify(&self.tap, events).is_ok() {
                self.watched = wants_more;
            }
        }
    }
}

/// Answers a command (virtio 1.2 §5.1.6.5): the only one that there is says that
/// the guest has announced itself. How many bytes were written, and whether it
/// was that one.
fn control(memory: &GuestMemoryMmap, chain: Chain<'_>) -> Result<(u32, bool), Broken> {
    let (readable, writable) = segments(chain);
    let (Some(command), Some(answer)) = (readable.first(), writable.last()) else {
        return Err(Broken);
    };
    let mut bytes = [0_u8; 2];
    if command.length < 2 || answer.length == 0 {
        return Err(Broken);
    }
    memory
        .read_slice(&mut bytes, command.address)
        .map_err(|_| Broken)?;
    let announced =
        bytes.map(u32::from) == [VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK];
    let result = match announced {
        true => VIRTIO_NET_OK,
        false => VIRTIO_NET_ERR,
    };
    memory
        .write_obj(result as u8, answer.address)
        .map_err(|_| Broken)?;
    Ok((1, announced))
}

/// Pieces of guest memory as an iovec. The guest's addresses are checked; the
/// vector is used while `memory` is borrowed.
fn pieces(memory: &GuestMemoryMmap, segments: &[Segment]) -> Result<Vec<libc::iovec>, Broken> {
    let mut pieces = Vec::with_capacity(segments.len());
    for segment in segments {
        for slice in memory.get_slices(segment.address, segment.length as usize) {
            let slice = slice.map_err(|_| Broken)?;
            pieces.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
        }
    }
    if pieces.len() > MAX_PIECES {
        return Err(Broken);
    }
    Ok(pieces)
}

/// Sends one packet; its bytes. What the tap refuses is dropped, as on a wire.
fn transmit(
    memory: &GuestMemoryMmap,
    tap: &File,
    readable: &[Segment],
) -> Result<Option<usize>, Broken> {
    let pieces = pieces(memory, readable)?;
    // SAFETY: every piece lies in guest memory that `memory` keeps mapped.
    let sent = unsafe {
        libc::writev(
            tap.as_raw_fd(),
            pieces.as_ptr(),
            pieces.len() as libc::c_int,
        )
    };
    Ok(usize::try_from(sent).ok())
}

/// A receive buffer of the guest.
struct Buffer {
    head: u16,
    segments: Vec<Segment>,
    length: usize,
}

/// Receives what the tap has; whether it should be watched on.
fn receive(queues: &mut Queues, tap: &File) -> Result<bool, Broken> {
    let memory = queues.memory.memory();
    let mergeable = queues.has_feature(VIRTIO_NET_F_MRG_RXBUF);
    let counters = Arc::clone(&queues.counters);
    let before = queues.get(RECEIVE).ok_or(Broken)?.next_used();
    let mut more = true;
    for _ in 0..ROUND {
        let Some(buffers) = take_buffers(queues, &memory, mergeable)? else {
            // The driver's next notification continues.
            more = false;
            break;
        };
        let all: Vec<Segment> = buffers
            .iter()
            .flat_map(|buffer| buffer.segments.iter().copied())
            .collect();
        let pieces = pieces(&memory, &all)?;
        // SAFETY: every piece lies in guest memory that `memory` keeps mapped.
        let got = unsafe {
            libc::readv(
                tap.as_raw_fd(),
                pieces.as_ptr(),
                pieces.len() as libc::c_int,
            )
        };
        let queue = queues.get(RECEIVE).ok_or(Broken)?;
        let Ok(got) = usize::try_from(got) else {
            for _ in &buffers {
                queue.go_to_previous_position();
            }
            if io::Error::last_os_error().kind() != io::ErrorKind::WouldBlock {
                // The tap is down or gone: nothing comes until it changes.
                more = false;
            }
            break;
        };
        counters.requests(1);
        counters.to_guest(got as u64);
        let mut left = got;
        let mut filled = Vec::with_capacity(buffers.len());
        for buffer in &buffers {
            if left == 0 {
                break;
            }
            let part = left.min(buffer.length);
            filled.push((buffer.head, part as u32));
            left -= part;
        }
        for _ in filled.len()..buffers.len() {
            queue.go_to_previous_position();
        }
        if mergeable && got >= HEADER {
            let first = buffers[0].segments[0].address;
            let at = first.0.checked_add(NUM_BUFFERS).ok_or(Broken)?;
            memory
                .write_obj((filled.len() as u16).to_le(), GuestAddress(at))
                .map_err(|_| Broken)?;
        }
        add_used_together(queue, &memory, &filled)?;
    }
    let interrupt = Arc::clone(&queues.interrupt);
    let queue = queues.get(RECEIVE).ok_or(Broken)?;
    if queue.next_used() != before && wants_interrupt(queue, &memory, before) {
        interrupt.signal_queue(RECEIVE);
    }
    Ok(more)
}

/// Takes buffers for one packet of any size; none when the driver has too few.
fn take_buffers(
    queues: &mut Queues,
    memory: &GuestMemoryMmap,
    mergeable: bool,
) -> Result<Option<Vec<Buffer>>, Broken> {
    let queue = queues.get(RECEIVE).ok_or(Broken)?;
    let mut buffers: Vec<Buffer> = Vec::new();
    let mut room = 0;
    while room < LARGEST {
        let Some(chain) = pop(queue, memory)? else {
            if queue.enable_notification(memory).map_err(|_| Broken)? {
                continue;
            }
            // Big packets come only to a guest that took the offloads, and it
            // keeps the queue full: some room is enough to try.
            if buffers.is_empty() {
                return Ok(None);
            }
            break;
        };
        let head = chain.head_index();
        let (_, segments) = segments(chain);
        let length: usize = segments.iter().map(|s| s.length as usize).sum();
        let header_fits = segments
            .first()
            .is_some_and(|s| s.length as usize >= HEADER);
        if buffers.is_empty() && !header_fits {
            return Err(Broken);
        }
        room += length;
        buffers.push(Buffer {
            head,
            segments,
            length,
        });
        if !mergeable {
            break;
        }
    }
    Ok(Some(buffers))
}
