// SPDX-License-Identifier: Apache-2.0
//! The driver's requests (virtio 1.2 §5.15.6).

use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::Mem;
use crate::{
    event::EventHandler,
    memory,
    virtio::chain::{segments, Broken, Chain},
};

/// Most requests per wake-up.
const ROUND: usize = 16;
/// Bytes of a request: type, padding, address, number of blocks, padding.
const REQUEST: usize = 24;
/// Bytes of an answer: type, padding, state.
const ANSWER: usize = 10;

/// Requests.
mod request {
    pub const PLUG: u16 = 0;
    pub const UNPLUG: u16 = 1;
    pub const UNPLUG_ALL: u16 = 2;
    pub const STATE: u16 = 3;
}

/// Answers.
mod answer {
    pub const ACK: u16 = 0;
    pub const NACK: u16 = 1;
    pub const ERROR: u16 = 3;
}

/// What a range is.
mod state {
    pub const PLUGGED: u16 = 0;
    pub const UNPLUGGED: u16 = 1;
    pub const MIXED: u16 = 2;
}

impl EventHandler for Mem {
    fn handle(&mut self, token: u32, _events: EventSet) {
        // While the queue is worked, it is not the device's.
        let Some(mut queues) = self.active.take() else {
            return;
        };
        if queues.notified(token as usize) {
            let guest = queues.memory.memory();
            queues.drain(0, ROUND, |chain| self.serve(&guest, chain));
            queues.interrupt.show_config(&self.config());
        }
        self.active = Some(queues);
    }
}

impl Mem {
    /// Serves one request; how many bytes were written.
    fn serve(&mut self, guest: &GuestMemoryMmap, chain: Chain<'_>) -> Result<u32, Broken> {
        let (readable, writable) = segments(chain);
        let mut request = [0; REQUEST];
        let mut filled = 0;
        for segment in readable {
            let length = (segment.length as usize).min(REQUEST - filled);
            guest
                .read_slice(&mut request[filled..filled + length], segment.address)
                .map_err(|_| Broken)?;
            filled += length;
        }
        let [first, ..] = writable[..] else {
            return Err(Broken);
        };
        if filled < REQUEST || (first.length as usize) < ANSWER {
            return Err(Broken);
        }
        let word = |at: usize| u16::from_le_bytes([request[at], request[at + 1]]);
        let mut address = [0; 8];
        address.copy_from_slice(&request[8..16]);
        let (kind, found) = self.answer(guest, word(0), u64::from_le_bytes(address), word(16));
        let mut answer = [0; ANSWER];
        answer[..2].copy_from_slice(&kind.to_le_bytes());
        answer[8..].copy_from_slice(&found.to_le_bytes());
        guest
            .write_slice(&answer, first.address)
            .map_err(|_| Broken)?;
        Ok(ANSWER as u32)
    }

    /// Does what is asked; the answer, and the state where that was asked for.
    fn answer(
        &mut self,
        guest: &GuestMemoryMmap,
        kind: u16,
        address: u64,
        count: u16,
    ) -> (u16, u16) {
        if kind == request::UNPLUG_ALL {
            let all = 0..self.blocks.count();
            self.give_back(guest, all);
            return (answer::ACK, 0);
        }
        let Some(range) = self.range(address, count) else {
            return (answer::ERROR, 0);
        };
        let plugged = self.blocks.plugged_in(range.clone());
        match kind {
            request::PLUG if plugged > 0 => (answer::ERROR, 0),
            request::PLUG => {
                let wanted = self.addresses(&range);
                if self.plugged() + (wanted.end - wanted.start) > self.requested {
                    return (answer::NACK, 0);
                }
                self.blocks.set(range, true);
                (answer::ACK, 0)
            }
            request::UNPLUG if plugged < range.len() => (answer::ERROR, 0),
            request::UNPLUG => {
                self.give_back(guest, range);
                (answer::ACK, 0)
            }
            request::STATE => {
                let found = match plugged {
                    0 => state::UNPLUGGED,
                    plugged if plugged == range.len() => state::PLUGGED,
                    _ => state::MIXED,
                };
                (answer::ACK, found)
            }
            _ => (answer::ERROR, 0),
        }
    }

    /// Unplugs blocks; what is in them is the host's.
    fn give_back(&mut self, guest: &GuestMemoryMmap, range: std::ops::Range<usize>) {
        if self.blocks.plugged_in(range.clone()) == 0 {
            return;
        }
        self.blocks.set(range.clone(), false);
        let addresses = self.addresses(&range);
        let bytes = memory::discard(guest, addresses);
        limited!(trace, bytes, "unplugged");
    }
}
