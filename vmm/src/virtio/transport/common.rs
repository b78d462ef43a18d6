// SPDX-License-Identifier: Apache-2.0
//! The common configuration structure (virtio 1.2 §4.1.4.3).

use std::sync::atomic::Ordering;

use virtio_bindings::{virtio_config::VIRTIO_F_VERSION_1, virtio_ring::VIRTIO_RING_F_EVENT_IDX};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;

use super::{status, VirtioPci, NO_VECTOR};

/// A queue as the driver describes it.
#[derive(Debug, Clone)]
pub(super) struct QueueSetup {
    max_size: u16,
    pub size: u16,
    pub enabled: bool,
    pub descriptors: u64,
    pub driver: u64,
    pub device: u64,
    /// Where to go on in the rings: not zero only after a restore.
    pub next_available: u16,
    pub next_used: u16,
}

impl QueueSetup {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            enabled: false,
            descriptors: 0,
            driver: 0,
            device: 0,
            next_available: 0,
            next_used: 0,
        }
    }

    /// Whether the queue may have that size.
    pub fn set_size(&mut self, size: u16) -> bool {
        let possible = size.is_power_of_two() && size <= self.max_size;
        if possible {
            self.size = size;
        }
        possible
    }

    /// The queue; none when it does not lie in memory as it must.
    pub fn build(&self, memory: &GuestMemoryMmap, event_idx: bool) -> Option<Queue> {
        let mut queue = Queue::new(self.max_size).ok()?;
        queue.set_size(self.size);
        let split = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
        let (low, high) = split(self.descriptors);
        queue.set_desc_table_address(low, high);
        let (low, high) = split(self.driver);
        queue.set_avail_ring_address(low, high);
        let (low, high) = split(self.device);
        queue.set_used_ring_address(low, high);
        queue.set_event_idx(event_idx);
        queue.set_next_avail(self.next_available);
        queue.set_next_used(self.next_used);
        queue.set_ready(true);
        queue.is_valid(memory).then_some(queue)
    }
}

/// Registers that set something up: all but the device's status, which is
/// between them. What is behind them does not exist.
pub(super) const SET_UP: [(u64, u64); 2] = [(0x00, 0x14), (0x16, 0x38)];

/// The registers' state.
#[derive(Debug)]
pub(super) struct Registers {
    pub status: u8,
    features: u64,
    pub feature_select: u32,
    pub driver_feature_select: u32,
    pub driver_features: u64,
    pub queue_select: u16,
    pub queues: Vec<QueueSetup>,
}

impl Registers {
    pub fn new(features: u64, sizes: &[u16]) -> Self {
        Self {
            status: 0,
            features,
            feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: sizes.iter().map(|size| QueueSetup::new(*size)).collect(),
        }
    }

    /// Changes what is offered, before a driver has looked.
    pub fn offer(&mut self, features: u64) {
        self.features = features;
    }

    pub fn reset(&mut self) {
        let sizes: Vec<_> = self.queues.iter().map(|queue| queue.max_size).collect();
        *self = Self::new(self.features, &sizes);
    }

    /// Only what was offered, and VERSION_1: there is no legacy interface.
    pub fn features_acceptable(&self) -> bool {
        self.driver_features & !self.features == 0
            && self.driver_features & (1 << VIRTIO_F_VERSION_1) != 0
    }

    pub fn event_idx(&self) -> bool {
        self.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0
    }

