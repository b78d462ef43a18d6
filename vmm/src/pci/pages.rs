// SPDX-License-Identifier: Apache-2.0
//! Memory that the guest reads, or writes, without an exit: a page for each
//! device number. What is in it is the guest's word, and may change at any
//! time.

use std::sync::{atomic::Ordering, Arc};

use vm_memory::{mmap::MmapRegionError, Bytes, MmapRegion, VolatileMemory};

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// One of the pages.
#[derive(Clone)]
pub struct Page {
    memory: Arc<MmapRegion>,
    at: usize,
}

impl Page {
    /// The page `at` bytes into memory of the guest's; none beyond its end.
    pub fn new(memory: &Arc<MmapRegion>, at: usize) -> Option<Self> {
        let end = at.checked_add(PAGE)?;
        (at % PAGE == 0 && end <= memory.size()).then(|| Self {
            memory: Arc::clone(memory),
            at,
        })
    }

    /// A page that no guest sees.
    ///
    /// # Errors
    /// There is no memory.
    pub fn alone() -> Result<Self, MmapRegionError> {
        Ok(Self {
            memory: Arc::new(MmapRegion::new(PAGE)?),
            at: 0,
        })
    }

    /// The word at `offset`; zero where there is none.
    pub fn word(&self, offset: usize) -> u32 {
        if offset > PAGE - size_of::<u32>() {
            return 0;
        }
        let memory = self.memory.as_volatile_slice();
        let word = memory.load::<u32>(self.at + offset, Ordering::SeqCst);
        u32::from_le(word.unwrap_or(0))
    }

    /// Writes bytes to the page's start, as many as it holds.
    pub fn write(&self, bytes: &[u8]) {
        let bytes = &bytes[..bytes.len().min(PAGE)];
        let memory = self.memory.as_volatile_slice();
        let written = memory.write_slice(bytes, self.at);
        debug_assert!(written.is_ok(), "the page is in the memory");
    }

    /// Writes the word at `offset`, where there is one.
    pub fn set_word(&self, offset: usize, value: u32) {
        if offset > PAGE - size_of::<u32>() {
            return;
        }
        let memory = self.memory.as_volatile_slice();
        // Fails at an odd offset only, where there is no word.
        let _ = memory.store(value.to_le(), self.at + offset, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_do_not_overlap_and_end() {
        let memory = Arc::new(MmapRegion::new(2 * PAGE).unwrap());
        let first = Page::new(&memory, 0).unwrap();
        let second = Page::new(&memory, PAGE).unwrap();
        for at in [1, 4, 2 * PAGE, usize::MAX, usize::MAX - PAGE + 1] {
            assert!(Page::new(&memory, at).is_none(), "{at}");
        }
        first.set_word(PAGE - 4, 7);
        first.set_word(PAGE, 8);
        first.set_word(PAGE - 3, 9);
        first.set_word(usize::MAX, 9);
        second.set_word(0, 5);
        assert_eq!((first.word(PAGE - 4), first.word(PAGE)), (7, 0));
        assert_eq!((second.word(0), second.word(1)), (5, 0));
        assert_eq!(first.word(usize::MAX), 0);
        first.write(&[6; 2 * PAGE]);
        assert_eq!(first.word(PAGE - 4), 0x0606_0606);
        assert_eq!(second.word(0), 5);
    }
}
