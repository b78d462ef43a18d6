// SPDX-License-Identifier: Apache-2.0
//! Working the queues.

use bulkhead_vmm_api::BalloonStatistics;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::{
    device::{feature, queue, PAGE},
    statistics, Balloon,
};
use crate::{
    event::EventHandler,
    memory,
    virtio::chain::{pop, segments, Broken, Chain, Queues},
};

/// Most buffers per wake-up.
const ROUND: usize = 16;
/// Most page numbers in a buffer; the driver sends 256.
const PAGE_NUMBERS: usize = 4096;

impl EventHandler for Balloon {
    fn handle(&mut self, token: u32, _events: EventSet) {
        let index = token as usize;
        let poisoned = self.poison != 0;
        let returned = &mut self.returned;
        let Some(queues) = &mut self.active else {
            return;
        };
        if !queues.notified(index) {
            return;
        }
        let guest = queues.memory.memory();
        let has_statistics = queues.has_feature(feature::STATS_VQ as u32);
        match index {
            queue::INFLATE => queues.drain(index, ROUND, |chain| {
                *returned += inflate(&guest, chain)?;
                Ok(0)
            }),
            // What it takes back it takes by touching it.
            queue::DEFLATE => queues.drain(index, ROUND, |_| Ok(0)),
            queue::STATS if has_statistics => {
                let outcome = take(queues, &guest, &mut self.held, &mut self.statistics);
                if outcome.is_err() {
                    queues.break_device();
                }
            }
            // Pages that must keep their poison stay.
            _ => queues.drain(index, ROUND, |chain| {
                if !poisoned {
                    *returned += report(&guest, chain);
                }
                Ok(0)
            }),
        }
    }
}

/// Reads statistics, and keeps their buffer until new ones are wanted.
fn take(
    queues: &mut Queues,
    guest: &GuestMemoryMmap,
    held: &mut Option<u16>,
    statistics: &mut Option<BalloonStatistics>,
) -> Result<(), Broken> {
    let Some(queue) = queues.get(queue::STATS) else {
        return Ok(());
    };
    let mut given_back = false;
    // A driver has one; more than fit in the queue cannot be.
    for _ in 0..queue.size() {
        let Some(chain) = pop(queue, guest)? else {
            if queue.enable_notification(guest).map_err(|_| Broken)? {
                continue;
            }
            break;
        };
        let head = chain.head_index();
        *statistics = Some(statistics::read(guest, chain)?);
        if let Some(before) = held.replace(head) {
            queue.add_used(guest, before, 0).map_err(|_| Broken)?;
            given_back = true;
        }
    }
    if given_back {
        queues.signal(queue::STATS);
    }
    Ok(())
}

/// Gives the pages back whose numbers are in the buffer; how many bytes.
fn inflate(guest: &GuestMemoryMmap, chain: Chain<'_>) -> Result<u64, Broken> {
    let (readable, _) = segments(chain);
    let mut returned = 0;
    let mut count = 0;
    let mut run = 0..0_u64;
    for segment in readable {
        let numbers = segment.length as usize / 4;
        count += numbers;
        if count > PAGE_NUMBERS {
            return Err(Broken);
        }
        let mut bytes = vec![0_u8; numbers * 4];
        guest
            .read_slice(&mut bytes, segment.address)
            .map_err(|_| Broken)?;
        for number in bytes.chunks_exact(4) {
            let number = u32::from_le_bytes([number[0], number[1], number[2], number[3]]);
            let start = u64::from(number) * PAGE;
            // Neighbours together, in either direction.
            if start == run.end {
                run.end += PAGE;
            } else if start + PAGE == run.start {
                run.start = start;
            } else {
                returned += memory::discard(guest, run);
                run = start..start + PAGE;
            }
        }
    }
    returned += memory::discard(guest, run);
    Ok(returned)
}

/// Gives the ranges back that the guest reports free; how many bytes.
fn report(guest: &GuestMemoryMmap, chain: Chain<'_>) -> u64 {
    let (_, writable) = segments(chain);
    let ranges = writable.into_iter().map(|segment| {
        let GuestAddress(start) = segment.address;
        memory::discard(
            guest,
            start..start.saturating_add(u64::from(segment.length)),
        )
    });
    ranges.sum()
}
