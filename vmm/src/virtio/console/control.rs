// SPDX-License-Identifier: Apache-2.0
//! Control messages (virtio 1.2 §5.3.6.2). What is still to be told is kept as
//! one flag for each message there can be, so that a guest that asks and never
//! listens costs nothing.

use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryMmap};

use super::{
    device::{queue, CONSOLE, PORTS},
    port::Port,
};
use crate::virtio::chain::{pop, segments, Broken, Chain, Queues};

/// `struct virtio_console_control`.
const MESSAGE: usize = 8;

/// Its events.
mod event {
    pub const DEVICE_READY: u16 = 0;
    pub const PORT_ADD: u16 = 1;
    pub const PORT_READY: u16 = 3;
    pub const CONSOLE_PORT: u16 = 4;
    pub const PORT_OPEN: u16 = 6;
    pub const PORT_NAME: u16 = 7;
}

/// The name of the port that has one.
const NAME: &[u8] = b"log";

/// What a guest is still to be told of a port, in this order.
pub(super) mod pending {
    /// That there is one.
    pub const ADD: u8 = 1;
    /// What it is: a console, or of what name.
    pub const KIND: u8 = 2;
    /// That somebody is at its other end.
    pub const OPEN: u8 = 4;
    /// All of these.
    pub const ALL: u8 = ADD | KIND | OPEN;
}

/// Takes a message of the guest's.
pub(super) fn take(
    ports: &mut [Port; PORTS],
    memory: &GuestMemoryMmap,
    chain: Chain<'_>,
) -> Result<(), Broken> {
    let (readable, _) = segments(chain);
    let mut message = [0_u8; MESSAGE];
    let mut filled = 0;
    for segment in readable {
        let length = (segment.length as usize).min(MESSAGE - filled);
        memory
            .read_slice(&mut message[filled..filled + length], segment.address)
            .map_err(|_| Broken)?;
        filled += length;
    }
    if filled < MESSAGE {
        return Err(Broken);
    }
    let [a, b, c, d, e, f, g, h] = message;
    let id = u32::from_le_bytes([a, b, c, d]);
    let (event, value) = (u16::from_le_bytes([e, f]), u16::from_le_bytes([g, h]));
    if event == event::DEVICE_READY {
        // Of no port. One that is not ready says so, and that is all.
        if value == 1 {
            ports
                .iter_mut()
                .for_each(|port| port.pending |= pending::ADD);
        }
        return Ok(());
    }
    let port = usize::try_from(id).ok().and_then(|id| ports.get_mut(id));
    // What is said of other ports, or is not for a device, changes nothing.
    let Some(port) = port else { return Ok(()) };
    match event {
        event::PORT_READY if value == 1 => port.pending |= pending::KIND | pending::OPEN,
        event::PORT_OPEN => port.open = value != 0,
        _ => {}
    }
    Ok(())
}

/// Tells what is to be told, as far as there are buffers for it.
pub(super) fn tell(ports: &mut [Port; PORTS], queues: &mut Queues) -> Result<(), Broken> {
    let memory = queues.memory.memory();
    let Some(receive) = queues.get(queue::CONTROL_RECEIVE) else {
        return Ok(());
    };
    let mut told = 0;
    while let Some((id, flag)) = next(ports) {
        let Some(chain) = pop(receive, &memory)? else {
            if receive.enable_notification(&*memory).map_err(|_| Broken)? {
                continue;
            }
            break;
        };
        let head = chain.head_index();
        let message = message(id, flag);
        write(&memory, chain, &message)?;
        receive
            .add_used(&*memory, head, message.len() as u32)
            .map_err(|_| Broken)?;
        ports[id].pending &= !flag;
        told += 1;
    }
    if told > 0 {
        queues.counters.requests(told);
        queues.signal(queue::CONTROL_RECEIVE);
    }
    Ok(())
}

/// What comes first.
fn next(ports: &[Port; PORTS]) -> Option<(usize, u8)> {
    let flags = [pending::ADD, pending::KIND, pending::OPEN];
    let mut all = flags
        .into_iter()
        .flat_map(|flag| (0..PORTS).map(move |id| (id, flag)));
    all.find(|(id, flag)| ports[*id].pending & flag != 0)
}

fn message(id: usize, flag: u8) -> Vec<u8> {
    let (event, value, name): (u16, u16, &[u8]) = match flag {
        pending::ADD => (event::PORT_ADD, 1, &[]),
        pending::KIND if id == CONSOLE => (event::CONSOLE_PORT, 1, &[]),
        pending::KIND => (event::PORT_NAME, 1, NAME),
        _ => (event::PORT_OPEN, 1, &[]),
    };
    let mut message = Vec::with_capacity(MESSAGE + name.len());
    message.extend_from_slice(&(id as u32).to_le_bytes());
    message.extend_from_slice(&event.to_le_bytes());
    message.extend_from_slice(&value.to_le_bytes());
    message.extend_from_slice(name);
    message
}

/// Writes a message, which must fit.
fn write(memory: &GuestMemoryMmap, chain: Chain<'_>, message: &[u8]) -> Result<(), Broken> {
    let (_, writable) = segments(chain);
    let mut rest = message;
    for segment in writable {
        let (part, after) = rest.split_at(rest.len().min(segment.length as usize));
        memory
            .write_slice(part, segment.address)
            .map_err(|_| Broken)?;
        rest = after;
    }
    match rest {
        [] => Ok(()),
        _ => Err(Broken),
    }
}
