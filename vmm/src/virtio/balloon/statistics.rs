// SPDX-License-Identifier: Apache-2.0
//! What the guest tells of its memory (virtio 1.2 §5.5.6.3).

use bulkhead_vmm_api::BalloonStatistics;
use vm_memory::{Bytes, GuestMemoryMmap};

use crate::virtio::chain::{segments, Broken, Chain};

/// Bytes of an entry: a tag of two, a value of eight.
const ENTRY: usize = 10;
/// Most entries read; a guest's kernel has sixteen.
const ENTRIES: usize = 64;

/// Reads a buffer of statistics. What has an unknown tag is left out.
pub fn read(memory: &GuestMemoryMmap, chain: Chain<'_>) -> Result<BalloonStatistics, Broken> {
    let (readable, _) = segments(chain);
    let mut statistics = BalloonStatistics::default();
    for segment in readable {
        let length = (segment.length as usize).min(ENTRY * ENTRIES);
        let mut bytes = vec![0_u8; length];
        memory
            .read_slice(&mut bytes, segment.address)
            .map_err(|_| Broken)?;
        for entry in bytes.chunks_exact(ENTRY) {
            let mut value = [0; 8];
            value.copy_from_slice(&entry[2..]);
            let value = Some(u64::from_le_bytes(value));
            match u16::from_le_bytes([entry[0], entry[1]]) {
                0 => statistics.swapped_in = value,
                1 => statistics.swapped_out = value,
                2 => statistics.major_faults = value,
                3 => statistics.minor_faults = value,
                4 => statistics.free = value,
                5 => statistics.total = value,
                6 => statistics.available = value,
                7 => statistics.caches = value,
                10 => statistics.oom_kills = value,
                _ => {}
            }
        }
    }
    Ok(statistics)
}
