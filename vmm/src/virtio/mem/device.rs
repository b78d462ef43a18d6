// SPDX-License-Identifier: Apache-2.0
//! The device towards the transport and the machine's owner.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1, virtio_ids::VIRTIO_ID_MEM,
    virtio_ring::VIRTIO_RING_F_EVENT_IDX,
};

use super::blocks::Blocks;
use crate::virtio::{
    chain::Queues,
    device::{read_bytes, Activation, DeviceError, StateError, VirtioDevice},
};

/// What the guest takes and gives back, in bytes: a huge page's.
pub const BLOCK: u64 = 2 << 20;
/// The least part of the region that exists as a whole, in bytes: what Linux
/// adds to itself at once.
pub const SLOT: u64 = 128 << 20;
/// Most parts, for each takes one of KVM's memory slots.
const SLOTS: u64 = 16;
/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE: the driver must not touch what is not
/// plugged, not even to read it.
const UNPLUGGED_INACCESSIBLE: u64 = 1;

/// Where the region lies, and what of it exists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// Guest-physical address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// The parts that exist, by their numbers, ascending.
    pub mapped: Vec<u32>,
}

impl Layout {
    /// Of a region of which nothing exists.
    pub fn new(base: u64, size: u64) -> Self {
        Self {
            base,
            size,
            mapped: Vec::new(),
        }
    }

    /// Bytes of a part: as small as they can be for there to be few.
    pub fn slot_size(&self) -> u64 {
        let least = self.size.div_ceil(SLOTS).max(SLOT);
        least.checked_next_power_of_two().unwrap_or(least)
    }

    /// A part's range of guest-physical addresses, which ends with the region.
    pub fn slot(&self, index: u32) -> Range<u64> {
        let start = u64::from(index) * self.slot_size();
        let end = (start + self.slot_size()).min(self.size);
        self.base + start..self.base + end
    }

    /// How many parts cover so many bytes from the start on.
    pub fn slots_for(&self, size: u64) -> u32 {
        // Sixteen at most.
        size.div_ceil(self.slot_size()) as u32
    }

    /// Bytes that exist.
    pub fn mapped_size(&self) -> u64 {
        let sizes = self.mapped.iter().map(|index| {
            let range = self.slot(*index);
            range.end - range.start
        });
        sizes.sum()
    }

    /// Whether a layout that somebody wrote down can be one of this VMM's.
    pub fn is_sound(&self) -> bool {
        let whole = self.size > 0 && self.size % SLOT == 0 && self.base % SLOT == 0;
        let ends = self.base.checked_add(self.size).is_some();
        let ascending = self.mapped.windows(2).all(|pair| pair[0] < pair[1]);
        let last = self.mapped.last();
        whole && ends && ascending && last.is_none_or(|last| *last < self.slots_for(self.size))
    }
}

/// The device.
pub struct Mem {
    pub(super) layout: Layout,
    pub(super) blocks: Blocks,
    /// Bytes from the start of the region in which the driver may plug.
    pub(super) usable: u64,
    /// Bytes that the driver is asked to have plugged.
    pub(super) requested: u64,
    pub(super) active: Option<Queues>,
}

impl Mem {
    /// A device with that region, of which nothing is plugged.
    pub fn new(layout: Layout) -> Self {
        Self {
            blocks: Blocks::new((layout.size / BLOCK) as usize),
            layout,
            usable: 0,
            requested: 0,
            active: None,
        }
    }

    /// The region.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The region's layout in a saved state.
    pub fn layout_in(state: &[u8]) -> Option<Layout> {
        let (layout, _) = postcard::take_from_bytes::<Layout>(state).ok()?;
        layout.is_sound().then_some(layout)
    }

    /// Bytes that the driver is asked to have plugged.
    pub fn requested(&self) -> u64 {
        self.requested
    }

    /// Bytes that it has plugged.
    pub fn plugged(&self) -> u64 {
        self.blocks.plugged() as u64 * BLOCK
    }

    /// Whether something of a part is plugged.
    pub fn uses(&self, slot: u32) -> bool {
        let range = self.layout.slot(slot);
        let index = |address: u64| ((address - self.layout.base) / BLOCK) as usize;
        let blocks = index(range.start)..index(range.end);
        self.blocks.plugged_in(blocks) > 0
    }

    /// Says which parts exist now.
    pub fn set_mapped(&mut self, mapped: Vec<u32>) {
        self.layout.mapped = mapped;
        // The parts are mapped from the first one on, and taken away from the
        // last one on; what is between exists.
        let end = self
            .layout
            .mapped
            .last()
            .map_or(self.layout.base, |last| self.layout.slot(*last).end);
        self.usable = end - self.layout.base;
    }

    /// Asks the driver to have so many bytes plugged, whole blocks, in the parts
    /// that exist.
    pub fn request(&mut self, bytes: u64) {
        self.requested = bytes.min(self.usable) / BLOCK * BLOCK;
        if let Some(queues) = &self.active {
            queues.interrupt.show_config(&self.config());
            queues.interrupt.signal_config();
        }
    }

    /// The blocks of a range that the driver names: whole ones, and all in the
    /// part of the region that it may use.
    pub(super) fn range(&self, address: u64, count: u16) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.layout.base)?;
        let end = offset.checked_add(u64::from(count) * BLOCK)?;
        let fits = count > 0 && offset % BLOCK == 0 && end <= self.usable;
        let start = (offset / BLOCK) as usize;
        fits.then_some(start..start + usize::from(count))
    }

    /// Where blocks lie.
    pub(super) fn addresses(&self, blocks: &Range<usize>) -> Range<u64> {
        let address = |index: usize| self.layout.base + index as u64 * BLOCK;
        address(blocks.start)..address(blocks.end)
    }

    pub(super) fn config(&self) -> [u8; 56] {
        let mut config = [0; 56];
        // block_size, node_id and padding, addr, region_size,
        // usable_region_size, plugged_size, requested_size.
        let fields = [
            BLOCK,
            0,
            self.layout.base,
            self.layout.size,
            self.usable,
            self.plugged(),
            self.requested,
        ];
        for (at, field) in config.chunks_exact_mut(8).zip(fields) {
            at.copy_from_slice(&field.to_le_bytes());
        }
        config
    }
}

impl VirtioDevice for Mem {
    fn device_id(&self) -> u16 {
        VIRTIO_ID_MEM as u16
    }

    fn name(&self) -> &str {
        "mem"
    }

    fn queue_sizes(&self) -> &[u16] {
        // The driver has one request at a time.
        &[16]
    }

    fn features(&self) -> u64 {
        (1 << VIRTIO_F_VERSION_1) | (1 << VIRTIO_RING_F_EVENT_IDX) | (1 << UNPLUGGED_INACCESSIBLE)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.active = Some(Queues::new(activation, 1)?);
        Ok(())
    }

    /// What is plugged stays (virtio 1.2 §5.15.6).
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
