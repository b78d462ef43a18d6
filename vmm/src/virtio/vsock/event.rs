// SPDX-License-Identifier: Apache-2.0
//! Working the queues.

use std::sync::Arc;

use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::{
    device::{queue, Active},
    muxer::{token, Round},
    packet::{self, Sent},
    rx::Receive,
    Vsock,
};
use crate::{
    event::EventHandler,
    virtio::chain::{pop, Broken},
};

/// Most packets of the guest's per wake-up.
const PACKETS: usize = 128;

impl EventHandler for Vsock {
    fn handle(&mut self, event_token: u32, events: EventSet) {
        let (Some(active), listener) = (&mut self.active, &self.listener) else {
            return;
        };
        let outcome = match event_token {
            token::TIMER => {
                active.muxer.on_timer();
                active.work(false)
            }
            token::LISTENER => {
                if let Some(listener) = listener {
                    active.muxer.on_listener(listener);
                }
                active.work(false)
            }
            token if token >= token::FIRST_SLOT => {
                active.muxer.on_slot(token - token::FIRST_SLOT, events);
                active.work(false)
            }
            index => {
                active.queues.notified(index as usize);
                active.work(index as usize == queue::SEND)
            }
        };
        if outcome.is_err() {
            active.queues.break_device();
        }
        if active.queues.is_broken() {
            // Nobody is left to talk to, and no client is to wait for that.
            active.muxer.drop_all();
        }
    }
}

impl Active {
    /// Takes the guest's packets, if it has told of any, and sends it what is
    /// owed to it.
    fn work(&mut self, take: bool) -> Result<(), Broken> {
        if self.queues.is_broken() {
            return Ok(());
        }
        let memory = self.queues.memory.memory();
        if take {
            self.take(&memory)?;
        }
        self.send(&memory)?;
        if self.stalled && self.muxer.can_take() {
            self.stalled = false;
            self.again(queue::SEND);
        }
        Ok(())
    }

    fn take(&mut self, memory: &GuestMemoryMmap) -> Result<(), Broken> {
        let mut used = false;
        let mut left = PACKETS;
        let counters = Arc::clone(&self.queues.counters);
        let Some(send) = self.queues.get(queue::SEND) else {
            return Ok(());
        };
        loop {
            if left == 0 || !self.muxer.can_take() {
                self.stalled = true;
                break;
            }
            let Some(chain) = pop(send, memory)? else {
                if send.enable_notification(memory).map_err(|_| Broken)? {
                    continue;
                }
                break;
            };
            left -= 1;
            let head = chain.head_index();
            let packet = packet::from_tx(memory, chain)?;
            counters.requests(1);
            match &packet {
                Sent::Packet(header, _) => counters.from_guest(header.len.into()),
                Sent::Short | Sent::Truncated(_) => counters.error(),
            }
            self.muxer.on_sent(packet);
            send.add_used(memory, head, 0).map_err(|_| Broken)?;
            used = true;
        }
        if used {
            self.queues.signal(queue::SEND);
        }
        Ok(())
    }

    fn send(&mut self, memory: &GuestMemoryMmap) -> Result<(), Broken> {
        let counters = Arc::clone(&self.queues.counters);
        let Some(queue) = self.queues.get(queue::RECEIVE) else {
            return Ok(());
        };
        let mut receive = Receive::new(queue, memory, counters);
        let more = loop {
            match self.muxer.send(&mut receive)? {
                Round::Idle => break false,
                Round::More => break true,
                Round::NoBuffers => {
                    if !receive.wait_for_more()? {
                        break false;
                    }
                }
            }
        };
        let used = receive.has_used();
        if more {
            self.again(queue::RECEIVE);
        }
        if used {
            self.queues.signal(queue::RECEIVE);
        }
        Ok(())
    }

    /// Comes back to a queue after others had their turn.
    fn again(&self, index: usize) {
        if let Some(kick) = self.queues.kick(index) {
            // Cannot fail: the counter is far from its limit.
            let _ = kick.write(1);
        }
    }
}
