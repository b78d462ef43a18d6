// SPDX-License-Identifier: Apache-2.0
//! A port: bytes between its two queues and a descriptor.

use std::{
    fs::File,
    io::{self, ErrorKind},
    os::fd::AsFd,
    sync::Arc,
};

use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryMmap, ReadVolatile,
    VolatileMemoryError, WriteVolatile,
};
use vmm_sys_util::epoll::EventSet;

use crate::virtio::chain::{pop, segments, Broken, Queues, Segment};

/// Most buffers per wake-up.
const ROUND: usize = 32;
/// Most bytes: others share the loop, and a guest's buffers may overlap.
const BYTES: usize = 256 << 10;

/// What becomes of bytes for which there is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Full {
    /// They are lost, and counted.
    Drop,
    /// They stay in the guest until there is.
    Wait,
}

/// A port.
pub(super) struct Port {
    file: Option<File>,
    full: Full,
    /// Whether input comes from the descriptor, as far as it has not ended.
    input: bool,
    /// Whether the loop watches it: for input, while the guest takes some, or
    /// for room.
    watched: bool,
    /// The guest has opened it.
    pub open: bool,
    /// What the guest is still to be told ([`super::control::pending`]).
    pub pending: u8,
    /// How much of the first buffer of the transmit queue has been written.
    pub written: u64,
}

/// How far a buffer was written.
enum Progress {
    Done,
    /// There is no room.
    Blocked,
    /// It is too long for one wake-up.
    Later,
}

impl Port {
    pub fn new(file: Option<File>, input: bool, full: Full) -> Self {
        Self {
            input: input && file.is_some(),
            file,
            full,
            watched: false,
            open: false,
            pending: 0,
            written: 0,
        }
    }

    /// As before any driver.
    pub fn forget(&mut self) {
        self.open = false;
        self.pending = 0;
        self.written = 0;
    }

    /// Nothing is watched any more.
    pub fn rest(&mut self, queues: &Queues) {
        if let (Some(file), true) = (&self.file, self.watched) {
            queues.event_loop.unregister(file);
        }
        self.watched = false;
    }

    /// Watches the descriptor while something is waited for. It is taken off the
    /// loop else: the end of a connection is told whether one asks or not.
    pub fn watch(&mut self, queues: &Queues, token: u32, wanted: bool) {
        if !wanted {
            self.rest(queues);
        }
        let (Some(file), false, true) = (&self.file, self.watched, wanted) else {
            return;
        };
        let events = match self.full {
            Full::Drop => EventSet::IN,
            Full::Wait => EventSet::OUT,
        };
        let handler = queues.handler.clone();
        match queues.event_loop.register(file, events, handler, token) {
            Ok(()) => self.watched = true,
            Err(error) => {
                // A file, say, which is never waited for.
                limited!(warn, %error, "a console's descriptor cannot be watched");
                self.input = false;
                self.full = Full::Drop;
            }
        }
    }

    /// Gives the guest what there is; whether more is waited for.
    pub fn receive(&mut self, queues: &mut Queues, index: usize) -> Result<bool, Broken> {
        let (Some(file), true, true) = (&self.file, self.input, self.open) else {
            return Ok(false);
        };
        let memory = queues.memory.memory();
        let Some(queue) = queues.get(index) else {
            return Ok(false);
        };
        let mut received = Vec::new();
        // A guest without buffers says when it has some.
        let mut more = true;
        while received.len() < ROUND {
            let Some(chain) = pop(queue, &memory)? else {
                if queue.enable_notification(&*memory).map_err(|_| Broken)? {
                    continue;
                }
                more = false;
                break;
            };
            let head = chain.head_index();
            let (_, writable) = segments(chain);
            let (length, state) = read(file, &memory, &writable)?;
            self.input = state != End::Over;
            if length == 0 {
                queue.go_to_previous_position();
                break;
            }
            queue.add_used(&*memory, head, length).map_err(|_| Broken)?;
            received.push(length);
            if state != End::More {
                break;
            }
        }
        if !received.is_empty() {
            let bytes = received.iter().copied().map(u64::from).sum();
            queues.counters.requests(received.len() as u64);
            queues.counters.to_guest(bytes);
            queues.signal(index);
        }
        Ok(more && self.input)
    }

