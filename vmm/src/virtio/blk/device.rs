// SPDX-License-Identifier: Apache-2.0
//! The device towards the transport.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
};

use bulkhead_vmm_api::BlkConfig;
use virtio_bindings::{
    virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_ID_BYTES},
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ids::VIRTIO_ID_BLOCK,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};

use crate::virtio::{
    chain::Queues,
    device::{read_bytes, Activation, DeviceError, StateError, VirtioDevice},
};

/// Bytes per sector, whatever the file's own block size.
pub(super) const SECTOR: u64 = 512;
/// Size of the queue; a request may have all but two of its descriptors.
const QUEUE: u16 = 256;

/// A disk.
pub struct Blk {
    name: String,
    pub(super) config: [u8; 24],
    features: u64,
    pub(super) disk: Disk,
    /// The guest knows of another capacity.
    pub(super) resized: bool,
    pub(super) active: Option<Queues>,
}

/// The disk behind the device.
pub(super) struct Disk {
    pub file: File,
    pub sectors: u64,
    pub read_only: bool,
    pub serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
}

impl Blk {
    /// A disk on `file`.
    pub fn new(config: &BlkConfig, mut file: File) -> io::Result<Self> {
        let sectors = file.seek(SeekFrom::End(0))? / SECTOR;
        let mut serial = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (to, from) in serial.iter_mut().zip(config.id.bytes()) {
            *to = from;
        }
        let mut features = (1 << VIRTIO_F_VERSION_1)
            | (1 << VIRTIO_RING_F_EVENT_IDX)
            | (1 << VIRTIO_RING_F_INDIRECT_DESC)
            | (1 << VIRTIO_BLK_F_FLUSH)
            | (1 << VIRTIO_BLK_F_SEG_MAX);
        if config.read_only {
            features |= 1 << VIRTIO_BLK_F_RO;
        }
        // capacity, size_max, seg_max, geometry.
        let mut space = [0; 24];
        space[..8].copy_from_slice(&sectors.to_le_bytes());
        space[12..16].copy_from_slice(&u32::from(QUEUE - 2).to_le_bytes());
        Ok(Self {
            name: config.id.clone(),
            config: space,
            features,
            disk: Disk {
                file,
                sectors,
                read_only: config.read_only,
                serial,
            },
            resized: false,
            active: None,
        })
    }
}

impl VirtioDevice for Blk {
    fn device_id(&self) -> u16 {
        VIRTIO_ID_BLOCK as u16
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE]
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config, offset, data);
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

    fn announce(&mut self) {
        self.announce_capacity();
    }
}
