// SPDX-License-Identifier: Apache-2.0
//! A driver for device tests: real queues in real guest memory, without a
//! guest. What it queues is what a guest could queue, right or wrong.

use std::sync::{
    atomic::{AtomicBool, AtomicUsize, Ordering},
    Arc, Mutex, MutexGuard,
};

use bulkhead_vmm_api::DeviceMetrics;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

use super::counters::Counters;
use super::device::{Activation, ActiveQueue, Interrupt, VirtioDevice};
use crate::{
    confine::{
        self,
        seccomp::{Worker, LEFT_OUT},
    },
    event::{EventHandler, EventLoop},
};

/// A buffer the device reads.
pub const READ_ONLY: u16 = 0;
/// A buffer the device writes.
pub const READ_WRITE: u16 = 2;
const NEXT: u16 = 1;

const MEMORY: usize = 16 << 20;
/// Each queue's rings lie in a megabyte of their own.
const QUEUE_SPACE: u64 = 1 << 20;
const BUFFERS: u64 = 8 << 20;
const SIZE: u16 = 64;

#[derive(Default)]
struct Recorder {
    queues: [AtomicUsize; 8],
    broken: AtomicBool,
}

impl Interrupt for Recorder {
    fn signal_queue(&self, index: usize) {
        self.queues[index].fetch_add(1, Ordering::SeqCst);
    }
    fn show_config(&self, _: &[u8]) {}
    fn signal_config(&self) {}
    fn device_broken(&self) {
        self.broken.store(true, Ordering::SeqCst);
    }
}

struct Ring {
    next_descriptor: u16,
    available: u16,
    seen: u16,
}

/// A driver with its device activated.
pub struct Driver<D: VirtioDevice + 'static> {
    /// Whether the loop runs the device, as in a VM.
    live: bool,
    /// Features that it does not take.
    refused: u64,
    device: Arc<Mutex<D>>,
    memory: GuestMemoryMmap,
    recorder: Arc<Recorder>,
    counters: Arc<Counters>,
    rings: Vec<Ring>,
    kicks: Vec<EventFd>,
    next_buffer: u64,
    event_loop: EventLoop,
}

