// SPDX-License-Identifier: Apache-2.0
//! Saving and restoring.

use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddressSpace};

use super::{
    device::{queue, Active},
    Vsock,
};
use crate::virtio::{
    chain::{pop, segments, Broken},
    device::{expect_empty, StateError},
};

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (virtio 1.2 §5.10.6.7).
const TRANSPORT_RESET: u32 = 0;

impl Vsock {
    pub(super) fn save_state(&mut self) -> Result<Vec<u8>, StateError> {
        Ok(Vec::new())
    }

    pub(super) fn restore_state(&mut self, state: &[u8]) -> Result<(), StateError> {
        expect_empty(state)
    }

    /// No connection survives, and the context id may be another: the guest is
    /// told, closes what it had and reads the id again.
    pub(super) fn announce_reset(&mut self) {
        let Some(active) = &mut self.active else {
            return;
        };
        match active.tell_reset() {
            Ok(true) => {}
            Ok(false) => {
                tracing::warn!("vsock: the guest has no room for the event of a reset");
            }
            Err(Broken) => active.queues.break_device(),
        }
    }
}

impl Active {
    /// Whether there was a buffer for it.
    fn tell_reset(&mut self) -> Result<bool, Broken> {
        let memory = self.queues.memory.memory();
        let Some(events) = self.queues.get(queue::EVENT) else {
            return Ok(false);
        };
        let Some(chain) = pop(events, &memory)? else {
            return Ok(false);
        };
        let head = chain.head_index();
        let (_, writable) = segments(chain);
        let length = size_of_val(&TRANSPORT_RESET) as u32;
        let buffer = writable.first().filter(|segment| segment.length >= length);
        let buffer = buffer.ok_or(Broken)?;
        memory
            .write_obj(TRANSPORT_RESET.to_le(), buffer.address)
            .map_err(|_| Broken)?;
        events
            .add_used(&*memory, head, length)
            .map_err(|_| Broken)?;
        self.queues.signal(queue::EVENT);
        Ok(true)
    }
}
