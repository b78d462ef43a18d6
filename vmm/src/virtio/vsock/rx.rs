// SPDX-License-Identifier: Apache-2.0
//! The driver's receive buffers.

use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;

use super::packet::{self, Header, Span};
use crate::virtio::{
    chain::{pop, Broken},
    counters::Counters,
};

/// A buffer for one packet.
pub struct Buffer<'m> {
    head: u16,
    header: Span<'m>,
    /// Where data goes.
    pub data: Span<'m>,
}

/// The receive queue, while it is worked.
pub struct Receive<'m> {
    queue: &'m mut Queue,
    memory: &'m GuestMemoryMmap,
    used: bool,
    /// Of the device.
    counters: Arc<Counters>,
}

impl<'m> Receive<'m> {
    /// Works `queue`.
    pub fn new(queue: &'m mut Queue, memory: &'m GuestMemoryMmap, counters: Arc<Counters>) -> Self {
        Self {
            queue,
            memory,
            used: false,
            counters,
        }
    }

    /// The next buffer.
    pub fn take(&mut self) -> Result<Option<Buffer<'m>>, Broken> {
        let Some(chain) = pop(self.queue, self.memory)? else {
            return Ok(None);
        };
        let head = chain.head_index();
        let (header, data) = packet::from_rx(self.memory, chain)?;
        Ok(Some(Buffer { head, header, data }))
    }

    /// Leaves the last `count` buffers taken for the next time.
    pub fn give_back(&mut self, count: usize) {
        let next = self.queue.next_avail().wrapping_sub(count as u16);
        self.queue.set_next_avail(next);
    }

    /// Hands a buffer with a packet in it to the driver.
    pub fn put(&mut self, buffer: &Buffer<'m>, header: &Header) -> Result<(), Broken> {
        buffer.header.write(&header.encode());
        let length = packet::HEADER_LEN as u32 + header.len;
        self.queue
            .add_used(self.memory, buffer.head, length)
            .map_err(|_| Broken)?;
        self.used = true;
        self.counters.requests(1);
        self.counters.to_guest(header.len.into());
        Ok(())
    }

    /// Asks the driver to notify of new buffers; whether some have come
    /// meanwhile.
    pub fn wait_for_more(&mut self) -> Result<bool, Broken> {
        self.queue
            .enable_notification(self.memory)
            .map_err(|_| Broken)
    }

    /// Whether any buffer was handed to the driver.
    pub fn has_used(&self) -> bool {
        self.used
    }
}