impl<D: VirtioDevice + 'static> Driver<D> {
    /// Activates `device` with queues of 64. It works when the test says so.
    pub fn new(device: D) -> Self {
        Self::with(device, false, 0)
    }

    /// As [`Self::new`], of a driver that does not take the features of the mask.
    pub fn refusing(device: D, features: u64) -> Self {
        Self::with(device, false, features)
    }

    /// Activates `device`, which works by itself whenever one of its
    /// descriptors is ready, on a thread of its own.
    pub fn live(device: D) -> Self {
        Self::with(device, true, 0)
    }

    fn with(device: D, live: bool, refused: u64) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let event_loop = EventLoop::spawn("test", worker(&device)).unwrap();
        let device = Arc::new(Mutex::new(device));
        let recorder = Arc::new(Recorder::default());
        let mut this = Self {
            live,
            refused,
            device,
            memory,
            recorder,
            counters: Arc::default(),
            rings: Vec::new(),
            kicks: Vec::new(),
            next_buffer: BUFFERS,
            event_loop,
        };
        this.activate();
        this
    }

    /// Resets the device and sets it up anew, as a driver that is loaded for
    /// the second time does.
    pub fn restart(&mut self) {
        self.device.lock().unwrap().reset();
        self.activate();
    }

    fn activate(&mut self) {
        let handler: Arc<Mutex<dyn EventHandler>> = if self.live {
            self.device.clone()
        } else {
            // Events of the loop go nowhere: tests call the device themselves.
            Arc::new(Mutex::new(Nothing))
        };
        let mut device = self.device.lock().unwrap();
        let count = device.queue_sizes().len();
        self.rings.clear();
        self.kicks.clear();
        let mut queues = Vec::new();
        for index in 0..count {
            let mut queue = Queue::new(SIZE).unwrap();
            let (table, available, used) = addresses(index);
            queue.set_desc_table_address(Some(table as u32), Some(0));
            queue.set_avail_ring_address(Some(available as u32), Some(0));
            queue.set_used_ring_address(Some(used as u32), Some(0));
            queue.set_ready(true);
            for ring in [available, used] {
                self.memory.write_obj(0_u32, GuestAddress(ring)).unwrap();
            }
            self.rings.push(Ring {
                next_descriptor: 0,
                available: 0,
                seen: 0,
            });
            let kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
            self.kicks.push(kick.try_clone().unwrap());
            queues.push(ActiveQueue { index, queue, kick });
        }
        let activation = Activation {
            memory: GuestMemoryAtomic::new(self.memory.clone()),
            interrupt: self.recorder.clone(),
            queues,
            features: device.features() & !self.refused,
            event_loop: self.event_loop.handle(),
            handler: Arc::downgrade(&handler),
            counters: Arc::clone(&self.counters),
        };
        device.activate(activation).unwrap();
    }

    /// The device.
    pub fn device(&mut self) -> MutexGuard<'_, D> {
        self.device.lock().unwrap()
    }

    /// Memory for a buffer.
    pub fn buffer(&mut self, length: u64) -> u64 {
        let at = self.next_buffer;
        self.next_buffer += length.next_multiple_of(64);
        assert!(self.next_buffer <= MEMORY as u64);
        at
    }

    /// Lets buffers lie where there were some.
    pub fn forget_buffers(&mut self) {
        self.next_buffer = BUFFERS;
    }

    /// Writes guest memory.
    pub fn write(&self, at: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(at)).unwrap();
    }

    /// Reads guest memory.
    pub fn read(&self, at: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.memory.read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }

    /// Makes a chain of (address, length, flags) available in a queue.
    pub fn queue(&mut self, index: usize, chain: &[(u64, u32, u16)]) {
        let (table, available, _) = addresses(index);
        let ring = &mut self.rings[index];
        let head = ring.next_descriptor;
        for (position, (address, length, flags)) in chain.iter().enumerate() {
            let slot = ring.next_descriptor;
            ring.next_descriptor = (slot + 1) % SIZE;
            let last = position + 1 == chain.len();
            let flags = flags | if last { 0 } else { NEXT };
            let at = table + u64::from(slot) * 16;
            let mut descriptor = Vec::new();
            descriptor.extend_from_slice(&address.to_le_bytes());
            descriptor.extend_from_slice(&length.to_le_bytes());
            descriptor.extend_from_slice(&flags.to_le_bytes());
            descriptor.extend_from_slice(&ring.next_descriptor.to_le_bytes());
            self.memory
                .write_slice(&descriptor, GuestAddress(at))
                .unwrap();
        }
        let slot = available + 4 + u64::from(ring.available % SIZE) * 2;
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        ring.available = ring.available.wrapping_add(1);
        self.memory
            .write_obj(ring.available, GuestAddress(available + 2))
            .unwrap();
    }

    /// Notifies the device of a queue, and lets it work.
    pub fn kick(&mut self, index: usize) {
        self.event(index as u32);
    }

    /// Notifies a live device of a queue, as a guest does.
    pub fn notify(&self, index: usize) {
        self.kicks[index].write(1).unwrap();
    }

    /// Lets it work on an event of any of its descriptors.
    pub fn event(&mut self, token: u32) {
        let device = &self.device;
        if std::env::var_os(LEFT_OUT).is_none() {
            device.lock().unwrap().handle(token, EventSet::IN);
            return;
        }
        // As in a VM: on a thread that may do nothing else.
        let worker = worker(&*device.lock().unwrap());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                confine::enter(worker);
                device.lock().unwrap().handle(token, EventSet::IN);
            });
        });
    }

    /// Lengths of the chains used since the last call.
    pub fn used(&mut self, index: usize) -> Vec<u32> {
        let (_, _, used) = addresses(index);
        let ring = &mut self.rings[index];
        let now: u16 = self.memory.read_obj(GuestAddress(used + 2)).unwrap();
        let mut lengths = Vec::new();
        while ring.seen != now {
            let slot = used + 4 + u64::from(ring.seen % SIZE) * 8;
            lengths.push(self.memory.read_obj(GuestAddress(slot + 4)).unwrap());
            ring.seen = ring.seen.wrapping_add(1);
        }
        lengths
    }

    /// What it has counted.
    pub fn metrics(&self) -> DeviceMetrics {
        self.counters.read()
    }

    /// Interrupts of a queue so far.
    pub fn interrupts(&self, index: usize) -> usize {
        self.recorder.queues[index].load(Ordering::SeqCst)
    }

    /// Whether the device gave up on its driver.
    pub fn broken(&self) -> bool {
        self.recorder.broken.load(Ordering::SeqCst)
    }
}

/// Whose work the device's is.
fn worker(device: &dyn VirtioDevice) -> Worker {
    match device.device_id().into() {
        VIRTIO_ID_FS => Worker::Files,
        _ => Worker::Devices,
    }
}

struct Nothing;

impl EventHandler for Nothing {
    fn handle(&mut self, _token: u32, _events: EventSet) {}
}

fn addresses(index: usize) -> (u64, u64, u64) {
    let base = index as u64 * QUEUE_SPACE;
    (base, base + 0x10000, base + 0x20000)
}
