// SPDX-License-Identifier: Apache-2.0
//! A guest without rules: it writes descriptors, rings and data as the input
//! says, and notifies the device. Everything happens on the calling thread.

use std::sync::{Arc, Mutex, OnceLock};

use bulkhead_vmm::{
    confine::seccomp::Worker,
    event::{EventHandler, EventLoop},
    virtio::device::{Activation, ActiveQueue, Interrupt, VirtioDevice},
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

const SIZE: u16 = 32;
/// Each queue's rings lie in as much.
const QUEUE_SPACE: u64 = 0x4000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Where buffers lie.
const DATA: u64 = 0x1_0000;
const MEMORY: usize = 0x2_0000;
/// Bytes of a step.
const STEP: usize = 10;

struct Nobody;

impl Interrupt for Nobody {
    fn signal_queue(&self, _: usize) {}
    fn show_config(&self, _: &[u8]) {}
    fn signal_config(&self) {}
    fn device_broken(&self) {}
}

impl EventHandler for Nobody {
    fn handle(&mut self, _: u32, _: EventSet) {}
}

fn activate<D: VirtioDevice>(device: &mut D, memory: &GuestMemoryMmap) {
    static LOOP: OnceLock<EventLoop> = OnceLock::new();
    // A thread that has nobody to call.
    let event_loop =
        LOOP.get_or_init(|| EventLoop::spawn("fuzz", Worker::Devices).expect("an event loop"));
    let handler: Arc<Mutex<dyn EventHandler>> = Arc::new(Mutex::new(Nobody));
    let queues = (0..device.queue_sizes().len()).map(|index| {
        let mut queue = Queue::new(SIZE).expect("a power of two");
        let base = index as u64 * QUEUE_SPACE;
        let low = |address: u64| Some(address as u32);
        queue.set_desc_table_address(low(base), Some(0));
        queue.set_avail_ring_address(low(base + AVAILABLE), Some(0));
        queue.set_used_ring_address(low(base + USED), Some(0));
        queue.set_event_idx(true);
        queue.set_ready(true);
        ActiveQueue {
            index,
            queue,
            kick: EventFd::new(libc_nonblock()).expect("an eventfd"),
        }
    });
    let activation = Activation {
        memory: GuestMemoryAtomic::new(memory.clone()),
        interrupt: Arc::new(Nobody),
        queues: queues.collect(),
        features: device.features(),
        event_loop: event_loop.handle(),
        handler: Arc::downgrade(&handler),
        counters: Arc::default(),
    };
    device.activate(activation).expect("all queues are there");
}

/// EFD_NONBLOCK | EFD_CLOEXEC.
fn libc_nonblock() -> i32 {
    0o4000 | 0o2000000
}

/// A guest that sends one well-formed chain after another.
#[allow(dead_code)] // the targets use one or the other
pub struct Guest<'d, D: VirtioDevice> {
    device: &'d mut D,
    memory: GuestMemoryMmap,
    available: Vec<u16>,
}

#[allow(dead_code)]
impl<'d, D: VirtioDevice> Guest<'d, D> {
    /// A guest with the device at work.
    pub fn new(device: &'d mut D) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
        activate(device, &memory);
        let available = vec![0; device.queue_sizes().len()];
        Self {
            device,
            memory,
            available,
        }
    }

    /// Sends a request with room for an answer; less than half of the data's
    /// space each.
    pub fn send(&mut self, queue: usize, request: &[u8], room: u32) {
        let half = (MEMORY as u64 - DATA) / 2;
        let base = queue as u64 * QUEUE_SPACE;
        let write = |at: u64, bytes: &[u8]| {
            let _ = self.memory.write_slice(bytes, GuestAddress(at));
        };
        write(DATA, request);
        let length = request.len() as u32;
        let parts = [
            (DATA, length, u16::from(room > 0), 1),
            (DATA + half, room, 2, 0),
        ];
        for (index, (address, length, flags, next)) in parts.into_iter().enumerate() {
            let mut descriptor = Vec::new();
            descriptor.extend_from_slice(&u64::to_le_bytes(address));
            descriptor.extend_from_slice(&u32::to_le_bytes(length));
            descriptor.extend_from_slice(&u16::to_le_bytes(flags));
            descriptor.extend_from_slice(&u16::to_le_bytes(next));
            write(base + index as u64 * 16, &descriptor);
        }
        let count = &mut self.available[queue];
        write(base + AVAILABLE + 4 + u64::from(*count % SIZE) * 2, &[0; 2]);
        *count = count.wrapping_add(1);
        write(base + AVAILABLE + 2, &count.to_le_bytes());
        self.device.handle(queue as u32, EventSet::IN);
    }
}

impl<D: VirtioDevice> Drop for Guest<'_, D> {
    fn drop(&mut self) {
        self.device.reset();
    }
}

/// Does what the input says to a device, and resets it.
#[allow(dead_code)]
pub fn drive<D: VirtioDevice>(device: &mut D, input: &[u8]) {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
    activate(device, &memory);
    let count = device.queue_sizes().len();
    let mut available = vec![0_u16; count];
    let write = |at: u64, bytes: &[u8]| {
        // What does not fit is not there.
        let _ = memory.write_slice(bytes, GuestAddress(at));
    };
    for step in input.chunks_exact(STEP) {
        let word = |at: usize| u16::from_le_bytes([step[at], step[at + 1]]);
        let queue = usize::from(step[1]) % count;
        let base = queue as u64 * QUEUE_SPACE;
        match step[0] % 8 {
            // A descriptor: of a buffer among the data, or of anything.
            0 | 1 => {
                let at = base + u64::from(step[2] % SIZE as u8) * 16;
                let far = step[0] & 0x80 != 0;
                let address =
                    u64::from(word(4)) | if far { u64::from(word(6)) << 16 } else { DATA };
                let length = u32::from(word(6)) << if far { 16 } else { 0 };
                let mut descriptor = Vec::new();
                descriptor.extend_from_slice(&address.to_le_bytes());
                descriptor.extend_from_slice(&length.to_le_bytes());
                descriptor.extend_from_slice(&u16::from(step[3] % 8).to_le_bytes());
                descriptor.extend_from_slice(&word(8).to_le_bytes());
                write(at, &descriptor);
            }
            // Data.
            2 | 3 => write(DATA + u64::from(word(2)), &step[4..]),
            // A chain is available.
            4 | 5 => {
                let slot = base + AVAILABLE + 4 + u64::from(available[queue] % SIZE) * 2;
                write(slot, &word(2).to_le_bytes());
                available[queue] = available[queue].wrapping_add(1);
                write(base + AVAILABLE + 2, &available[queue].to_le_bytes());
                device.handle(queue as u32, EventSet::IN);
            }
            // Anything in the rings.
            6 => write(base + u64::from(word(2) % QUEUE_SPACE as u16), &step[4..8]),
            _ if step[2] == 0 => {
                device.reset();
                available.fill(0);
                activate(device, &memory);
            }
            // Other events than the queues'.
            _ => device.handle(u32::from(step[2] % 16), EventSet::IN),
        }
    }
    for queue in 0..count {
        device.handle(queue as u32, EventSet::IN);
    }
    device.reset();
}
