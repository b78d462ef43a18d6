// SPDX-License-Identifier: Apache-2.0
//! MSI-X (PCI Local Bus 3.0 §6.8.2): a table of messages that the guest
//! writes, and by which it is interrupted.
//!
//! A driver writes and reads the table some fifteen times for each vector, and
//! nothing comes of it until the function has something to tell. So the table is
//! memory that the guest may write, and is looked at when an interrupt is to be
//! delivered, as a device does. What memory cannot do is to say that a vector is
//! no longer masked, which matters for one that is pending: from the first of
//! those on, which drivers hardly ever cause, no table is memory any more.

use std::{
    io,
    sync::{
        atomic::{AtomicBool, Ordering},
        Arc, Mutex, MutexGuard,
    },
};

use serde::{Deserialize, Serialize};

use super::{
    host::{Message, Messages},
    pages::{Page, PAGE},
};

/// Capability id.
pub const CAPABILITY: u8 = 0x11;
/// Bytes of a table entry.
pub const ENTRY_SIZE: u64 = 16;
/// Message control: MSI-X enable.
const ENABLE: u16 = 1 << 15;
/// Message control: all vectors masked.
const FUNCTION_MASK: u16 = 1 << 14;
/// What the guest may write of message control.
pub const CONTROL_WRITABLE: u16 = ENABLE | FUNCTION_MASK;
/// Vector control: masked.
const VECTOR_MASKED: u32 = 1;

// Where in an entry.
const ADDRESS: usize = 0;
const DATA: usize = 8;
const CONTROL: usize = 12;

/// The table as it is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    enabled: bool,
    function_masked: bool,
    vectors: Vec<VectorState>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct VectorState {
    message: Message,
    control: u32,
    pending: bool,
}

impl MsixState {
    /// How many vectors it has.
    pub fn count(&self) -> usize {
        self.vectors.len()
    }
}

#[derive(Default)]
struct State {
    enabled: bool,
    function_masked: bool,
    /// Nothing is delivered any more, whatever the guest writes.
    shut: bool,
}

/// The MSI-X table of one function.
pub struct Msix {
    messages: Arc<dyn Messages>,
    table: Page,
    /// Of each vector.
    pending: Vec<AtomicBool>,
    /// Whether anything is delivered: what the state comes to.
    usable: AtomicBool,
    state: Mutex<State>,
}

impl Msix {
    /// A table of `count` vectors in `table`, all masked, as after reset.
    ///
    /// # Errors
    /// They do not fit.
    pub fn new(messages: Arc<dyn Messages>, table: Page, count: u16) -> io::Result<Self> {
        let count = usize::from(count);
        if count > PAGE / ENTRY_SIZE as usize {
            return Err(io::Error::other("too many interrupt vectors"));
        }
        let this = Self {
            messages,
            table,
            pending: (0..count).map(|_| AtomicBool::new(false)).collect(),
            usable: AtomicBool::new(false),
            state: Mutex::default(),
        };
        for index in 0..count {
            let nothing = Message {
                address: 0,
                data: 0,
            };
            this.set_entry(index, nothing, VECTOR_MASKED);
        }
        Ok(this)
    }

    /// Reads the table.
    pub fn save(&self) -> MsixState {
        let state = self.lock();
        let vectors = self.pending.iter().enumerate();
        MsixState {
            enabled: state.enabled,
            function_masked: state.function_masked,
            vectors: vectors
                .map(|(index, pending)| VectorState {
                    message: self.message(index),
                    control: self.word(index, CONTROL) & VECTOR_MASKED,
                    pending: pending.load(Ordering::SeqCst),
                })
                .collect(),
        }
    }

    /// Makes a new table what the saved one was; false when it has another
    /// number of vectors.
    pub fn restore(&self, saved: &MsixState) -> bool {
        let mut state = self.lock();
        if saved.vectors.len() != self.pending.len() {
            return false;
        }
        state.enabled = saved.enabled;
        state.function_masked = saved.function_masked;
        for (index, saved) in saved.vectors.iter().enumerate() {
            self.set_entry(index, saved.message, saved.control & VECTOR_MASKED);
            self.pending[index].store(saved.pending, Ordering::SeqCst);
        }
        self.update(&state);
        true
    }

    /// The capability's body: message control, table and pending bits, each as
    /// offset and number of its BAR.
    pub fn capability(&self, table: u32, pending: u32) -> Vec<u8> {
        let mut body = Vec::new();
        body.extend_from_slice(&(self.pending.len() as u16 - 1).to_le_bytes());
        body.extend_from_slice(&table.to_le_bytes());
        body.extend_from_slice(&pending.to_le_bytes());
        body
    }

    /// Raises vector `index`: at once, or when it is unmasked. What does not
    /// exist is not raised.
    pub fn signal(&self, index: u16) {
        let index = usize::from(index);
        let Some(pending) = self.pending.get(index) else {
            return;
        };
        if !self.deliver(index) {
            pending.store(true, Ordering::SeqCst);
            // It may have been opened in between, with nothing pending yet.
            self.settle_vector(index);
        }
    }

