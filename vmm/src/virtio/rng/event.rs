// SPDX-License-Identifier: Apache-2.0
//! Filling the driver's buffers.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::Rng;
use crate::{
    event::EventHandler,
    random,
    virtio::chain::{segments, Broken, Chain},
};

/// Most bytes per request: entropy costs the host time.
const MAX_BYTES: u32 = 64 * 1024;
/// Most requests per wake-up.
const ROUND: usize = 16;

impl EventHandler for Rng {
    fn handle(&mut self, token: u32, _events: EventSet) {
        let Some(queues) = &mut self.active else {
            return;
        };
        if queues.notified(token as usize) {
            let memory = queues.memory.memory();
            let counters = Arc::clone(&queues.counters);
            queues.drain(0, ROUND, |chain| {
                let filled = fill(&memory, chain)?;
                counters.to_guest(filled.into());
                Ok(filled)
            });
        }
    }
}

fn fill(memory: &GuestMemoryMmap, chain: Chain<'_>) -> Result<u32, Broken> {
    let (_, writable) = segments(chain);
    let mut written = 0;
    for segment in writable {
        let length = segment.length.min(MAX_BYTES - written);
        let mut bytes = vec![0_u8; length as usize];
        // Without them the device is of no use.
        random::fill(&mut bytes).map_err(|_| Broken)?;
        memory
            .write_slice(&bytes, segment.address)
            .map_err(|_| Broken)?;
        written += length;
    }
    Ok(written)
}