    fn selected(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// The selected queue while the driver may still change it.
    fn changeable(&mut self) -> Option<&mut QueueSetup> {
        if self.status & status::DRIVER_OK != 0 {
            return None;
        }
        self.queues
            .get_mut(usize::from(self.queue_select))
            .filter(|queue| !queue.enabled)
    }
}

impl VirtioPci {
    pub(super) fn read_common(&self, offset: u64, data: &mut [u8]) {
        let registers = self.registers();
        if self.is_gone() {
            data.fill(0xff);
            return;
        }
        let lines = &self.lines;
        let vector = |index: usize| {
            lines
                .vectors
                .get(index)
                .map_or(NO_VECTOR, |vector| vector.load(Ordering::Relaxed))
        };
        let queue = registers.selected();
        let word = |address: Option<u64>, high: bool| {
            let address = address.unwrap_or(0);
            (if high {
                address >> 32
            } else {
                address & 0xffff_ffff
            }) as u32
        };
        let value: u32 = match offset {
            0x00 => registers.feature_select,
            0x04 => match registers.feature_select {
                0 => registers.features as u32,
                1 => (registers.features >> 32) as u32,
                _ => 0,
            },
            0x08 => registers.driver_feature_select,
            0x0c => match registers.driver_feature_select {
                0 => registers.driver_features as u32,
                1 => (registers.driver_features >> 32) as u32,
                _ => 0,
            },
            0x10 => u32::from(vector(registers.queues.len())),
            0x12 => registers.queues.len() as u32,
            0x14 => u32::from(self.status(&registers)),
            0x15 => u32::from(lines.generation()),
            0x16 => u32::from(registers.queue_select),
            0x18 => queue.map_or(0, |queue| u32::from(queue.size)),
            0x1a => match queue {
                Some(_) => u32::from(vector(usize::from(registers.queue_select))),
                None => u32::from(NO_VECTOR),
            },
            0x1c => queue.map_or(0, |queue| u32::from(queue.enabled)),
            0x1e => u32::from(registers.queue_select),
            0x20 => word(queue.map(|queue| queue.descriptors), false),
            0x24 => word(queue.map(|queue| queue.descriptors), true),
            0x28 => word(queue.map(|queue| queue.driver), false),
            0x2c => word(queue.map(|queue| queue.driver), true),
            0x30 => word(queue.map(|queue| queue.device), false),
            0x34 => word(queue.map(|queue| queue.device), true),
            _ => 0,
        };
        let bytes = value.to_le_bytes();
        let length = data.len().min(bytes.len());
        data[..length].copy_from_slice(&bytes[..length]);
    }

    pub(super) fn write_common(&self, offset: u64, data: &[u8]) {
        // A 64-bit register may be written in one go.
        if let (Ok(bytes), 0x20 | 0x28 | 0x30) = (<[u8; 8]>::try_from(data), offset) {
            self.write_common(offset, &bytes[..4]);
            self.write_common(offset + 4, &bytes[4..]);
            return;
        }
        let mut bytes = [0; 4];
        if data.is_empty() || data.len() > bytes.len() {
            return;
        }
        bytes[..data.len()].copy_from_slice(data);
        let value = u32::from_le_bytes(bytes);
        let mut registers = self.registers();
        if self.is_gone() {
            return;
        }
        let low = |old: u64| (old & !0xffff_ffff) | u64::from(value);
        let high = |old: u64| (old & 0xffff_ffff) | (u64::from(value) << 32);
        match offset {
            0x00 => registers.feature_select = value,
            0x08 => registers.driver_feature_select = value,
            // Settled once the device accepted them.
            0x0c if registers.status & status::FEATURES_OK == 0 => {
                match registers.driver_feature_select {
                    0 => registers.driver_features = low(registers.driver_features),
                    1 => registers.driver_features = high(registers.driver_features),
                    _ => {}
                }
            }
            0x10 => {
                let vector = self.checked_vector(value as u16);
                self.lines.vectors[registers.queues.len()].store(vector, Ordering::Relaxed);
            }
            0x14 => self.write_status(&mut registers, value as u8),
            0x16 => registers.queue_select = value as u16,
            0x18 => {
                if let Some(queue) = registers.changeable() {
                    // What it cannot have, it does not get.
                    let _ = queue.set_size(value as u16);
                }
            }
            0x1a => {
                let index = usize::from(registers.queue_select);
                if index < registers.queues.len() {
                    let vector = self.checked_vector(value as u16);
                    self.lines.vectors[index].store(vector, Ordering::Relaxed);
                }
            }
            0x1c => {
                if let (Some(queue), 1) = (registers.changeable(), value as u16) {
                    queue.enabled = true;
                }
            }
            0x20..=0x37 => {
                if let Some(queue) = registers.changeable() {
                    match offset {
                        0x20 => queue.descriptors = low(queue.descriptors),
                        0x24 => queue.descriptors = high(queue.descriptors),
                        0x28 => queue.driver = low(queue.driver),
                        0x2c => queue.driver = high(queue.driver),
                        0x30 => queue.device = low(queue.device),
                        0x34 => queue.device = high(queue.device),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
}