    /// The guest wrote message control.
    pub fn set_control(&self, control: u16) {
        let mut state = self.lock();
        state.enabled = control & ENABLE != 0;
        state.function_masked = control & FUNCTION_MASK != 0;
        self.update(&state);
    }

    /// A guest's read of the table, where it is not memory.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let index = (offset / ENTRY_SIZE) as usize;
        if index >= self.pending.len() {
            return;
        }
        let mut entry = [0_u8; ENTRY_SIZE as usize];
        for (at, word) in entry.chunks_exact_mut(4).enumerate() {
            word.copy_from_slice(&self.word(index, at * 4).to_le_bytes());
        }
        let start = (offset % ENTRY_SIZE) as usize;
        let length = data.len().min(entry.len() - start);
        data[..length].copy_from_slice(&entry[start..start + length]);
    }

    /// A guest's write to the table, where it is not memory: aligned words and
    /// double words, as the specification demands; all else is ignored.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || offset % data.len() as u64 != 0 {
            return;
        }
        let index = (offset / ENTRY_SIZE) as usize;
        if index >= self.pending.len() {
            return;
        }
        let start = (offset % ENTRY_SIZE) as usize;
        for (at, word) in data.chunks_exact(4).enumerate() {
            let value = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            match start + at * 4 {
                CONTROL => self.set_word(index, CONTROL, value & VECTOR_MASKED),
                at => self.set_word(index, at, value),
            }
        }
        self.settle_vector(index);
    }

    /// A guest's read of the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let first = (offset.saturating_add(index as u64)).saturating_mul(8);
            *byte = (0..8).fold(0, |bits, bit| {
                let pending = usize::try_from(first.saturating_add(bit))
                    .ok()
                    .and_then(|at| self.pending.get(at))
                    .is_some_and(|pending| pending.load(Ordering::Relaxed));
                bits | (u8::from(pending) << bit)
            });
        }
    }

    /// Delivers nothing any more: the function leaves.
    pub fn shut(&self) {
        let mut state = self.lock();
        state.shut = true;
        self.update(&state);
    }

    /// What the state comes to.
    fn update(&self, state: &State) {
        let usable = state.enabled && !state.function_masked && !state.shut;
        self.usable.store(usable, Ordering::SeqCst);
        self.settle();
    }

    /// Delivers what waits for no mask any more. Called when the tables are no
    /// memory any more, too: until then nobody was told of a mask that was lifted.
    pub fn settle(&self) {
        (0..self.pending.len()).for_each(|index| self.settle_vector(index));
    }

    fn settle_vector(&self, index: usize) {
        let pending = &self.pending[index];
        if !pending.load(Ordering::SeqCst) || !self.usable.load(Ordering::SeqCst) {
            return;
        }
        if self.is_open(index) {
            if pending.swap(false, Ordering::SeqCst) {
                self.send(index);
            }
        } else {
            // It waits for a write that is to be told.
            self.messages.trap_tables();
        }
    }

    /// Delivers the interrupt, if nothing masks it.
    fn deliver(&self, index: usize) -> bool {
        let open = self.is_open(index);
        if open {
            self.send(index);
        }
        open
    }

    fn send(&self, index: usize) {
        // The guest wrote it; one that goes nowhere is lost, as on a bus.
        let _ = self.messages.send(self.message(index));
    }

    fn is_open(&self, index: usize) -> bool {
        self.usable.load(Ordering::SeqCst) && self.word(index, CONTROL) & VECTOR_MASKED == 0
    }

    fn message(&self, index: usize) -> Message {
        let [low, high] = [0, 4].map(|at| u64::from(self.word(index, ADDRESS + at)));
        Message {
            address: low | high << 32,
            data: self.word(index, DATA),
        }
    }

    fn set_entry(&self, index: usize, message: Message, control: u32) {
        self.set_word(index, CONTROL, control);
        self.set_word(index, ADDRESS, message.address as u32);
        self.set_word(index, ADDRESS + 4, (message.address >> 32) as u32);
        self.set_word(index, DATA, message.data);
    }

    fn word(&self, index: usize, at: usize) -> u32 {
        self.table.word(index * ENTRY_SIZE as usize + at)
    }

    fn set_word(&self, index: usize, at: usize, value: u32) {
        self.table.set_word(index * ENTRY_SIZE as usize + at, value);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("no holder of the MSI-X state's lock panics")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Sink {
        sent: Mutex<Vec<Message>>,
        trapped: AtomicBool,
    }

    impl Messages for Sink {
        fn send(&self, message: Message) -> io::Result<()> {
            self.sent.lock().unwrap().push(message);
            Ok(())
        }
        fn trap_tables(&self) {
            self.trapped.store(true, Ordering::SeqCst);
        }
    }

    impl Sink {
        /// Messages that came since the last time.
        fn count(&self) -> usize {
            std::mem::take(&mut *self.sent.lock().unwrap()).len()
        }
    }

    fn table(count: u16) -> (Arc<Sink>, Page, Msix) {
        let sink = Arc::new(Sink::default());
        let page = Page::alone().unwrap();
        let msix = Msix::new(sink.clone(), page.clone(), count).unwrap();
        (sink, page, msix)
    }

    /// What drivers write: to memory.
    fn set_up(page: &Page) {
        page.set_word(0, 0xfee0_0000);
        page.set_word(4, 1);
        page.set_word(8, 33);
    }

    const MESSAGE: Message = Message {
        address: 0x1_fee0_0000,
        data: 33,
    };

    #[test]
    fn a_vector_fires_only_when_nothing_masks_it() {
        let (sink, page, msix) = table(1);
        set_up(&page);
        msix.signal(0);
        assert_eq!(sink.count(), 0);
        let mut pending = [0; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [1, 0, 0, 0, 0, 0, 0, 0]);
        page.set_word(12, 0);
        msix.set_control(ENABLE | FUNCTION_MASK);
        assert_eq!(sink.count(), 0);
        msix.set_control(ENABLE);
        let sent = std::mem::take(&mut *sink.sent.lock().unwrap());
        assert_eq!(
            sent,
            [MESSAGE],
            "what was pending comes when it is unmasked"
        );
        msix.signal(0);
        assert_eq!(sink.count(), 1);
        // It goes where the table says now.
        page.set_word(8, 34);
        msix.signal(0);
        assert_eq!(sink.sent.lock().unwrap().pop().unwrap().data, 34);
        assert!(!sink.trapped.load(Ordering::SeqCst));
    }

    #[test]
    fn what_waits_for_a_vectors_mask_waits_for_a_write_that_is_told() {
        let (sink, page, msix) = table(2);
        set_up(&page);
        msix.set_control(ENABLE);
        // Nothing waits, so that nobody need know.
        page.set_word(12, 0);
        page.set_word(12, 1);
        assert!(!sink.trapped.load(Ordering::SeqCst));
        msix.signal(0);
        assert!(sink.trapped.load(Ordering::SeqCst));
        msix.write_table(28, &0_u32.to_le_bytes());
        assert_eq!(sink.count(), 0, "of another vector");
        msix.write_table(12, &0_u32.to_le_bytes());
        assert_eq!(*sink.sent.lock().unwrap(), [MESSAGE]);
        msix.write_table(12, &0_u32.to_le_bytes());
        assert_eq!(sink.count(), 1, "once");
        let mut entry = [0; 16];
        msix.read_table(0, &mut entry);
        assert_eq!(entry[..9], [0, 0, 0xe0, 0xfe, 1, 0, 0, 0, 33]);
    }

    #[test]
    fn one_that_is_opened_before_writes_are_told_is_not_lost() {
        let (sink, page, msix) = table(1);
        msix.set_control(ENABLE);
        msix.signal(0);
        assert!(sink.trapped.load(Ordering::SeqCst));
        // The last write that nobody was told of.
        page.set_word(12, 0);
        msix.settle();
        assert_eq!(sink.count(), 1);
        msix.settle();
        assert_eq!(sink.count(), 0);
    }

    #[test]
    fn what_is_saved_is_restored() {
        let (_, page, msix) = table(2);
        set_up(&page);
        msix.set_control(ENABLE);
        msix.signal(0);
        let saved = msix.save();
        let (sink, page, other) = table(2);
        assert!(other.restore(&saved));
        assert_eq!(other.save(), saved);
        assert!(sink.trapped.load(Ordering::SeqCst), "it waits here, too");
        assert_eq!((page.word(8), page.word(12), page.word(28)), (33, 1, 1));
        other.write_table(12, &0_u32.to_le_bytes());
        assert_eq!(*sink.sent.lock().unwrap(), [MESSAGE]);
        assert!(!table(3).2.restore(&saved));
    }

    #[test]
    fn what_is_shut_stays_so() {
        let (sink, page, msix) = table(1);
        page.set_word(12, 0);
        msix.set_control(ENABLE);
        msix.signal(0);
        assert_eq!(sink.count(), 1);
        msix.shut();
        msix.shut();
        msix.set_control(ENABLE);
        msix.signal(0);
        assert_eq!(sink.count(), 0);
    }

    #[test]
    fn any_access_is_harmless() {
        let (_, page, msix) = table(2);
        for offset in [0, 1, 13, 30, 31, 32, 4096, u64::MAX - 7] {
            for length in [1, 2, 3, 4, 8] {
                let mut data = vec![0xff; length];
                msix.write_table(offset, &data);
                msix.read_table(offset, &mut data);
                msix.read_pending(offset, &mut data);
            }
        }
        for at in (0..PAGE).step_by(4) {
            page.set_word(at, u32::MAX);
        }
        msix.set_control(u16::MAX);
        msix.signal(2);
        msix.signal(0xffff);
        let most = (PAGE / ENTRY_SIZE as usize) as u16;
        let other = |count| Msix::new(Arc::new(Sink::default()), Page::alone().unwrap(), count);
        assert!(other(most).is_ok() && other(most + 1).is_err());
    }
}
