// SPDX-License-Identifier: Apache-2.0
//! Which bytes of a file are locked, as the host's kernel keeps it: parts that do
//! not overlap, and neighbours of a kind together.

use std::collections::BTreeMap;

/// Parts by their first bytes, with their last ones, and whether nobody else may
/// have them at all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ranges(BTreeMap<u64, (u64, bool)>);

impl Ranges {
    /// How many parts there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nothing is locked.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Locks the bytes from `start` to `end`, both of them, whatever they were; or
    /// unlocks them.
    pub fn set(&mut self, start: u64, end: u64, exclusive: Option<bool>) {
        let before = self.0.range(..=end).rev();
        let overlapping: Vec<(u64, u64, bool)> = before
            .map(|(first, (last, kind))| (*first, *last, *kind))
            .take_while(|(_, last, _)| *last >= start)
            .collect();
        for (first, last, kind) in overlapping {
            self.0.remove(&first);
            if first < start {
                self.0.insert(first, (start - 1, kind));
            }
            if last > end {
                self.0.insert(end + 1, (last, kind));
            }
        }
        let Some(kind) = exclusive else { return };
        let (mut first, mut last) = (start, end);
        let left = self.0.range(..start).next_back();
        if let Some((at, (until, other))) = left.map(|(at, part)| (*at, *part)) {
            if other == kind && until + 1 == start {
                first = at;
            }
        }
        let right = end.checked_add(1).and_then(|next| self.0.get(&next));
        if let Some((until, other)) = right.copied() {
            if other == kind {
                self.0.remove(&(end + 1));
                last = until;
            }
        }
        self.0.insert(first, (last, kind));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn parts_are_cut_and_joined() {
        let mut ranges = Ranges::default();
        ranges.set(0, 9, Some(false));
        ranges.set(20, u64::MAX, Some(false));
        assert_eq!(ranges.len(), 2);
        ranges.set(10, 19, Some(false));
        assert_eq!(ranges.len(), 1);
        ranges.set(5, 6, Some(true));
        assert_eq!(ranges.len(), 3);
        ranges.set(5, 6, None);
        assert_eq!(ranges.len(), 2);
        ranges.set(0, u64::MAX, Some(true));
        assert_eq!(ranges.len(), 1);
        ranges.set(0, u64::MAX, None);
        assert!(ranges.is_empty());
    }

    proptest! {
        /// What is said of each byte is what was said of it last, in as few parts
        /// as can be.
        #[test]
        fn bytes_are_as_they_were_locked_last(
            steps in prop::collection::vec((0_u64..64, 0_u64..64, prop::option::of(any::<bool>())), 0..60),
        ) {
            let mut ranges = Ranges::default();
            let mut bytes = [None; 64];
            for (a, b, kind) in steps {
                let (start, end) = (a.min(b), a.max(b));
                ranges.set(start, end, kind);
                bytes[start as usize..=end as usize].fill(kind);
                let mut found = [None; 64];
                for (first, (last, kind)) in &ranges.0 {
                    prop_assert!(first <= last);
                    for byte in &mut found[*first as usize..=*last as usize] {
                        prop_assert_eq!(byte.replace(*kind), None);
                    }
                }
                prop_assert_eq!(found, bytes);
                let mut runs: Vec<Option<bool>> = bytes.to_vec();
                runs.dedup();
                prop_assert_eq!(ranges.len(), runs.iter().flatten().count());
            }
        }
    }
}
