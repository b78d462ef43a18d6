// SPDX-License-Identifier: Apache-2.0
//! Working a queue: what every device does alike, with the guest's indices
//! and addresses checked.

use std::sync::{
    atomic::{fence, Ordering},
    Arc,
};

use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

use super::counters::Counters;
use super::device::{Activation, ActiveQueue, DeviceError, GuestRam, Interrupt};
use crate::event::{HandlerRef, LoopHandle};

/// A chain with the memory it lies in.
pub type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap>;

/// The driver broke a rule; the device stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Broken;

/// The queues of an activated device, registered with its loop. Unregisters
/// on drop.
pub struct Queues {
    queues: Vec<ActiveQueue>,
    /// Guest memory.
    pub memory: GuestRam,
    /// To interrupt the driver.
    pub interrupt: Arc<dyn Interrupt>,
    /// Features agreed on.
    pub features: u64,
    /// The device's loop.
    pub event_loop: LoopHandle,
    /// The device, as the loop holds it.
    pub handler: HandlerRef,
    /// What the device has done.
    pub counters: Arc<Counters>,
    broken: bool,
}

impl Queues {
    /// Takes an activation's queues, all of the first `required` of which must
    /// be set up, and registers their notifications with tokens 0 and up.
    pub fn new(activation: Activation, required: usize) -> Result<Self, DeviceError> {
        for index in 0..required {
            if !activation.queues.iter().any(|queue| queue.index == index) {
                return Err(DeviceError::BadQueue(index));
            }
        }
        let this = Self {
            queues: activation.queues,
            memory: activation.memory,
            interrupt: activation.interrupt,
            features: activation.features,
            event_loop: activation.event_loop,
            handler: activation.handler,
            counters: activation.counters,
            broken: false,
        };
        for queue in &this.queues {
            this.watch(queue)?;
        }
        Ok(this)
    }

    fn watch(&self, queue: &ActiveQueue) -> Result<(), DeviceError> {
        let handler = self.handler.clone();
        self.event_loop
            .register(&queue.kick, EventSet::IN, handler, queue.index as u32)
            .map_err(|source| DeviceError::System {
                action: "watch a queue's notifications",
                source,
            })?;
        // What the driver queued before it was watched.
        let _ = queue.kick.write(1);
        Ok(())
    }

    /// Has somebody else hear of what the driver has in a queue.
    pub fn leave(&self, index: usize) {
        if let Some(kick) = self.kick(index) {
            self.event_loop.unregister(kick);
        }
    }

    /// Hears of it again.
    pub fn take_back(&self, index: usize) -> Result<(), DeviceError> {
        let queue = self.queues.iter().find(|queue| queue.index == index);
        queue.map_or(Ok(()), |queue| self.watch(queue))
    }

    /// Whether the feature of that bit number was agreed on.
    pub fn has_feature(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }

    /// Empties a queue's notification; whether the queue may be worked.
    pub fn notified(&mut self, index: usize) -> bool {
        if let Some(queue) = self.queues.iter().find(|queue| queue.index == index) {
            if queue.kick.read().is_ok() {
                self.counters.notification();
            }
        }
        !self.broken
    }

    /// The notification of a queue, to signal it to oneself.
    pub fn kick(&self, index: usize) -> Option<&EventFd> {
        self.queues
            .iter()
            .find(|queue| queue.index == index)
            .map(|queue| &queue.kick)
    }

