// SPDX-License-Identifier: Apache-2.0
//! The device towards the transport.

use std::fs::File;

use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1, virtio_ids::VIRTIO_ID_PMEM,
    virtio_ring::VIRTIO_RING_F_EVENT_IDX,
};

use crate::virtio::{
    chain::Queues,
    device::{Activation, DeviceError, StateError, VirtioDevice},
};

/// Persistent memory. The builder maps the file at the address it tells.
pub struct Pmem {
    name: String,
    /// `struct virtio_pmem_config`: start and size.
    pub(super) config: [u8; 16],
    /// The file to flush; none when the guest cannot write.
    pub(super) flush: Option<File>,
    pub(super) active: Option<Queues>,
}

impl Pmem {
    /// A device whose window lies at `address`.
    pub fn new(id: &str, address: u64, size: u64, flush: Option<File>) -> Self {
        let mut config = [0; 16];
        config[..8].copy_from_slice(&address.to_le_bytes());
        config[8..].copy_from_slice(&size.to_le_bytes());
        Self {
            name: id.to_owned(),
            config,
            flush,
            active: None,
        }
    }
}

impl VirtioDevice for Pmem {
    fn device_id(&self) -> u16 {
        VIRTIO_ID_PMEM as u16
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn features(&self) -> u64 {
        (1 << VIRTIO_F_VERSION_1) | (1 << VIRTIO_RING_F_EVENT_IDX)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::virtio::device::read_bytes(&self.config, offset, data);
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
