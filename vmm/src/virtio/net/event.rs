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

use virtio_bindings::virtio_net::VIRTIO_NET_F_MQ;
use vm_memory::{GuestAddressSpace, GuestMemory, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::{
    device::Tap,
    receive::Ready,
    throttle::Throttle,
    vhost::{Told, Vhost},
    Net,
};
use crate::{
    event::EventHandler,
    virtio::chain::{segments, Broken, Queues, Segment},
};

/// Most packets per turn and direction.
pub(super) const ROUND: usize = 128;
/// Most turns per wake-up: others share the loop.
const TURNS: usize = 4;
/// Most pieces of one packet: the kernel's limit of an iovec.
pub(super) const MAX_PIECES: usize = 1024;

/// What an event of the loop is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// The driver has given buffers to receive into, of that pair.
    Receive(usize),
    /// It has something to transmit.
    Transmit(usize),
    /// It has a command.
    Control,
    /// That queue of the tap has a packet.
    Tap(usize),
    /// Who had to wait to receive need not any more.
    ReceiveAgain,
    /// Nor to transmit.
    TransmitAgain,
    /// What the kernel tells that moves packets.
    Kernel(Told),
    /// None of these.
    Nothing,
}

/// Number of a pair's queue to receive by.
pub(super) fn receive_queue(pair: usize) -> usize {
    2 * pair
}

/// And to transmit by.
pub(super) fn transmit_queue(pair: usize) -> usize {
    2 * pair + 1
}

impl Net {
    /// How many pairs of queues there are for this driver: one that does not
    /// know of several finds the queue for commands where it is with one (virtio
    /// 1.2 §5.1.2).
    pub(super) fn pairs(&self) -> usize {
        let several = self
            .active
            .as_ref()
            .is_some_and(|queues| queues.has_feature(VIRTIO_NET_F_MQ));
        if several {
            self.taps.len()
        } else {
            1
        }
    }

    /// Number of the queue for commands.
    pub(super) fn control_queue(&self) -> usize {
        2 * self.pairs()
    }

    fn source(&self, token: u32) -> Source {
        let first = self.tap_token();
        let index = token as usize;
        if token < first {
            return match (index.cmp(&self.control_queue()), index % 2) {
                (std::cmp::Ordering::Equal, _) => Source::Control,
                (std::cmp::Ordering::Greater, _) => Source::Nothing,
                (_, 0) => Source::Receive(index / 2),
                _ => Source::Transmit(index / 2),
            };
        }
        let [receive, transmit] = self.timer_tokens();
        match token {
            _ if token < receive => Source::Tap((token - first) as usize),
            _ if token == receive => Source::ReceiveAgain,
            _ if token == transmit => Source::TransmitAgain,
            _ => Vhost::told(token - self.kernel_token()).map_or(Source::Nothing, Source::Kernel),
        }
    }
}

impl EventHandler for Net {
    fn handle(&mut self, token: u32, _events: EventSet) {
        let source = self.source(token);
        let of_a_queue = token < self.tap_token();
        // One that was on its way when the kernel got the queue is the kernel's.
        if of_a_queue && self.is_kernels(token as usize) {
            return;
        }
        let Some(queues) = &mut self.active else {
            return;
        };
        if of_a_queue {
            if !queues.notified(token as usize) {
                return;
            }
        } else if queues.is_broken() {
            // Neither packets nor timers have anybody wake up again.
            for tap in &self.taps {
                queues.event_loop.unregister(&tap.file);
            }
            for limit in [&mut self.receive_limit, &mut self.transmit_limit]
                .into_iter()
                .flatten()
            {
                limit.stop(&queues.event_loop);
            }
            return;
        }
        let outcome = match source {
            Source::Control => self.obey(),
            Source::Receive(pair) => self.work(pair, |both, queues| both.receive(queues, None)),
            Source::Transmit(pair) => self.work(pair, |both, queues| both.exchange(queues)),
            Source::Tap(tap) => {
                let pair = tap % self.in_use;
                self.work(pair, |both, queues| both.receive(queues, Some(tap)))
            }
            Source::ReceiveAgain => {
                self.receive_limit.as_mut().map(Throttle::fired);
                self.work_all(|both, queues| both.receive(queues, None))
            }
            Source::TransmitAgain => {
                self.transmit_limit.as_mut().map(Throttle::fired);
                self.work_all(|both, queues| both.exchange(queues))
            }
            Source::Kernel(told) => self.hear(told),
            Source::Nothing => Ok(()),
        };
        if let (Err(Broken), Some(queues)) = (outcome, &mut self.active) {
            queues.break_device();
            self.taps.iter_mut().for_each(|tap| tap.wanted = false);
        }
        self.stop_if_broken();
        self.watch();
    }
}

