// SPDX-License-Identifier: Apache-2.0
//! Requests, one after another.

use std::sync::Arc;

use fuse_backend_rs::{
    abi::fuse_abi::{InHeader, OutHeader},
    transport::{FsCacheReqHandler, Reader, VirtioFsWriter, Writer},
};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::{
    device::{Active, Backend, TIMER},
    locks::Outcome,
    Fs, Window,
};
use crate::{
    event::EventHandler,
    virtio::{
        chain::{Broken, Chain},
        counters::Counters,
    },
};

/// Most requests per wake-up of a queue.
const ROUND: usize = 64;

impl EventHandler for Fs {
    fn handle(&mut self, token: u32, _events: EventSet) {
        let index = token as usize;
        let Some(active) = &mut self.active else {
            return;
        };
        if token == TIMER {
            if let Some(locks) = &mut active.locks {
                locks.look_again();
            }
            settle(active);
            return;
        }
        // The first notification is the VMM's own.
        if active.backend.is_none() && active.queues.is_empty(index) {
            active.queues.notified(index);
            return;
        }
        let prepared = self.prepare();
        let Some(active) = &mut self.active else {
            return;
        };
        if let Err(error) = &prepared {
            limited!(error, %error, "shared directory cannot be opened again");
            active.queues.break_device();
        }
        if active.queues.notified(index) {
            let memory = active.queues.memory.memory();
            let Some(backend) = &active.backend else {
                return;
            };
            let window = &mut self.window;
            let counters = Arc::clone(&active.queues.counters);
            let locks = &mut active.locks;
            let work = |(): &mut (), chain: Chain<'_>| {
                let outcome = match locks {
                    None => Outcome::Other,
                    Some(locks) => locks.take(&backend.files, &memory, index, chain.clone())?,
                };
                let length = match outcome {
                    Outcome::Answered(length) => length,
                    Outcome::Waits => return Ok(None),
                    Outcome::Other => serve(&memory, backend, window.as_mut(), &counters, chain)?,
                };
                counters.to_guest(length.into());
                Ok(Some(length))
            };
            active
                .queues
                .drain_later(index, ROUND, &mut (), |()| true, work);
            settle(active);
        }
    }
}

/// Answers requests for locks that need not wait any more.
fn settle(active: &mut Active) {
    let (Some(locks), Some(backend)) = (&mut active.locks, &active.backend) else {
        return;
    };
    if active.queues.is_broken() {
        return;
    }
    if locks.settle(&backend.files, &mut active.queues).is_err() {
        active.queues.break_device();
    }
}

/// Serves one request; how many bytes were written to the guest.
fn serve(
    memory: &GuestMemoryMmap,
    backend: &Backend,
    window: Option<&mut Window>,
    counters: &Counters,
    chain: Chain<'_>,
) -> Result<u32, Broken> {
    let reader = Reader::from_descriptor_chain(memory, chain.clone()).map_err(|_| Broken)?;
    let writer = VirtioFsWriter::new(memory, chain.clone()).map_err(|_| Broken)?;
    counters.from_guest(reader.available_bytes() as u64);
    let window = window.map(|window| window as &mut dyn FsCacheReqHandler);
    match backend
        .server
        .handle_message(reader, Writer::VirtioFs(writer), window, None)
    {
        // A reply is shorter than what the queue's descriptors hold.
        Ok(length) => u32::try_from(length).map_err(|_| Broken),
        Err(error) => {
            counters.error();
            limited!(debug, %error, "virtio-fs request not understood");
            refuse(memory, chain)
        }
    }
}

/// Answers with an error, if there is a header to answer, and room.
fn refuse(memory: &GuestMemoryMmap, chain: Chain<'_>) -> Result<u32, Broken> {
    let mut reader = Reader::from_descriptor_chain(memory, chain.clone()).map_err(|_| Broken)?;
    let mut writer = VirtioFsWriter::new(memory, chain).map_err(|_| Broken)?;
    let Ok(request) = reader.read_obj::<InHeader>() else {
        return Ok(0);
    };
    let answer = OutHeader {
        len: size_of::<OutHeader>() as u32,
        error: -libc::EIO,
        unique: request.unique,
    };
    match writer.write_obj(answer) {
        Ok(()) => Ok(answer.len),
        Err(_) => Ok(0),
    }
}
