// SPDX-License-Identifier: Apache-2.0
//! The host's kernel moves the packets (vhost-net): this process has no part in
//! it but to interrupt the driver. It reads and writes guest memory that it is
//! told of, and no other; what it finds wrong in a ring is told, and the device
//! stops.

mod sys;

use std::{fs::File, io};

use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1, virtio_net::VIRTIO_NET_F_MRG_RXBUF,
    virtio_ring::VIRTIO_RING_F_EVENT_IDX,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{
    Address, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryMmap, GuestMemoryRegion,
};
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

use self::sys::{Device, Region, RingAddresses};
use crate::virtio::{
    chain::{Broken, Queues},
    device::DeviceError,
};

/// Features that are about the rings: whoever works them must know of them.
const OF_RINGS: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// Rings, by what the kernel and the guest both call them: to receive, to
/// transmit.
pub(super) const RINGS: usize = 2;
/// How many tokens of the loop it has.
const TOKENS: u32 = 2 * RINGS as u32 + 1;

/// What the kernel tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    /// The driver is to be interrupted for a ring.
    Call(usize),
    /// The driver broke a rule.
    Error,
    /// It may work again.
    Again,
}

/// An open /dev/vhost-net that is this process's.
#[derive(Debug)]
pub(super) struct Vhost {
    device: Device,
    /// From DRIVER_OK on, until nobody works the rings any more.
    work: Option<Work>,
}

#[derive(Debug)]
struct Work {
    rings: [Ring; RINGS],
    /// Has the rings worked once the loop goes on.
    again: EventFd,
    rests: bool,
}

#[derive(Debug)]
struct Ring {
    at: RingAddresses,
    call: EventFd,
    error: EventFd,
}

impl Vhost {
    /// Makes it this process's; what of the features can be offered.
    ///
    /// # Errors
    /// It is not one, or somebody's already.
    pub fn new(device: File, features: u64) -> io::Result<(Self, u64)> {
        let device = Device(device);
        let known = device.features()?;
        if known & (1 << VIRTIO_F_VERSION_1) == 0 {
            return Err(io::ErrorKind::Unsupported.into());
        }
        device.set_owner()?;
        let this = Self { device, work: None };
        Ok((this, features & (known | !OF_RINGS)))
    }

    /// Whether the kernel has the rings, working or at rest.
    pub fn has_rings(&self) -> bool {
        self.work.is_some()
    }

    /// What an event is about, whose token is so much above the first.
    pub fn told(token: u32) -> Option<Told> {
        match token {
            0 | 1 => Some(Told::Call(token as usize)),
            2 | 3 => Some(Told::Error),
            4 => Some(Told::Again),
            _ => None,
        }
    }

    /// Gives the kernel the rings, and has it work them for `tap`.
    ///
    /// # Errors
    /// It does not take them, or does not work: then nobody does.
    pub fn start(&mut self, queues: &mut Queues, tap: &File, token: u32) -> Result<(), StartError> {
        let work = self.prepare(queues).map_err(StartError::Refused)?;
        let watched =
            work.descriptors()
                .zip(token..token + TOKENS)
                .try_for_each(|(event, token)| {
                    let handler = queues.handler.clone();
                    queues
                        .event_loop
                        .register(event, EventSet::IN, handler, token)
                });
        self.work = Some(work);
        let started = watched.and_then(|()| {
            // From now on only the kernel hears of what the driver queues.
            (0..RINGS).for_each(|index| queues.leave(index));
            self.set_backend(Some(tap))
        });
        started.map_err(|source| {
            self.stop(queues);
            StartError::Failed(DeviceError::System {
                action: "have the kernel move packets",
                source,
            })
        })
    }