    /// Writes what the guest has queued; whether room is waited for.
    pub fn send(&mut self, queues: &mut Queues, index: usize) -> Result<bool, Broken> {
        let memory = queues.memory.memory();
        let counters = Arc::clone(&queues.counters);
        let mut left = BYTES;
        let mut sent = 0;
        let mut blocked = false;
        let Some(queue) = queues.get(index) else {
            return Ok(false);
        };
        let later = loop {
            if sent == ROUND {
                break true;
            }
            let Some(chain) = pop(queue, &memory)? else {
                if queue.enable_notification(&*memory).map_err(|_| Broken)? {
                    continue;
                }
                break false;
            };
            let head = chain.head_index();
            let (readable, _) = segments(chain);
            let before = self.written;
            let progress = self.write(&memory, &readable, &mut left)?;
            counters.from_guest(self.written - before);
            match progress {
                Progress::Done => {
                    let total: u64 = readable.iter().map(|s| u64::from(s.length)).sum();
                    if self.file.is_some() && self.written < total {
                        counters.error();
                    }
                    self.written = 0;
                    queue.add_used(&*memory, head, 0).map_err(|_| Broken)?;
                    sent += 1;
                }
                Progress::Blocked => {
                    queue.go_to_previous_position();
                    blocked = true;
                    break false;
                }
                Progress::Later => {
                    queue.go_to_previous_position();
                    break true;
                }
            }
        };
        if sent > 0 {
            queues.counters.requests(sent as u64);
            queues.signal(index);
        }
        if let (true, Some(kick)) = (later, queues.kick(index)) {
            // Cannot fail: the counter is far from its limit.
            let _ = kick.write(1);
        }
        Ok(blocked)
    }

    /// Writes a buffer from where that was left, `left` bytes at most.
    fn write(
        &mut self,
        memory: &GuestMemoryMmap,
        segments: &[Segment],
        left: &mut usize,
    ) -> Result<Progress, Broken> {
        let Some(file) = &self.file else {
            return Ok(Progress::Done);
        };
        let mut start = 0_u64;
        for segment in segments {
            let end = start + u64::from(segment.length);
            // What was written, at another time perhaps: the guest may have put
            // something shorter in its place.
            let skip = self.written.clamp(start, end) - start;
            start = end;
            let address = segment.address.0.checked_add(skip).ok_or(Broken)?;
            let length = u64::from(segment.length) - skip;
            for slice in memory.get_slices(GuestAddress(address), length as usize) {
                let mut slice = slice.map_err(|_| Broken)?;
                while !slice.is_empty() {
                    if *left == 0 {
                        return Ok(Progress::Later);
                    }
                    let part = slice
                        .subslice(0, slice.len().min(*left))
                        .map_err(|_| Broken)?;
                    match file.as_fd().write_volatile(&part).map_err(kind) {
                        Ok(count) if count > 0 => {
                            *left -= count;
                            self.written += count as u64;
                            slice = slice.offset(count).map_err(|_| Broken)?;
                        }
                        Err(ErrorKind::Interrupted) => {}
                        Err(ErrorKind::WouldBlock) if self.full == Full::Wait => {
                            return Ok(Progress::Blocked);
                        }
                        // No room, or nobody who reads.
                        Ok(_) | Err(_) => return Ok(Progress::Done),
                    }
                }
            }
        }
        Ok(Progress::Done)
    }
}

/// What may come after what was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Perhaps something.
    More,
    /// Nothing now.
    Now,
    /// Nothing ever.
    Over,
}

/// Reads into a buffer; how much.
fn read(file: &File, memory: &GuestMemoryMmap, segments: &[Segment]) -> Result<(u32, End), Broken> {
    let mut total = 0;
    let mut room = false;
    for segment in segments {
        let length = (segment.length as usize).min(BYTES - total);
        for slice in memory.get_slices(segment.address, length) {
            let mut slice = slice.map_err(|_| Broken)?;
            while !slice.is_empty() {
                room = true;
                let state = match file.as_fd().read_volatile(&mut slice).map_err(kind) {
                    Ok(0) => End::Over,
                    Ok(count) => {
                        total += count;
                        slice = slice.offset(count).map_err(|_| Broken)?;
                        continue;
                    }
                    Err(ErrorKind::Interrupted) => continue,
                    Err(ErrorKind::WouldBlock) => End::Now,
                    Err(_) => End::Over,
                };
                return Ok((total as u32, state));
            }
        }
    }
    match room {
        true => Ok((total as u32, End::More)),
        // One that holds nothing.
        false => Err(Broken),
    }
}

fn kind(error: VolatileMemoryError) -> ErrorKind {
    match error {
        VolatileMemoryError::IOError(error) => error.kind(),
        _ => io::ErrorKind::Other,
    }
}
