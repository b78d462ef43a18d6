// SPDX-License-Identifier: Apache-2.0
//! Flush requests.

use std::{fs::File, sync::Arc};

use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::Pmem;
use crate::{
    event::EventHandler,
    virtio::{
        chain::{segments, Broken, Chain},
        counters::Counters,
    },
};

/// VIRTIO_PMEM_REQ_TYPE_FLUSH.
const FLUSH: u32 = 0;
/// VIRTIO_PMEM_RESP_TYPE_OK and _EIO.
const OK: u32 = 0;
const IO_ERROR: u32 = 1;
/// Most requests per wake-up: each may wait for the disk.
const ROUND: usize = 4;

impl EventHandler for Pmem {
    fn handle(&mut self, token: u32, _events: EventSet) {
        let Some(queues) = &mut self.active else {
            return;
        };
        if queues.notified(token as usize) {
            let memory = queues.memory.memory();
            let file = self.flush.as_ref();
            let counters = Arc::clone(&queues.counters);
            queues.drain(0, ROUND, |chain| flush(&memory, file, &counters, chain));
        }
    }
}

fn flush(
    memory: &GuestMemoryMmap,
    file: Option<&File>,
    counters: &Counters,
    chain: Chain<'_>,
) -> Result<u32, Broken> {
    let (readable, writable) = segments(chain);
    let (Some(request), Some(response)) = (readable.first(), writable.first()) else {
        return Err(Broken);
    };
    if request.length < 4 || response.length < 4 {
        return Err(Broken);
    }
    let kind: u32 = memory.read_obj(request.address).map_err(|_| Broken)?;
    let done = match (u32::from_le(kind), file) {
        (FLUSH, Some(file)) => file.sync_data().is_ok(),
        // Nothing can have been written.
        (FLUSH, None) => true,
        _ => false,
    };
    if !done {
        counters.error();
    }
    let answer = if done { OK } else { IO_ERROR };
    memory
        .write_obj(answer.to_le(), response.address)
        .map_err(|_| Broken)?;
    Ok(4)
}