impl Net {
    /// Works one pair; nothing when the driver does not use it.
    fn work(
        &mut self,
        pair: usize,
        work: impl FnOnce(&mut Both<'_>, &mut Queues) -> Result<(), Broken>,
    ) -> Result<(), Broken> {
        let Some(queues) = self.active.as_mut().filter(|_| pair < self.in_use) else {
            return Ok(());
        };
        let mut both = Both {
            pair,
            in_use: self.in_use,
            ready: &mut self.ready[pair],
            taps: &mut self.taps,
            receive_limit: &mut self.receive_limit,
            transmit_limit: &mut self.transmit_limit,
        };
        work(&mut both, queues)
    }

    /// Works all that the driver uses, each time another first.
    fn work_all(
        &mut self,
        work: impl Fn(&mut Both<'_>, &mut Queues) -> Result<(), Broken>,
    ) -> Result<(), Broken> {
        self.turn = (self.turn + 1) % self.in_use;
        for number in 0..self.in_use {
            self.work((self.turn + number) % self.in_use, &work)?;
        }
        Ok(())
    }

    /// A level-triggered tap would spin while nothing can be received.
    fn watch(&mut self) {
        let Some(queues) = &self.active else {
            return;
        };
        let changed = self.taps.iter_mut();
        for tap in changed.filter(|tap| tap.wanted != tap.watched) {
            let events = if tap.wanted {
                EventSet::IN
            } else {
                EventSet::empty()
            };
            if queues.event_loop.modify(&tap.file, events).is_ok() {
                tap.watched = tap.wanted;
            }
        }
    }
}

/// Both directions of a pair, with the interface's limits. What comes by a
/// queue of the tap whose pair is not in use is received by one that is.
struct Both<'d> {
    pair: usize,
    in_use: usize,
    ready: &'d mut Ready,
    taps: &'d mut [Tap],
    receive_limit: &'d mut Option<Throttle>,
    transmit_limit: &'d mut Option<Throttle>,
}

impl Both<'_> {
    /// Sends what the guest has queued and receives what there is then, until
    /// nothing more comes of it.
    fn exchange(&mut self, queues: &mut Queues) -> Result<(), Broken> {
        let transmit = transmit_queue(self.pair);
        for _ in 0..TURNS {
            let sent = self.send(queues)?;
            self.receive(queues, None)?;
            if sent == 0 {
                break;
            }
            queues.signal(transmit);
        }
        // What waits for the timer is not to be told of.
        if !self.transmit_limit.as_ref().is_some_and(Throttle::waits) {
            queues.rest(transmit);
        }
        Ok(())
    }

    /// Sends what the guest has queued, as far as the limit lets it; how many
    /// packets.
    fn send(&mut self, queues: &mut Queues) -> Result<usize, Broken> {
        let memory = queues.memory.memory();
        let counters = Arc::clone(&queues.counters);
        let tap = &self.taps[self.pair].file;
        let index = transmit_queue(self.pair);
        let mut bytes = 0;
        let mut send = |queues: &mut Queues, limit| {
            let taken = queues.take(index, limit, |chain| {
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
            if limit.waits() || queues.is_empty(index) {
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

    /// Receives what the tap has for this pair; that queue of it is known to have
    /// something.
    fn receive(&mut self, queues: &mut Queues, known: Option<usize>) -> Result<(), Broken> {
        let queue = receive_queue(self.pair);
        let taps = self.taps.iter_mut().enumerate();
        for (number, tap) in taps.skip(self.pair).step_by(self.in_use) {
            let limit = self.receive_limit.as_mut();
            tap.wanted = match may_receive(limit, known == Some(number), queues)? {
                Ok(limit) => self.ready.receive(queues, queue, &tap.file, limit)?,
                Err(wanted) => wanted,
            };
        }
        Ok(())
    }
}

/// The limit, if it lets something be received; else whether the tap should be
/// watched.
#[allow(clippy::type_complexity)]
fn may_receive<'l>(
    limit: Option<&'l mut Throttle>,
    has_some: bool,
    queues: &Queues,
) -> Result<Result<Option<&'l mut Throttle>, bool>, Broken> {
    let Some(limit) = limit else {
        return Ok(Ok(None));
    };
    // What has to wait for a packet need not know of one.
    if limit.waits() {
        return Ok(Err(false));
    }
    let wait = limit.wait();
    if wait.is_zero() {
        return Ok(Ok(Some(limit)));
    }
    // Without one, the tap tells.
    if has_some {
        limit.set(wait, &queues.counters)?;
    }
    Ok(Err(!has_some))
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
