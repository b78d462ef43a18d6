// SPDX-License-Identifier: Apache-2.0
//! A function's state: registers, configuration space, interrupts, and how
//! far its queues have been worked.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::{status, VirtioPci};
use crate::{
    pci::msix::MsixState,
    virtio::device::{DeviceError, StateError},
};

/// One queue.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct QueueState {
    size: u16,
    enabled: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
    vector: u16,
    next_available: u16,
    next_used: u16,
}

/// All of a function, with the device behind it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FunctionState {
    /// Virtio device id.
    pub id: u16,
    config_space: Vec<u8>,
    msix: MsixState,
    status: u8,
    broken: bool,
    generation: u8,
    config_vector: u16,
    feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Vec<QueueState>,
    device: Vec<u8>,
}

impl FunctionState {
    /// What the device itself saved.
    pub fn device(&self) -> &[u8] {
        &self.device
    }
}

impl VirtioPci {
    /// Reads all of it, while vCPUs and loops rest.
    pub fn save(&self) -> Result<FunctionState, StateError> {
        let registers = self.registers();
        let mut device = self.device();
        let own = device.save()?;
        let positions: Vec<_> = device
            .queues()
            .map(|queues| queues.positions().collect())
            .unwrap_or_default();
        let queues = registers.queues.iter().enumerate().map(|(index, queue)| {
            let found = positions.iter().find(|(at, ..)| *at == index);
            let (next_available, next_used) = found.map_or((0, 0), |(_, a, u)| (*a, *u));
            QueueState {
                size: queue.size,
                enabled: queue.enabled,
                descriptors: queue.descriptors,
                driver: queue.driver,
                device: queue.device,
                vector: self.lines.vectors[index].load(Ordering::Relaxed),
                next_available,
                next_used,
            }
        });
        Ok(FunctionState {
            id: device.device_id(),
            config_space: self.config().bytes().to_vec(),
            msix: self.lines.msix.save(),
            status: registers.status,
            broken: self.lines.broken.load(Ordering::SeqCst),
            generation: self.lines.generation.load(Ordering::SeqCst),
            config_vector: self.lines.vectors[registers.queues.len()].load(Ordering::Relaxed),
            feature_select: registers.feature_select,
            driver_feature_select: registers.driver_feature_select,
            driver_features: registers.driver_features,
            queue_select: registers.queue_select,
            queues: queues.collect(),
            device: own,
        })
    }

    /// Makes a new function what the saved one was, and its device active if
    /// that was. Loops rest; interrupt controllers are restored already.
    pub fn restore(&self, state: &FunctionState) -> Result<(), StateError> {
        let mut registers = self.registers();
        let features = {
            let mut device = self.device();
            if state.id != device.device_id() {
                return Err(StateError::Unfit(format!(
                    "the snapshot has virtio device {} here, not {}",
                    state.id,
                    device.device_id()
                )));
            }
            device.restore(&state.device)?;
            device.features()
        };
        if state.queues.len() != registers.queues.len() {
            return Err(StateError::Unfit(format!(
                "{} queues, and {} in the snapshot",
                registers.queues.len(),
                state.queues.len()
            )));
        }
        registers.offer(features);
        registers.status = state.status;
        registers.feature_select = state.feature_select;
        registers.driver_feature_select = state.driver_feature_select;
        registers.driver_features = state.driver_features;
        registers.queue_select = state.queue_select;
        let settled = state.status & status::FEATURES_OK != 0;
        if settled && !registers.features_acceptable() {
            return Err(StateError::Unfit(format!(
                "the guest uses features {:#x}, of which only {features:#x} are there now",
                state.driver_features
            )));
        }
        for (index, saved) in state.queues.iter().enumerate() {
            let queue = &mut registers.queues[index];
            if !queue.set_size(saved.size) {
                return Err(StateError::Unfit(format!(
                    "queue {index} cannot have size {}",
                    saved.size
                )));
            }
            queue.enabled = saved.enabled;
            queue.descriptors = saved.descriptors;
            queue.driver = saved.driver;
            queue.device = saved.device;
            queue.next_available = saved.next_available;
            queue.next_used = saved.next_used;
            let vector = self.checked_vector(saved.vector);
            self.lines.vectors[index].store(vector, Ordering::Relaxed);
        }
        let vector = self.checked_vector(state.config_vector);
        self.lines.vectors[state.queues.len()].store(vector, Ordering::Relaxed);
        let lines = &self.lines;
        lines.broken.store(state.broken, Ordering::SeqCst);
        self.config().restore(&state.config_space);
        self.show_config(&*self.device());
        lines.generation.store(state.generation, Ordering::SeqCst);
        if !lines.msix.restore(&state.msix) {
            return Err(StateError::Unfit(format!(
                "{} interrupt vectors in the snapshot",
                state.msix.count()
            )));
        }
        if state.status & status::DRIVER_OK == 0 || state.broken {
            return Ok(());
        }
        self.activate(&registers, true);
        if lines.broken.load(Ordering::SeqCst) {
            return Err(StateError::Activate(DeviceError::BadQueue(0)));
        }
        self.device().announce();
        // One that was on its way may have been lost; one too many does no
        // harm.
        let event_idx = registers.event_idx();
        for queue in &state.queues {
            if queue.enabled && !(event_idx && self.has_seen_all(queue)) {
                lines.msix.signal(queue.vector);
            }
        }
        Ok(())
    }

    /// Whether the driver says that it has seen all of a queue that was used: it
    /// wants to hear of the next (virtio 1.2 §2.7.7.1).
    fn has_seen_all(&self, queue: &QueueState) -> bool {
        // After two words and the ring itself.
        let at = queue.driver.checked_add(4 + 2 * u64::from(queue.size));
        let wanted = at.and_then(|at| {
            let memory = self.memory.memory();
            memory.read_obj::<u16>(GuestAddress(at)).ok()
        });
        wanted.is_some_and(|wanted| u16::from_le(wanted) == queue.next_used)
    }
}
