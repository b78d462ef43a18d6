// SPDX-License-Identifier: Apache-2.0
//! Requests, one after another.

use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::{device::Backend, Fs};
use crate::{
    event::EventHandler,
    virtio::chain::{Broken, Chain},
};

/// Most requests per wake-up of a queue.
const ROUND: usize = 64;

impl EventHandler for Fs {
    fn handle(&mut self, token: u32, _events: EventSet) {
        let Some(active) = &mut self.active else {
            return;
        };
        let index = token as usize;
        if active.queues.notified(index) {
            let memory = active.queues.memory.memory();
            let backend = &active.backend;
            active
                .queues
                .drain(index, ROUND, |chain| serve(&memory, backend, chain));
        }
    }
}

/// Serves one request; how many bytes were written to the guest.
fn serve(memory: &GuestMemoryMmap, backend: &Backend, chain: Chain<'_>) -> Result<u32, Broken> {
    let reader = Reader::from_descriptor_chain(memory, chain.clone()).map_err(|_| Broken)?;
    let writer = VirtioFsWriter::new(memory, chain).map_err(|_| Broken)?;
    match backend.handle_message(reader, Writer::VirtioFs(writer), None, None) {
        // A reply is shorter than what the queue's descriptors hold.
        Ok(length) => u32::try_from(length).map_err(|_| Broken),
        Err(error) => {
            // No header to answer, or no room for an answer.
            tracing::debug!(%error, "virtio-fs request not answered");
            Ok(0)
        }
    }
}
