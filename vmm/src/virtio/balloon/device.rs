// SPDX-License-Identifier: Apache-2.0
//! The device towards the transport and the VM's owner.

use bulkhead_vmm_api::{BalloonConfig, BalloonStatistics, BalloonStatus};
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1, virtio_ids::VIRTIO_ID_BALLOON,
    virtio_ring::VIRTIO_RING_F_EVENT_IDX,
};
use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;

use crate::virtio::{
    chain::Queues,
    device::{read_bytes, Activation, DeviceError, StateError, VirtioDevice},
};

/// Feature bits (virtio 1.2 §5.5.3).
pub(super) mod feature {
    pub const STATS_VQ: u64 = 1;
    pub const DEFLATE_ON_OOM: u64 = 2;
    pub const PAGE_POISON: u64 = 4;
    pub const PAGE_REPORTING: u64 = 5;
}

/// Queue indices (virtio 1.2 §5.5.2). A driver numbers those that come after
/// without a gap: the reporting queue is the statistics queue's successor, or
/// takes its place.
pub(super) mod queue {
    pub const INFLATE: usize = 0;
    pub const DEFLATE: usize = 1;
    pub const STATS: usize = 2;
}

/// Pages are of 4 KiB, whatever the guest's are.
pub(super) const PAGE: u64 = 4096;
const PAGES_PER_MIB: u32 = 256;
/// Offset of `actual`, which the driver writes, in the configuration.
const ACTUAL: u64 = 4;
/// Offset of `poison_val`.
const POISON: u64 = 12;

/// The balloon.
pub struct Balloon {
    features: u64,
    /// Pages it should have.
    pub(super) target: u32,
    /// Pages that the driver says it has.
    pub(super) actual: u32,
    /// What the guest fills free pages with.
    pub(super) poison: u32,
    /// The buffer that brought the last statistics: giving it back asks for
    /// new ones.
    pub(super) held: Option<u16>,
    pub(super) statistics: Option<BalloonStatistics>,
    /// Bytes given back to the host so far.
    pub(super) returned: u64,
    pub(super) active: Option<Queues>,
}

impl Balloon {
    /// An empty balloon.
    pub fn new(config: &BalloonConfig) -> Self {
        // Poisoning is spoken of so that a guest that clears what it frees
        // reports it too.
        let mut features = (1 << VIRTIO_F_VERSION_1)
            | (1 << VIRTIO_RING_F_EVENT_IDX)
            | (1 << feature::STATS_VQ)
            | (1 << feature::PAGE_POISON);
        if config.deflate_on_oom {
            features |= 1 << feature::DEFLATE_ON_OOM;
        }
        if config.free_page_reporting {
            features |= 1 << feature::PAGE_REPORTING;
        }
        Self {
            features,
            target: 0,
            actual: 0,
            poison: 0,
            held: None,
            statistics: None,
            returned: 0,
            active: None,
        }
    }

    /// Asks the guest to give `mib` MiB; it takes its time, and may not.
    pub fn set_target(&mut self, mib: u32) {
        self.target = mib.saturating_mul(PAGES_PER_MIB);
        if let Some(queues) = &self.active {
            queues.interrupt.show_config(&self.config());
            queues.interrupt.signal_config();
        }
    }

    /// How it stands, with what the guest last told; asks it for new
    /// statistics.
    pub fn status(&mut self) -> BalloonStatus {
        self.ask_for_statistics();
        BalloonStatus {
            target_mib: self.target / PAGES_PER_MIB,
            actual_mib: self.actual / PAGES_PER_MIB,
            returned: self.returned,
            statistics: self.statistics,
        }
    }

    fn ask_for_statistics(&mut self) {
        let Some(queues) = &mut self.active else {
            return;
        };
        let Some(head) = self.held.take() else {
            return;
        };
        let memory = queues.memory.memory();
        let Some(stats) = queues.get(queue::STATS) else {
            return;
        };
        match stats.add_used(&*memory, head, 0) {
            Ok(()) => queues.signal(queue::STATS),
            Err(_) => queues.break_device(),
        }
    }

    fn config(&self) -> [u8; 16] {
        let mut config = [0; 16];
        config[..4].copy_from_slice(&self.target.to_le_bytes());
        config[4..8].copy_from_slice(&self.actual.to_le_bytes());
        config[12..].copy_from_slice(&self.poison.to_le_bytes());
        config
    }
}

impl VirtioDevice for Balloon {
    fn device_id(&self) -> u16 {
        VIRTIO_ID_BALLOON as u16
    }

    fn name(&self) -> &str {
        "balloon"
    }

    fn queue_sizes(&self) -> &[u16] {
        // The driver has one buffer at a time in the first three, and 32
        // ranges in one of the last.
        &[16, 16, 16, 32]
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return;
        };
        match offset {
            ACTUAL => self.actual = u32::from_le_bytes(bytes),
            POISON => self.poison = u32::from_le_bytes(bytes),
            _ => {}
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.active = Some(Queues::new(activation, queue::DEFLATE + 1)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
        self.held = None;
        self.actual = 0;
        self.poison = 0;
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