    fn prepare(&self, queues: &mut Queues) -> io::Result<Work> {
        let memory = queues.memory.memory();
        self.device.set_features(queues.features & OF_RINGS)?;
        self.device.set_memory(&regions(&memory))?;
        let mut ring = |index: usize| {
            let queue = queues.get(index).ok_or(io::ErrorKind::NotFound)?;
            let at = addresses(queue, &memory).ok_or(io::ErrorKind::InvalidInput)?;
            let (size, next) = (queue.size(), queue.next_avail());
            let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
            let ring = Ring {
                at,
                call: event()?,
                error: event()?,
            };
            let number = index as u32;
            self.device.set_ring_size(number, size)?;
            self.device.set_ring_base(number, next)?;
            self.device.set_ring_addresses(number, at)?;
            self.device.set_call(number, &ring.call)?;
            self.device.set_error(number, &ring.error)?;
            let kick = queues.kick(index).ok_or(io::ErrorKind::NotFound)?;
            self.device.set_kick(number, kick)?;
            io::Result::Ok(ring)
        };
        Ok(Work {
            rings: [ring(0)?, ring(1)?],
            again: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            rests: false,
        })
    }

    /// Has the kernel work the rings, or not any more once this returns.
    fn set_backend(&self, tap: Option<&File>) -> io::Result<()> {
        (0..RINGS as u32).try_for_each(|index| self.device.set_backend(index, tap))
    }

    /// The kernel has nothing to do with guest memory any more when this returns.
    fn halt(&self) {
        if let Err(error) = self.set_backend(None) {
            panic!("the kernel does not stop to move packets: {error}");
        }
    }

    /// Takes the rings back, as they are for who resets them.
    pub fn stop(&mut self, queues: &Queues) {
        let Some(work) = &self.work else { return };
        self.halt();
        for event in work.descriptors() {
            queues.event_loop.unregister(event);
        }
        self.work = None;
    }

    /// Has the kernel rest, and tells the queues how far it is. It goes on when
    /// the loop does.
    ///
    /// # Errors
    /// It does not say how far it is.
    pub fn rest(&mut self, queues: &mut Queues) -> io::Result<()> {
        if self.work.is_none() {
            return Ok(());
        }
        self.halt();
        let memory = queues.memory.memory();
        for index in 0..RINGS {
            let next = self.device.ring_base(index as u32)?;
            let queue = queues.get(index).ok_or(io::ErrorKind::NotFound)?;
            queue.set_next_avail(next);
            let used = queue.used_idx(&*memory, std::sync::atomic::Ordering::Acquire);
            // It lies in memory: so it was found when the kernel got the ring.
            queue.set_next_used(used.map_err(io::Error::other)?.0);
        }
        if let Some(work) = &mut self.work {
            work.rests = true;
            work.again.write(1)?;
        }
        Ok(())
    }

    /// The loop goes on.
    ///
    /// # Errors
    /// The kernel does not.
    pub fn go_on(&mut self, tap: &File) -> Result<(), Broken> {
        let Some(work) = self.work.as_mut().filter(|work| work.rests) else {
            return Ok(());
        };
        let _ = work.again.read();
        work.rests = false;
        self.set_backend(Some(tap)).map_err(|error| {
            limited!(error, %error, "the kernel does not move packets any more");
            Broken
        })
    }

    /// Takes note of what was told of a ring.
    pub fn called(&self, index: usize) -> bool {
        let ring = self.work.as_ref().map(|work| &work.rings[index]);
        ring.is_some_and(|ring| ring.call.read().is_ok())
    }

    /// Tells the kernel of guest memory, before what is not of it any more is gone.
    pub fn set_memory(&self, queues: &mut Queues) -> Result<(), MemoryProblem> {
        let Some(work) = &self.work else {
            return Ok(());
        };
        let memory = queues.memory.memory();
        for (index, ring) in work.rings.iter().enumerate() {
            let now = queues
                .get(index)
                .and_then(|queue| addresses(queue, &memory));
            if now != Some(ring.at) {
                return Err(MemoryProblem::RingGone);
            }
        }
        let set = self.device.set_memory(&regions(&memory));
        set.map_err(MemoryProblem::Refused)
    }
}

