// SPDX-License-Identifier: Apache-2.0
//! Working the queues.

use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::{
    control,
    device::{queue, CONSOLE, LOG},
    Console,
};
use crate::{
    event::EventHandler,
    virtio::chain::{Broken, Queues},
};

/// Tokens of the descriptors on the event loop; the queues' are below.
const CONSOLE_FILE: u32 = queue::COUNT as u32;
const LOG_FILE: u32 = CONSOLE_FILE + 1;
/// Most control messages per wake-up.
const ROUND: usize = 16;

impl EventHandler for Console {
    fn handle(&mut self, token: u32, _events: EventSet) {
        // While the queues are worked, they are not the device's.
        let Some(mut queues) = self.active.take() else {
            return;
        };
        let may_go_on = match token {
            CONSOLE_FILE | LOG_FILE => !queues.is_broken(),
            _ => queues.notified(token as usize),
        };
        if !may_go_on || self.work(token, &mut queues).is_err() {
            queues.break_device();
        }
        if queues.is_broken() {
            self.ports.iter_mut().for_each(|port| port.rest(&queues));
        }
        self.active = Some(queues);
    }
}

impl Console {
    fn work(&mut self, token: u32, queues: &mut Queues) -> Result<(), Broken> {
        const RECEIVE: u32 = queue::CONSOLE_RECEIVE as u32;
        const TRANSMIT: u32 = queue::CONSOLE_TRANSMIT as u32;
        const CONTROL_RECEIVE: u32 = queue::CONTROL_RECEIVE as u32;
        const CONTROL_TRANSMIT: u32 = queue::CONTROL_TRANSMIT as u32;
        const LOG_TRANSMIT: u32 = queue::LOG_TRANSMIT as u32;
        match token {
            RECEIVE | CONSOLE_FILE => self.receive(queues),
            // Nothing of it waits.
            TRANSMIT => self.ports[CONSOLE]
                .send(queues, queue::CONSOLE_TRANSMIT)
                .map(drop),
            CONTROL_RECEIVE => control::tell(&mut self.ports, queues),
            CONTROL_TRANSMIT => {
                let memory = queues.memory.memory();
                let ports = &mut self.ports;
                queues.drain(queue::CONTROL_TRANSMIT, ROUND, |chain| {
                    control::take(ports, &memory, chain).map(|()| 0)
                });
                if queues.is_broken() {
                    return Ok(());
                }
                control::tell(&mut self.ports, queues)?;
                // It may have been opened, or closed.
                self.receive(queues)
            }
            LOG_TRANSMIT | LOG_FILE => {
                let port = &mut self.ports[LOG];
                let blocked = port.send(queues, queue::LOG_TRANSMIT)?;
                port.watch(queues, LOG_FILE, blocked);
                Ok(())
            }
            // The guest gets nothing by the log.
            _ => Ok(()),
        }
    }

    fn receive(&mut self, queues: &mut Queues) -> Result<(), Broken> {
        let port = &mut self.ports[CONSOLE];
        let more = port.receive(queues, queue::CONSOLE_RECEIVE)?;
        port.watch(queues, CONSOLE_FILE, more);
        Ok(())
    }
}
