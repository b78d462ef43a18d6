// SPDX-License-Identifier: Apache-2.0
//! The device towards the transport.

use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1, virtio_ids::VIRTIO_ID_RNG,
    virtio_ring::VIRTIO_RING_F_EVENT_IDX,
};

use crate::virtio::{
    chain::Queues,
    device::{Activation, DeviceError, StateError, VirtioDevice},
};

/// The entropy device.
#[derive(Default)]
pub struct Rng {
    pub(super) active: Option<Queues>,
}

impl Rng {
    /// A new device.
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Rng {
    fn device_id(&self) -> u16 {
        VIRTIO_ID_RNG as u16
    }

    fn name(&self) -> &str {
        "rng"
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn features(&self) -> u64 {
        (1 << VIRTIO_F_VERSION_1) | (1 << VIRTIO_RING_F_EVENT_IDX)
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.active = Some(Queues::new(activation, 1)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn queues(&self) -> Option<&Queues> {
        self.active.as_ref()
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        self.save_state()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        self.restore_state(state)
    }
}