impl Drop for Vhost {
    /// Whoever passed the device may have it open still.
    fn drop(&mut self) {
        if self.work.is_some() {
            self.halt();
        }
    }
}

/// Why the kernel does not work the rings.
#[derive(Debug)]
pub(super) enum StartError {
    /// It has not begun: somebody else can.
    Refused(io::Error),
    /// It may have begun.
    Failed(DeviceError),
}

/// Why the kernel cannot go on.
#[derive(Debug)]
pub(super) enum MemoryProblem {
    /// The driver has let go of memory that a ring is in.
    RingGone,
    /// It has too many parts, say.
    Refused(io::Error),
}

impl Work {
    /// In the order of their tokens.
    fn descriptors(&self) -> impl Iterator<Item = &EventFd> {
        let calls = self.rings.iter().map(|ring| &ring.call);
        let errors = self.rings.iter().map(|ring| &ring.error);
        calls.chain(errors).chain([&self.again])
    }
}

/// Where a ring's parts are in this process; none: they are not in memory, each
/// in one piece.
fn addresses(queue: &Queue, memory: &GuestMemoryMmap) -> Option<RingAddresses> {
    let size = usize::from(queue.size());
    let find = |guest: u64, length: usize| {
        let slice = memory.get_slice(GuestAddress(guest), length).ok()?;
        Some(slice.ptr_guard().as_ptr() as u64)
    };
    // With the indices at which each side wants to be told (virtio 1.2 §2.7.6,
    // §2.7.8).
    Some(RingAddresses {
        descriptors: find(queue.desc_table(), 16 * size)?,
        used: find(queue.used_ring(), 6 + 8 * size)?,
        available: find(queue.avail_ring(), 6 + 2 * size)?,
    })
}

fn regions(memory: &GuestMemoryMmap) -> Vec<Region> {
    let regions = memory.iter().map(|region| Region {
        guest: region.start_addr().raw_value(),
        size: region.len(),
        host: region.as_ptr() as u64,
    });
    regions.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_token_has_its_meaning() {
        let all: Vec<_> = (0..TOKENS)
            .map(|token| Vhost::told(token).unwrap())
            .collect();
        assert_eq!(
            all,
            [
                Told::Call(0),
                Told::Call(1),
                Told::Error,
                Told::Error,
                Told::Again
            ]
        );
        assert_eq!(Vhost::told(TOKENS), None);
    }

    #[test]
    fn a_ring_is_found_where_it_is_and_only_in_one_piece() {
        let size = 0x10000;
        let memory = GuestMemoryMmap::from_ranges(&[
            (GuestAddress(0), size),
            (GuestAddress(size as u64), size),
        ])
        .unwrap();
        let host = |guest: u64| memory.get_host_address(GuestAddress(guest)).unwrap() as u64;
        let mut queue = Queue::new(16).unwrap();
        queue.set_desc_table_address(Some(0x1000), Some(0));
        queue.set_avail_ring_address(Some(0x2000), Some(0));
        queue.set_used_ring_address(Some(0x1_3000), Some(0));
        assert_eq!(
            addresses(&queue, &memory),
            Some(RingAddresses {
                descriptors: host(0x1000),
                used: host(0x1_3000),
                available: host(0x2000),
            })
        );
        // Neither over the end of a region nor of memory.
        for used in [size as u32 - 16, 2 * size as u32 - 16] {
            queue.set_used_ring_address(Some(used), Some(0));
            assert_eq!(addresses(&queue, &memory), None);
        }
        let parts = regions(&memory);
        assert_eq!(parts.len(), 2);
        assert_eq!((parts[1].guest, parts[1].size), (size as u64, size as u64));
        assert_eq!(parts[1].host, host(size as u64));
    }

    #[test]
    fn what_is_no_vhost_net_is_refused() {
        let null = File::open("/dev/null").unwrap();
        Vhost::new(null, OF_RINGS).unwrap_err();
    }
}
