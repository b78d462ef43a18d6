// SPDX-License-Identifier: Apache-2.0
//! What wakes the device: the driver, a host program, time.

use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::Vsock;
use crate::{event::EventHandler, virtio::chain::Broken};

/// Tokens on the event loop; the queues' are below, connections' above.
pub const LISTENER: u32 = 8;
/// The timer of unanswered connections.
pub const TIMER: u32 = 9;
/// First token of a host socket.
pub const FIRST_SOCKET: u32 = 16;

const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;

/// Packets of the guest worked per wake-up.
const ROUND: usize = 64;

impl EventHandler for Vsock {
    fn handle(&mut self, token: u32, events: EventSet) {
        let listener = match self.listener().map(|listener| listener.try_clone()) {
            Some(Ok(listener)) if token == LISTENER => Some(listener),
            _ => None,
        };
        if token == TIMER {
            // Counts expiries, which do not matter.
            let _ = self.timer().wait();
        }
        let Some(queues) = &mut self.active else {
            return;
        };
        if token < LISTENER && !queues.notified(token as usize) || queues.is_broken() {
            return;
        }
        let memory = queues.memory.memory();
        match token {
            RECEIVE => {}
            TRANSMIT => {
                let event_loop = queues.event_loop.clone();
                let handler = queues.handler.clone();
                let muxer = &mut self.muxer;
                queues.drain(TRANSMIT as usize, ROUND, |chain| {
                    muxer.from_guest(&memory, chain, &event_loop, &handler)
                });
            }
            LISTENER => {
                if let Some(listener) = listener {
                    self.muxer
                        .accept(&listener, &queues.event_loop, &queues.handler);
                }
            }
            TIMER => self.muxer.expire(),
            token if token >= FIRST_SOCKET => {
                self.muxer
                    .socket_ready(token, events, &queues.event_loop, &queues.handler);
            }
            // The event queue only takes buffers for later.
            _ => return,
        }
        if let Err(Broken) = self.muxer.to_guest(queues) {
            queues.break_device();
        }
        if let Some(wait) = self.muxer.next_expiry() {
            // Fails only for times that cannot be represented.
            let _ = self.timer().reset(wait, None);
        }
    }
}
