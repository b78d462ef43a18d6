// SPDX-License-Identifier: Apache-2.0
//! Where windows are: guest-physical addresses above all memory.

use std::collections::BTreeMap;

use super::ranges;
use crate::arch::x86_64::layout;

/// Hands out guest-physical windows above all memory (virtio-pmem).
#[derive(Debug)]
pub struct WindowAllocator {
    base: u64,
    /// Start and size of what is taken.
    taken: BTreeMap<u64, u64>,
}

impl WindowAllocator {
    /// Where windows end: what 46 bits of physical address reach.
    const END: u64 = 1 << 46;

    /// For a guest with `memory_size` bytes of memory.
    pub fn new(memory_size: u64) -> Self {
        let end = ranges(memory_size)
            .last()
            .map_or(layout::HIGH_RAM, |(base, length)| base + length)
            .max(layout::HIGH_RAM);
        Self {
            base: end.next_multiple_of(1 << 30),
            taken: BTreeMap::new(),
        }
    }

    /// Reserves `size` bytes at the lowest place for them; the guest-physical
    /// address, or none when there is no such place.
    pub fn reserve(&mut self, size: u64) -> Option<u64> {
        self.reserve_aligned(size, layout::WINDOW_ALIGN)
    }

    /// As [`Self::reserve`], at a multiple of `align`, which is one of windows'
    /// alignment.
    pub fn reserve_aligned(&mut self, size: u64, align: u64) -> Option<u64> {
        let mut at = self.base.checked_next_multiple_of(align)?;
        for (start, taken) in &self.taken {
            if start.checked_sub(at).is_some_and(|room| room >= size) {
                break;
            }
            at = at.max((start + taken).checked_next_multiple_of(align)?);
        }
        self.reserve_at(at, size).then_some(at)
    }

    /// Reserves a place of which the guest knows already; false when it cannot
    /// be had.
    pub fn reserve_at(&mut self, at: u64, size: u64) -> bool {
        let Some(end) = at.checked_add(size).filter(|end| *end <= Self::END) else {
            return false;
        };
        let below = self.taken.range(..end).next_back();
        let free = below.is_none_or(|(start, taken)| start + taken <= at);
        let fits = size > 0 && at >= self.base && at % layout::WINDOW_ALIGN == 0;
        if fits && free {
            self.taken.insert(at, size);
        }
        fits && free
    }

    /// Takes one back.
    pub fn release(&mut self, at: u64) {
        self.taken.remove(&at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_lie_above_memory() {
        let mut windows = WindowAllocator::new(5 << 30);
        let first = windows.reserve(3 << 20);
        assert_eq!(first, Some(6 << 30));
        assert_eq!(windows.reserve(1), first.map(|at| at + (4 << 20)));
        assert_eq!(WindowAllocator::new(1 << 20).reserve(1), Some(4 << 30));
    }

    #[test]
    fn a_window_has_its_place_or_none() {
        let mut windows = WindowAllocator::new(1 << 20);
        let base = 4 << 30;
        assert!(!windows.reserve_at(base - (2 << 20), 2 << 20));
        assert!(!windows.reserve_at(base + 4096, 2 << 20));
        assert!(!windows.reserve_at(base, 0));
        assert!(!windows.reserve_at(1 << 46, 1));
        assert!(!windows.reserve_at(u64::MAX << 21, 4 << 20));
        assert!(windows.reserve_at(base + (4 << 20), 2 << 20));
        assert!(!windows.reserve_at(base + (2 << 20), 4 << 20));
        assert_eq!(windows.reserve(4 << 20), Some(base));
        assert_eq!(windows.reserve(4 << 20), Some(base + (6 << 20)));
        assert_eq!(windows.reserve(u64::MAX), None);
        let mut windows = WindowAllocator::new(1 << 20);
        assert_eq!(windows.reserve(2 << 20), Some(base));
        let aligned = windows.reserve_aligned(1 << 30, 128 << 20);
        assert_eq!(aligned, Some(base + (128 << 20)));
        // Between the two.
        assert_eq!(windows.reserve(4 << 20), Some(base + (2 << 20)));
        assert_eq!(
            windows.reserve_aligned(4 << 20, 1 << 30),
            Some(base + (2 << 30))
        );
    }

    proptest::proptest! {
        /// Whatever comes and goes, no two windows overlap.
        #[test]
        fn windows_never_overlap(steps in proptest::collection::vec((0_u64..64 << 20, 0..4_usize), 1..80)) {
            let mut windows = WindowAllocator::new(1 << 20);
            let mut there: Vec<(u64, u64)> = Vec::new();
            for (size, step) in steps {
                if step == 0 && !there.is_empty() {
                    let (at, _) = there.remove(size as usize % there.len());
                    windows.release(at);
                } else if let Some(at) = windows.reserve(size) {
                    proptest::prop_assert!(at >= 4 << 30 && at % layout::WINDOW_ALIGN == 0);
                    for (other, length) in &there {
                        proptest::prop_assert!(at + size <= *other || other + length <= at);
                    }
                    there.push((at, size));
                } else {
                    proptest::prop_assert_eq!(size, 0);
                }
            }
        }
    }
}
