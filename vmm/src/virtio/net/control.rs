// SPDX-License-Identifier: Apache-2.0
//! Commands of the driver (virtio 1.2 §5.1.6.5): that it has announced itself,
//! and how many pairs of queues it uses. All others are refused.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryMmap};

use super::{
    event::{receive_queue, transmit_queue},
    Net,
};
use crate::virtio::chain::{segments, Broken, Chain, Queues, Segment};

/// Most commands per wake-up.
const ROUND: usize = 16;

/// What the driver says or wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Command {
    /// It has announced itself.
    Announced,
    /// It uses so many pairs from now on.
    Pairs(usize),
}

impl Net {
    /// Answers commands, and does what they say.
    pub(super) fn obey(&mut self) -> Result<(), Broken> {
        let index = self.control_queue();
        let pairs = self.pairs();
        let Some(queues) = &mut self.active else {
            return Ok(());
        };
        // With one there is no such command.
        let most = if pairs > 1 { set_up(queues, pairs) } else { 0 };
        let memory = queues.memory.memory();
        let mut commands = Vec::new();
        queues.drain(index, ROUND, |chain| {
            let (length, command) = answer(&memory, chain, most)?;
            commands.extend(command);
            Ok(length)
        });
        for command in commands {
            match command {
                Command::Announced => self.announced(),
                Command::Pairs(count) => self.use_pairs(count),
            }
        }
        Ok(())
    }

    fn use_pairs(&mut self, count: usize) {
        let Some(queues) = &mut self.active else {
            return;
        };
        let left = self.ready.iter_mut().enumerate().skip(count);
        for (pair, ready) in left {
            if let Some(queue) = queues.get(receive_queue(pair)) {
                ready.give_back(queue);
            }
        }
        self.in_use = count;
        // What there is in their queues, and in those of the tap which are theirs
        // now.
        for pair in 0..count {
            for index in [receive_queue(pair), transmit_queue(pair)] {
                if let Some(kick) = queues.kick(index) {
                    // Cannot fail: the counter is far from its limit.
                    let _ = kick.write(1);
                }
            }
        }
    }
}

/// How many pairs, at most so many, the driver has set up from the first.
fn set_up(queues: &Queues, pairs: usize) -> usize {
    let is_there = |index| queues.kick(index).is_some();
    (0..pairs)
        .take_while(|pair| is_there(receive_queue(*pair)) && is_there(transmit_queue(*pair)))
        .count()
}

/// Answers a command: how many bytes were written, and what it is, if it is one
/// that there is. Pairs can be `most`.
fn answer(
    memory: &GuestMemoryMmap,
    chain: Chain<'_>,
    most: usize,
) -> Result<(u32, Option<Command>), Broken> {
    let (readable, writable) = segments(chain);
    let result = writable.last().filter(|result| result.length > 0);
    let result = result.ok_or(Broken)?;
    let (bytes, length) = read(memory, &readable)?;
    if length < 2 {
        return Err(Broken);
    }
    let [class, command, low, high] = bytes;
    let command = match (u32::from(class), u32::from(command)) {
        (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK) => Some(Command::Announced),
        (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) if length == bytes.len() => {
            let count = usize::from(u16::from_le_bytes([low, high]));
            (1..=most).contains(&count).then_some(Command::Pairs(count))
        }
        _ => None,
    };
    let code = match command {
        Some(_) => VIRTIO_NET_OK,
        None => VIRTIO_NET_ERR,
    };
    memory
        .write_obj(code as u8, result.address)
        .map_err(|_| Broken)?;
    Ok((1, command))
}

/// The beginning of a command, as long as any is, and how much of that there is.
fn read(memory: &GuestMemoryMmap, readable: &[Segment]) -> Result<([u8; 4], usize), Broken> {
    let mut bytes = [0; 4];
    let mut length = 0;
    for segment in readable {
        let rest = &mut bytes[length..];
        let part = rest.len().min(segment.length as usize);
        memory
            .read_slice(&mut rest[..part], segment.address)
            .map_err(|_| Broken)?;
        length += part;
    }
    Ok((bytes, length))
}
