// SPDX-License-Identifier: Apache-2.0
//! Which blocks are plugged.

use std::ops::Range;

/// A set of blocks, numbered from 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocks {
    words: Vec<u64>,
    count: usize,
    plugged: usize,
}

impl Blocks {
    /// `count` blocks, none of them plugged.
    pub fn new(count: usize) -> Self {
        Self {
            words: vec![0; count.div_ceil(64)],
            count,
            plugged: 0,
        }
    }

    /// As [`Self::words`] gave them; none when those are of another number of
    /// blocks.
    pub fn from_words(count: usize, words: Vec<u64>) -> Option<Self> {
        let beyond = match (count % 64, words.last()) {
            (0, _) | (_, None) => 0,
            (used, Some(last)) => last >> used,
        };
        (words.len() == count.div_ceil(64) && beyond == 0).then(|| {
            let plugged = words.iter().map(|word| word.count_ones() as usize).sum();
            Self {
                words,
                count,
                plugged,
            }
        })
    }

    /// A bit a block, the lowest first.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.count
    }

    /// How many are plugged.
    pub fn plugged(&self) -> usize {
        self.plugged
    }

    /// How many of a range are plugged; what lies beyond the last block is not.
    pub fn plugged_in(&self, range: Range<usize>) -> usize {
        let end = range.end.min(self.count);
        let mut at = range.start;
        let mut found = 0;
        while at < end {
            let upto = ((at / 64 + 1) * 64).min(end);
            found += (self.words[at / 64] & mask(at % 64, upto - at)).count_ones() as usize;
            at = upto;
        }
        found
    }

    /// Plugs a range of blocks that exist, or unplugs it.
    pub fn set(&mut self, range: Range<usize>, plugged: bool) {
        let end = range.end.min(self.count);
        let before = self.plugged_in(range.start..end);
        let mut at = range.start;
        while at < end {
            let upto = ((at / 64 + 1) * 64).min(end);
            let mask = mask(at % 64, upto - at);
            match plugged {
                true => self.words[at / 64] |= mask,
                false => self.words[at / 64] &= !mask,
            }
            at = upto;
        }
        let now = if plugged {
            end.saturating_sub(range.start)
        } else {
            0
        };
        self.plugged = self.plugged - before + now;
    }
}

/// `length` bits, at most 64, from `start` on.
fn mask(start: usize, length: usize) -> u64 {
    let ones = match length {
        64 => u64::MAX,
        length => (1 << length) - 1,
    };
    ones << start
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        /// As a list of truths would have it.
        #[test]
        fn blocks_are_what_was_set(
            count in 1..300_usize,
            steps in proptest::collection::vec((0..300_usize, 0..300_usize, proptest::bool::ANY), 0..40),
        ) {
            let mut blocks = Blocks::new(count);
            let mut truths = vec![false; count];
            for (start, length, plugged) in steps {
                let range = start..start + length;
                blocks.set(range.clone(), plugged);
                for truth in truths.iter_mut().take(range.end).skip(start) {
                    *truth = plugged;
                }
                let in_range = truths.iter().take(range.end).skip(start).filter(|t| **t).count();
                proptest::prop_assert_eq!(blocks.plugged_in(range), in_range);
                proptest::prop_assert_eq!(blocks.plugged(), truths.iter().filter(|t| **t).count());
            }
            let again = Blocks::from_words(count, blocks.words().to_vec());
            proptest::prop_assert_eq!(again, Some(blocks));
        }
    }

    #[test]
    fn words_of_others_are_refused() {
        assert!(Blocks::from_words(64, vec![1]).is_some());
        assert!(Blocks::from_words(65, vec![1]).is_none());
        assert!(Blocks::from_words(65, vec![1, 2]).is_none());
        assert!(Blocks::from_words(0, vec![1]).is_none());
    }
}
