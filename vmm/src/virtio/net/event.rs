// SPDX-License-Identifier: Apache-2.0
//! Packets between tap and queues, scattered and gathered in guest memory
//! itself (virtio 1.2 §5.1.6).
//!
//! What the guest sends is answered at once more often than not: the host's
//! TCP acknowledges it while the tap takes it. So both directions are worked
//! in turn until nothing is left, and the guest is told of what it got before
//! it is told of what it has sent: a driver looks for the latter as well when
//! it is told of the former, and then need not be told again.

use std::{fs::File, os::fd::AsRawFd, sync::Arc};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use vm_memory::{Bytes, GuestAddressSpace, GuestMemory, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::{device::TAP, receive::Ready, Net};
use crate::{
    event::EventHandler,
    virtio::chain::{segments, Broken, Chain, Queues, Segment},
};

pub(super) const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL: usize = 2;
/// Most packets per turn and direction.
pub(super) const ROUND: usize = 128;
/// Most turns per wake-up: others share the loop.
const TURNS: usize = 4;
/// Most pieces of one packet: the kernel's limit of an iovec.
pub(super) const MAX_PIECES: usize = 1024;

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
        let outcome = match token as usize {
            TRANSMIT => both_ways(queues, &mut self.ready, &self.tap),
            _ => self.ready.receive(queues, &self.tap),
        };
        let wants_more = outcome.unwrap_or_else(|Broken| {
            queues.break_device();
            false
        });
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

/// Sends what the guest has queued and receives what there is then, until
/// nothing more comes of it; whether the tap should be watched on.
fn both_ways(queues: &mut Queues, ready: &mut Ready, tap: &File) -> Result<bool, Broken> {
    let memory = queues.memory.memory();
    let counters = Arc::clone(&queues.counters);
    let mut wants_more = true;
    for _ in 0..TURNS {
        let sent = queues.take(TRANSMIT, ROUND, |chain| {
            let (readable, _) = segments(chain);
            match transmit(&memory, tap, &readable)? {
                Some(sent) => counters.from_guest(sent as u64),
                None => counters.error(),
            }
            Ok(0)
        });
        if queues.is_broken() {
            return Ok(false);
        }
        wants_more = ready.receive(queues, tap)?;
        if sent == 0 {
            break;
        }
        queues.signal(TRANSMIT);
    }
    queues.rest(TRANSMIT);
    Ok(wants_more)
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

/// Adds a piece of guest memory to an iovec.
/// The guest's address is checked; the vector is used while `memory` is
/// borrowed.
pub(super) fn add_piece(
    memory: &GuestMemoryMmap,
    segment: &Segment,
    vector: &mut Vec<libc::iovec>,
) -> Result<(), Broken> {
    for slice in memory.get_slices(segment.address, segment.length as usize) {
        let slice = slice.map_err(|_| Broken)?;
        vector.push(libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        });
    }
    Ok(())
}

/// Sends one packet; its bytes. What the tap refuses is dropped, as on a wire.
fn transmit(
    memory: &GuestMemoryMmap,
    tap: &File,
    readable: &[Segment],
) -> Result<Option<usize>, Broken> {
    let mut pieces = Vec::with_capacity(readable.len());
    for segment in readable {
        add_piece(memory, segment, &mut pieces)?;
    }
    if pieces.len() > MAX_PIECES {
        return Err(Broken);
    }
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
