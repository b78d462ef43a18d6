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

use super::{
    device::{RECEIVE_TIMER, TAP, TRANSMIT_TIMER},
    receive::Ready,
    throttle::Throttle,
    Net,
};
use crate::{
    event::EventHandler,
    virtio::chain::{segments, Broken, Chain, Queues, Segment},
};

pub(super) const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL: usize = 2;
const SEND: u32 = TRANSMIT as u32;
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
        let timer = match token {
            RECEIVE_TIMER => self.receive_limit.as_mut(),
            TRANSMIT_TIMER => self.transmit_limit.as_mut(),
            _ => None,
        };
        if let Some(limit) = timer {
            limit.fired();
        }
        if token < TAP {
            if !queues.notified(token as usize) {
                return;
            }
        } else if queues.is_broken() {
            queues.event_loop.unregister(&self.tap);
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
        let mut both = Both {
            ready: &mut self.ready,
            tap: &self.tap,
            receive_limit: &mut self.receive_limit,
            transmit_limit: &mut self.transmit_limit,
        };
        let outcome = match token {
            SEND | TRANSMIT_TIMER => both.work(queues),
            _ => both.receive(queues, token == TAP),
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

/// Both directions of an interface, with their limits.
struct Both<'d> {
    ready: &'d mut Ready,
    tap: &'d File,
    receive_limit: &'d mut Option<Throttle>,
    transmit_limit: &'d mut Option<Throttle>,
}

impl Both<'_> {
    /// Sends what the guest has queued and receives what there is then, until
    /// nothing more comes of it; whether the tap should be watched on.
    fn work(&mut self, queues: &mut Queues) -> Result<bool, Broken> {
        let mut wants_more = true;
        for _ in 0..TURNS {
            let sent = self.send(queues)?;
            wants_more = self.receive(queues, false)?;
            if sent == 0 {
                break;
            }
            queues.signal(TRANSMIT);
        }
        // What waits for the timer is not to be told of.
        if !self.transmit_limit.as_ref().is_some_and(Throttle::waits) {
            queues.rest(TRANSMIT);
        }
        Ok(wants_more)
    }

    /// Sends what the guest has queued, as far as the limit lets it; how many
    /// packets.
    fn send(&mut self, queues: &mut Queues) -> Result<usize, Broken> {
        let memory = queues.memory.memory();
        let counters = Arc::clone(&queues.counters);
        let tap = self.tap;
        let mut bytes = 0;
        let mut send = |queues: &mut Queues, limit| {
            let taken = queues.take(TRANSMIT, limit, |chain| {
                let (readable, _) = segments(chain);
                match transmit(&memory, tap, &readable)? {
                    Some(sent) => {
                        counters.from_guest(sent as u64);
                        bytes += sent;
                    }
                    None => counters.error(),
                }
                Ok(0)
            });
            match queues.is_broken() {
                true => Err(Broken),
                false => Ok((taken, std::mem::take(&mut bytes))),
            }
        };
        let Some(limit) = self.transmit_limit else {
            return send(queues, ROUND).map(|(taken, _)| taken);
        };
        for sent in 0..ROUND {
            if limit.waits() || queues.is_empty(TRANSMIT) {
                return Ok(sent);
            }
            let wait = limit.wait();
            if !wait.is_zero() {
                limit.set(wait, &queues.counters)?;
                return Ok(sent);
            }
            let (taken, bytes) = send(queues, 1)?;
            if taken == 0 {
                return Ok(sent);
            }
            limit.take(bytes);
        }
        Ok(ROUND)
    }

    /// Receives what the tap has, which `has_some` says that it has; whether it
    /// should be watched on.
    fn receive(&mut self, queues: &mut Queues, has_some: bool) -> Result<bool, Broken> {
        let Some(limit) = self.receive_limit else {
            return self.ready.receive(queues, self.tap, None);
        };
        // What has to wait for a packet need not know of one.
        if limit.waits() {
            return Ok(false);
        }
        let wait = limit.wait();
        if wait.is_zero() {
            return self.ready.receive(queues, self.tap, Some(limit));
        }
        // Without one, the tap tells.
        if has_some {
            limit.set(wait, &queues.counters)?;
        }
        Ok(!has_some)
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