    /// How far each queue has been worked: its index, and the next positions in
    /// the available and in the used ring.
    pub fn positions(&self) -> impl Iterator<Item = (usize, u16, u16)> + '_ {
        self.queues.iter().map(|queue| {
            (
                queue.index,
                queue.queue.next_avail(),
                queue.queue.next_used(),
            )
        })
    }

    /// A queue by its index.
    pub fn get(&mut self, index: usize) -> Option<&mut Queue> {
        self.queues
            .iter_mut()
            .find(|queue| queue.index == index)
            .map(|queue| &mut queue.queue)
    }

    /// Whether the driver has nothing in a queue that has not been taken. Not
    /// when its memory cannot be read, which who takes something will find.
    pub fn is_empty(&self, index: usize) -> bool {
        let memory = self.memory.memory();
        let queue = self.queues.iter().find(|queue| queue.index == index);
        queue.is_some_and(|queue| {
            let last = queue.queue.avail_idx(&*memory, Ordering::Acquire);
            last.is_ok_and(|last| last.0 == queue.queue.next_avail())
        })
    }

    /// Stops the device for good: the driver broke a rule.
    pub fn break_device(&mut self) {
        if !self.broken {
            self.broken = true;
            self.interrupt.device_broken();
        }
    }

    /// Whether the driver broke a rule.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Works everything the driver has queued: `work` gets each chain and says
    /// how many bytes it wrote. At most `limit` chains, so that one device
    /// does not keep a shared loop; the rest comes with the next round.
    pub fn drain(
        &mut self,
        index: usize,
        limit: usize,
        mut work: impl FnMut(Chain<'_>) -> Result<u32, Broken>,
    ) {
        self.drain_while(index, limit, &mut (), |()| true, |(), chain| work(chain));
    }

    /// As [`Self::drain`], as long as `more` says so, which is asked before each
    /// chain. What is left then comes when this is called again; both get
    /// `state`.
    pub fn drain_while<S>(
        &mut self,
        index: usize,
        limit: usize,
        state: &mut S,
        more: impl FnMut(&mut S) -> bool,
        mut work: impl FnMut(&mut S, Chain<'_>) -> Result<u32, Broken>,
    ) {
        self.drain_later(index, limit, state, more, |state, chain| {
            work(state, chain).map(Some)
        });
    }

    /// As [`Self::drain_while`], of chains some of which are given back later
    /// ([`Self::complete`]): those of which `work` says nothing yet.
    pub fn drain_later<S>(
        &mut self,
        index: usize,
        limit: usize,
        state: &mut S,
        mut more: impl FnMut(&mut S) -> bool,
        mut work: impl FnMut(&mut S, Chain<'_>) -> Result<Option<u32>, Broken>,
    ) {
        let memory = self.memory.memory();
        let Some(queue) = self.queues.iter_mut().find(|queue| queue.index == index) else {
            return;
        };
        let mut used = false;
        let mut left = limit;
        let outcome = loop {
            if left == 0 {
                let _ = queue.kick.write(1);
                break Ok(());
            }
            left -= 1;
            if !more(state) {
                break Ok(());
            }
            match pop(&mut queue.queue, &memory) {
                Err(broken) => break Err(broken),
                Ok(Some(chain)) => {
                    let head = chain.head_index();
                    self.counters.requests(1);
                    let result = work(state, chain).and_then(|length| {
                        let Some(length) = length else {
                            return Ok(false);
                        };
                        let added = queue.queue.add_used(&*memory, head, length);
                        added.map(|()| true).map_err(|_| Broken)
                    });
                    match result {
                        Ok(given_back) => used |= given_back,
                        Err(broken) => break Err(broken),
                    }
                }
                Ok(None) => match queue.queue.enable_notification(&*memory) {
                    // Something came in between.
                    Ok(true) => {}
                    Ok(false) => break Ok(()),
                    Err(_) => break Err(Broken),
                },
            }
        };
        if used {
            signal(&mut queue.queue, index, &memory, self.interrupt.as_ref());
        }
        if outcome.is_err() {
            self.break_device();
        }
    }

    /// Works what the driver has queued, at most `limit` chains, as
    /// [`Self::drain`] does; how many. The driver is neither told of it
    /// ([`Self::signal`]) nor asked to notify of more ([`Self::rest`]).
    pub fn take(
        &mut self,
        index: usize,
        limit: usize,
        mut work: impl FnMut(Chain<'_>) -> Result<u32, Broken>,
    ) -> usize {
        let memory = self.memory.memory();
        let mut taken = 0;
        let mut next = || {
            let queue = self.get(index).ok_or(Broken)?;
            let Some(chain) = pop(queue, &memory)? else {
                return Ok(false);
            };
            let head = chain.head_index();
            let length = work(chain)?;
            queue.add_used(&*memory, head, length).map_err(|_| Broken)?;
            self.counters.requests(1);
            Ok(true)
        };
        while taken < limit {
            match next() {
                Ok(true) => taken += 1,
                Ok(false) => break,
                Err(Broken) => {
                    self.break_device();
                    break;
                }
            }
        }
        taken
    }

    /// Asks the driver to notify of what it queues from now on. What there is by
    /// then comes with the next round.
    pub fn rest(&mut self, index: usize) {
        let memory = self.memory.memory();
        let queued = self
            .get(index)
            .map(|queue| queue.enable_notification(&*memory));
        match (queued, self.kick(index)) {
            // Cannot fail: the counter is far from its limit.
            (Some(Ok(true)), Some(kick)) => drop(kick.write(1)),
            (Some(Err(_)), _) => self.break_device(),
            _ => {}
        }
    }

    /// Gives a chain back that [`Self::drain_later`] took. The driver is not told
    /// ([`Self::signal`]).
    pub fn complete(&mut self, index: usize, head: u16, length: u32) -> Result<(), Broken> {
        let memory = self.memory.memory();
        let queue = self.get(index).ok_or(Broken)?;
        queue.add_used(&*memory, head, length).map_err(|_| Broken)
    }

    /// Interrupts the driver for a queue, if it wants to be.
    pub fn signal(&mut self, index: usize) {
        let memory = self.memory.memory();
        let interrupt = Arc::clone(&self.interrupt);
        if let Some(queue) = self.get(index) {
            signal(queue, index, &memory, interrupt.as_ref());
        }
    }
}

impl Drop for Queues {
    fn drop(&mut self) {
        for queue in &self.queues {
            self.event_loop.unregister(&queue.kick);
        }
    }
}

/// The next chain; an error when the driver's index runs ahead of the queue.
pub fn pop<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemoryMmap,
) -> Result<Option<Chain<'m>>, Broken> {
    let ahead = queue
        .avail_idx(memory, Ordering::Acquire)
        .map_err(|_| Broken)?
        .0
        .wrapping_sub(queue.next_avail());
    if ahead > queue.size() {
        return Err(Broken);
    }
    Ok(queue.pop_descriptor_chain(memory))
}

fn signal(queue: &mut Queue, index: usize, memory: &GuestMemoryMmap, interrupt: &dyn Interrupt) {
    // Cannot be told: better once too often.
    if queue.needs_notification(memory).unwrap_or(true) {
        interrupt.signal_queue(index);
    }
}

/// Gives several buffers back at once: the driver sees all of them or none,
/// as it must when they hold one packet (virtio 1.2 §5.1.6.4). Interrupting it
/// is then for [`wants_interrupt`] to decide.
pub fn add_used_together(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    buffers: &[(u16, u32)],
) -> Result<(), Broken> {
    let Some((last, others)) = buffers.split_last() else {
        return Ok(());
    };
    let next = queue.next_used();
    for (index, (head, length)) in others.iter().enumerate() {
        if *head >= queue.size() {
            return Err(Broken);
        }
        let slot = next.wrapping_add(index as u16) % queue.size();
        let at = u64::from(slot)
            .checked_mul(USED_ELEMENT)
            .and_then(|offset| offset.checked_add(USED_HEADER))
            .and_then(|offset| queue.used_ring().checked_add(offset))
            .ok_or(Broken)?;
        let element = (u64::from(*length) << 32) | u64::from(*head);
        memory
            .write_obj(element.to_le(), GuestAddress(at))
            .map_err(|_| Broken)?;
    }
    queue.set_next_used(next.wrapping_add(others.len() as u16));
    // Writes the last element and publishes the index of all.
    queue.add_used(memory, last.0, last.1).map_err(|_| Broken)
}

/// Whether the driver wants an interrupt for what was used since the used
/// index was `before` (virtio 1.2 §2.7.7.2).
pub fn wants_interrupt(queue: &Queue, memory: &GuestMemoryMmap, before: u16) -> bool {
    fence(Ordering::SeqCst);
    let now = queue.next_used();
    let read = |offset: u64| {
        let at = queue.avail_ring().checked_add(offset)?;
        memory
            .read_obj::<u16>(GuestAddress(at))
            .ok()
            .map(u16::from_le)
    };
    if queue.event_idx_enabled() {
        let event = read(AVAIL_HEADER + u64::from(queue.size()) * 2);
        event.is_none_or(|event| now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before))
    } else {
        read(0).is_none_or(|flags| flags & NO_INTERRUPT == 0)
    }
}

/// Sizes of the rings' parts (virtio 1.2 §2.7.6, §2.7.8).
const USED_HEADER: u64 = 4;
const USED_ELEMENT: u64 = 8;
const AVAIL_HEADER: u64 = 4;
/// VIRTQ_AVAIL_F_NO_INTERRUPT.
const NO_INTERRUPT: u16 = 1;

/// One piece of a chain in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where.
    pub address: GuestAddress,
    /// How long.
    pub length: u32,
}

/// A chain's readable and writable pieces. The sum of their lengths is
/// bounded by the number of descriptors times 4 GiB; whether they lie in
/// memory is checked when they are used.
pub fn segments(chain: Chain<'_>) -> (Vec<Segment>, Vec<Segment>) {
    let mut readable = Vec::new();
    let mut writable = Vec::new();
    for descriptor in chain {
        let segment = Segment {
            address: descriptor.addr(),
            length: descriptor.len(),
        };
        if descriptor.is_write_only() {
            writable.push(segment);
        } else {
            readable.push(segment);
        }
    }
    (readable, writable)
}
