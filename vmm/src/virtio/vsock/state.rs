// SPDX-License-Identifier: Apache-2.0
//! Saving and restoring.

use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddressSpace};

use super::{
    device::{queue, Active},
    muxer::MAX_CONNECTIONS,
    stream::Key,
    Vsock,
};
use crate::virtio::{
    chain::{pop, segments, Broken},
    device::StateError,
};

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (virtio 1.2 §5.10.6.7).
const TRANSPORT_RESET: u32 = 0;

impl Vsock {
    /// Which connections there are.
    pub(super) fn save_state(&mut self) -> Result<Vec<u8>, StateError> {
        let keys: Vec<(u32, u32)> = self.active.as_ref().map_or_else(Vec::new, |active| {
            let keys = active.muxer.keys();
            keys.map(|key| (key.host, key.guest)).collect()
        });
        postcard::to_stdvec(&keys).map_err(|error| StateError::Unfit(error.to_string()))
    }

    pub(super) fn restore_state(&mut self, state: &[u8]) -> Result<(), StateError> {
        let keys: Vec<(u32, u32)> = match postcard::take_from_bytes(state) {
            Ok((keys, [])) => keys,
            _ => return Err(StateError::Unfit("no list of connections".into())),
        };
        if keys.len() > MAX_CONNECTIONS {
            return Err(StateError::Unfit(format!(
                "{} connections, of which there are {MAX_CONNECTIONS} at most",
                keys.len()
            )));
        }
        let keys = keys.into_iter().map(|(host, guest)| Key { host, guest });
        self.lost = keys.collect();
        Ok(())
    }

    /// No connection survives, and the context id may be another: the guest is
    /// told, closes what it had and reads the id again. What it only begins to
    /// know of, by packets that wait in its queue, is reset after those.
    pub(super) fn announce_reset(&mut self) {
        let lost = std::mem::take(&mut self.lost);
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
        active.muxer.reset_lost(&lost);
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
