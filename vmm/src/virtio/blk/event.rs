// SPDX-License-Identifier: Apache-2.0
//! Requests: one after another, or as many at once as the ring takes.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::{
    device::Active,
    disk::Disk,
    request::{Done, Request},
    ring::{Flight, Ring},
    Blk,
};
use crate::{
    event::EventHandler,
    virtio::{
        chain::{Broken, Chain, Queues},
        counters::Counters,
        rate::Limiter,
    },
};

/// Most requests per wake-up.
const ROUND: usize = 32;

impl EventHandler for Blk {
    fn handle(&mut self, token: u32, _events: EventSet) {
        let timer = self.timer_token();
        let ring_token = self.ring_token();
        let all = 0..timer as usize;
        let Some(active) = &mut self.active else {
            return;
        };
        let queues = if token == ring_token {
            if let Some(ring) = &mut self.ring {
                land(&mut active.queues, ring.reap());
            }
            // There is room for what had to wait.
            all
        } else if token == timer {
            if let Some(timer) = &mut active.timer {
                // It is not ready any more. What it is ready for follows.
                let _ = timer.clear();
            }
            all
        } else {
            let index = token as usize;
            if !active.queues.notified(index) {
                return;
            }
            index..index + 1
        };
        if active.queues.is_broken() {
            return;
        }
        let mut work = Work {
            memory: active.queues.memory.memory().into_inner(),
            disk: &self.disk,
            counters: Arc::clone(&active.queues.counters),
            limiter: &mut self.limiter,
            ring: &mut self.ring,
            longest: Duration::ZERO,
        };
        for index in queues {
            active
                .queues
                .drain_later(index, ROUND, &mut work, Work::may_go_on, |work, chain| {
                    work.serve(index, chain)
                });
        }
        let longest = work.longest;
        set_off(active, &mut self.ring);
        if let (false, Some(timer)) = (longest.is_zero(), &mut active.timer) {
            if let Err(error) = timer.reset(longest, None) {
                limited!(error, %error, "a disk's timer cannot be set");
                active.queues.break_device();
            }
        }
    }
}

/// Tells the kernel of what the ring has taken.
fn set_off(active: &mut Active, ring: &mut Option<Ring>) {
    let Some(ring) = ring else { return };
    if !ring.has_unsubmitted() {
        return;
    }
    let Err(error) = ring.submit() else { return };
    match error.raw_os_error() {
        // Too much at once: again, after what else there is to do.
        Some(libc::EAGAIN | libc::EBUSY) => {
            if let Some(kick) = active.queues.kick(0) {
                let _ = kick.write(1);
            }
        }
        _ => {
            limited!(error, %error, "a disk's requests cannot be submitted");
            active.queues.break_device();
        }
    }
}

/// Gives the guest's requests back that the kernel has done.
pub(super) fn land(queues: &mut Queues, landed: Vec<(Flight, Done)>) {
    if queues.is_broken() {
        return;
    }
    let mut signalled = Vec::new();
    for (flight, done) in landed {
        count(&queues.counters, &done);
        let Flight {
            queue,
            request,
            memory,
            ..
        } = &flight;
        let used = request.answer(memory, &done);
        let used = used.and_then(|length| queues.complete(*queue, request.head, length));
        if used.is_err() {
            queues.break_device();
            return;
        }
        if !signalled.contains(queue) {
            signalled.push(*queue);
        }
    }
    signalled.into_iter().for_each(|queue| queues.signal(queue));
}

fn count(counters: &Counters, done: &Done) {
    counters.from_guest(done.stored);
    counters.to_guest(done.read);
    if done.failed() {
        counters.error();
    }
}

/// What working queues needs.
struct Work<'d> {
    memory: Arc<GuestMemoryMmap>,
    disk: &'d Disk,
    counters: Arc<Counters>,
    limiter: &'d mut Option<Limiter>,
    ring: &'d mut Option<Ring>,
    /// How long what must wait does.
    longest: Duration,
}

impl Work<'_> {
    /// Whether limits and the ring let one more request through.
    fn may_go_on(&mut self) -> bool {
        if self.ring.as_ref().is_some_and(|ring| !ring.has_room()) {
            return false;
        }
        let wait = match self.limiter {
            Some(limiter) => limiter.wait(Instant::now()),
            None => Duration::ZERO,
        };
        self.longest = self.longest.max(wait);
        if !wait.is_zero() {
            self.counters.throttled();
        }
        wait.is_zero()
    }

    /// Serves a request, or sets it off; how many bytes were written to the
    /// guest, when that is known.
    fn serve(&mut self, queue: usize, chain: Chain<'_>) -> Result<Option<u32>, Broken> {
        let request = Request::parse(&self.memory, chain)?;
        let request = match self.ring.as_mut() {
            Some(_) => match self.prepare(queue, request)? {
                Ok(flight) => {
                    self.limit(flight.length());
                    let Some(ring) = self.ring.as_mut() else {
                        return Err(Broken);
                    };
                    match ring.take(flight) {
                        Ok(()) => return Ok(None),
                        Err(flight) => flight.request,
                    }
                }
                Err(request) => request,
            },
            None => request,
        };
        let done = request.serve(&self.memory, self.disk)?;
        count(&self.counters, &done);
        self.limit(done.read + done.stored);
        request.answer(&self.memory, &done).map(Some)
    }

    /// The request's flight; itself, where it is for this thread.
    fn prepare(&self, queue: usize, request: Request) -> Result<Result<Flight, Request>, Broken> {
        let memory = Arc::clone(&self.memory);
        if request.is_flush() {
            return Ok(Ok(Flight::flush(queue, request, memory)));
        }
        Flight::transfer(queue, request, memory, self.disk)
    }

    fn limit(&mut self, bytes: u64) {
        if let Some(limiter) = self.limiter {
            limiter.take(bytes);
        }
    }
}
