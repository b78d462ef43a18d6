// SPDX-License-Identifier: Apache-2.0
//! MSI-X (PCI Local Bus 3.0 §6.8.2): a table of messages that the guest
//! writes, each bound to an event that raises it in KVM.

use std::{
    io,
    sync::{
        atomic::{AtomicBool, Ordering},
        Arc, Mutex, OnceLock,
    },
};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

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

/// An interrupt message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Address it is written to.
    pub address: u64,
    /// What is written.
    pub data: u32,
}

/// Binds events to interrupt messages; KVM implements it.
pub trait InterruptRouter: Send + Sync {
    /// A number for a new route.
    fn allocate(&self) -> u32;
    /// Gives one back, whose route and event are removed already.
    fn release(&self, gsi: u32);
    /// Sets or removes routes, all at once.
    fn set_routes(&self, changes: &[(u32, Option<Message>)]) -> io::Result<()>;
    /// Lets `event` raise the interrupt of route `gsi`.
    fn register(&self, event: &EventFd, gsi: u32) -> io::Result<()>;
    /// Undoes it.
    fn unregister(&self, event: &EventFd, gsi: u32) -> io::Result<()>;
}

/// Binds guest writes to events, without an exit to user space.
pub trait NotifyRegistrar: Send + Sync {
    /// A write of any size at `address` signals `event`.
    fn register_notify(&self, event: &EventFd, address: u64) -> io::Result<()>;
    /// Undoes it.
    fn unregister_notify(&self, event: &EventFd, address: u64) -> io::Result<()>;
}

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

struct Vector {
    message: Message,
    control: u32,
    gsi: u32,
    registered: bool,
}

struct State {
    enabled: bool,
    function_masked: bool,
    /// Nothing is routed any more, whatever the guest writes.
    shut: bool,
    vectors: Vec<Vector>,
}

/// One vector's fast path.
#[derive(Default)]
struct Line {
    /// Made when the guest first lets the vector through: there are more vectors
    /// than it uses.
    event: OnceLock<EventFd>,
    /// Whether signalling the event reaches the guest now.
    open: AtomicBool,
    pending: AtomicBool,
}

impl Line {
    /// The event, from the first time on.
    fn event(&self) -> io::Result<&EventFd> {
        if let Some(event) = self.event.get() {
            return Ok(event);
        }
        // Nobody else makes one meanwhile: the table is locked.
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(self.event.get_or_init(|| event))
    }

    /// Raises the interrupt, of a vector that is open.
    fn raise(&self) {
        if let Some(event) = self.event.get() {
            // Full only when KVM has 2^64 of them pending.
            let _ = event.write(1);
        }
    }
}

/// The MSI-X table of one function.
pub struct Msix {
    router: Arc<dyn InterruptRouter>,
    lines: Vec<Line>,
    state: Mutex<State>,
}

impl Msix {
    /// A table of `count` vectors, all masked, as after reset.
    pub fn new(router: Arc<dyn InterruptRouter>, count: u16) -> io::Result<Self> {
        let mut lines = Vec::with_capacity(usize::from(count));
        let mut vectors = Vec::with_capacity(usize::from(count));
        for _ in 0..count {
            lines.push(Line::default());
            vectors.push(Vector {
                message: Message {
                    address: 0,
                    data: 0,
                },
                control: VECTOR_MASKED,
                gsi: router.allocate(),
                registered: false,
            });
        }
        Ok(Self {
            router,
            lines,
            state: Mutex::new(State {
                enabled: false,
                function_masked: false,
                shut: false,
                vectors,
            }),
        })
    }

    /// Reads the table.
    pub fn save(&self) -> MsixState {
        let state = self.lock();
        let vectors = state.vectors.iter().zip(&self.lines);
        MsixState {
            enabled: state.enabled,
            function_masked: state.function_masked,
            vectors: vectors
                .map(|(vector, line)| VectorState {
                    message: vector.message,
                    control: vector.control,
                    pending: line.pending.load(Ordering::SeqCst),
                })
                .collect(),
        }
    }

    /// Makes a new table what the saved one was; false when it has another
    /// number of vectors.
    pub fn restore(&self, saved: &MsixState) -> bool {
        let mut state = self.lock();
        if saved.vectors.len() != state.vectors.len() {
            return false;
        }
        state.enabled = saved.enabled;
        state.function_masked = saved.function_masked;
        let vectors = state.vectors.iter_mut().zip(&self.lines);
        for ((vector, line), saved) in vectors.zip(&saved.vectors) {
            vector.message = saved.message;
            vector.control = saved.control & VECTOR_MASKED;
            line.pending.store(saved.pending, Ordering::SeqCst);
        }
        self.update(&mut state);
        true
    }

    /// The capability's body: message control, table and pending bits in BAR 0.
    pub fn capability(&self, table: u32, pending: u32) -> Vec<u8> {
        let mut body = Vec::new();
        body.extend_from_slice(&(self.lines.len() as u16 - 1).to_le_bytes());
        body.extend_from_slice(&table.to_le_bytes());
        body.extend_from_slice(&pending.to_le_bytes());
        body
    }

    /// Raises vector `index`: at once, or when it is unmasked. What does not
    /// exist is not raised.
    pub fn signal(&self, index: u16) {
        let Some(line) = self.lines.get(usize::from(index)) else {
            return;
        };
        if line.open.load(Ordering::Acquire) {
            line.raise();
        } else {
            line.pending.store(true, Ordering::SeqCst);
            // It may have been opened in between, with nothing pending yet.
            if line.open.load(Ordering::SeqCst) && line.pending.swap(false, Ordering::SeqCst) {
                line.raise();
            }
        }
    }

    /// The guest wrote message control.
    pub fn set_control(&self, control: u16) {
        let mut state = self.lock();
        state.enabled = control & ENABLE != 0;
        state.function_masked = control & FUNCTION_MASK != 0;
        self.update(&mut state);
    }

    /// A guest's read of the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let state = self.lock();
        let Some(vector) = state.vectors.get((offset / ENTRY_SIZE) as usize) else {
            return;
        };
        let mut entry = [0_u8; ENTRY_SIZE as usize];
        entry[..8].copy_from_slice(&vector.message.address.to_le_bytes());
        entry[8..12].copy_from_slice(&vector.message.data.to_le_bytes());
        entry[12..].copy_from_slice(&vector.control.to_le_bytes());
        let start = (offset % ENTRY_SIZE) as usize;
        let length = data.len().min(entry.len() - start);
        data[..length].copy_from_slice(&entry[start..start + length]);
    }

    /// A guest's write to the table: aligned words and double words, as the
    /// specification demands; all else is ignored.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || offset % data.len() as u64 != 0 {
            return;
        }
        let mut state = self.lock();
        let Some(vector) = state.vectors.get_mut((offset / ENTRY_SIZE) as usize) else {
            return;
        };
        for (index, word) in data.chunks_exact(4).enumerate() {
            let value = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            match (offset % ENTRY_SIZE) / 4 + index as u64 {
                0 => {
                    vector.message.address =
                        (vector.message.address & !0xffff_ffff) | u64::from(value);
                }
                1 => {
                    vector.message.address =
                        (vector.message.address & 0xffff_ffff) | (u64::from(value) << 32);
                }
                2 => vector.message.data = value,
                _ => vector.control = value & VECTOR_MASKED,
            }
        }
        self.update(&mut state);
    }

    /// A guest's read of the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let first = (offset.saturating_add(index as u64)).saturating_mul(8);
            *byte = (0..8).fold(0, |bits, bit| {
                let pending = usize::try_from(first.saturating_add(bit))
                    .ok()
                    .and_then(|at| self.lines.get(at))
                    .is_some_and(|line| line.pending.load(Ordering::Relaxed));
                bits | (u8::from(pending) << bit)
            });
        }
    }

    /// Takes all routes and events back, for good: the function leaves.
    pub fn shut(&self) {
        let mut state = self.lock();
        if std::mem::replace(&mut state.shut, true) {
            return;
        }
        for (vector, line) in state.vectors.iter_mut().zip(&self.lines) {
            line.open.store(false, Ordering::SeqCst);
            let registered = std::mem::replace(&mut vector.registered, false);
            if let (true, Some(event)) = (registered, line.event.get()) {
                if let Err(error) = self.router.unregister(event, vector.gsi) {
                    tracing::error!(%error, "interrupt event not taken back");
                }
            }
        }
        let numbers = state.vectors.iter().map(|vector| vector.gsi);
        let routes: Vec<_> = numbers.clone().map(|gsi| (gsi, None)).collect();
        match self.router.set_routes(&routes) {
            Ok(()) => numbers.for_each(|gsi| self.router.release(gsi)),
            // The numbers are not used again then.
            Err(error) => tracing::error!(%error, "interrupt routes not taken back"),
        }
    }

    /// Makes routes and lines agree with the table.
    fn update(&self, state: &mut State) {
        if state.shut {
            return;
        }
        let usable = state.enabled && !state.function_masked;
        let open = |vector: &Vector| usable && vector.control & VECTOR_MASKED == 0;
        // Routes of masked vectors stay: the guest masks a vector for a moment
        // to move it, and every change of the table costs a grace period.
        let changes: Vec<_> = state
            .vectors
            .iter()
            .filter(|vector| open(vector))
            .map(|vector| (vector.gsi, Some(vector.message)))
            .collect();
        if !changes.is_empty() {
            if let Err(error) = self.router.set_routes(&changes) {
                tracing::error!(%error, "interrupt routes not set");
                return;
            }
        }
        for (vector, line) in state.vectors.iter_mut().zip(&self.lines) {
            let opened = open(vector);
            if opened && !vector.registered {
                let register = |event| self.router.register(event, vector.gsi);
                match line.event().and_then(register) {
                    Ok(()) => vector.registered = true,
                    Err(error) => {
                        tracing::error!(%error, "interrupt event not registered");
                        continue;
                    }
                }
            }
            line.open.store(opened, Ordering::SeqCst);
            if opened && line.pending.swap(false, Ordering::SeqCst) {
                line.raise();
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("no holder of the MSI-X table's lock panics")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[derive(Default)]
    struct Router {
        routes: Mutex<BTreeMap<u32, Message>>,
        registered: Mutex<Vec<u32>>,
        released: Mutex<Vec<u32>>,
    }

    impl InterruptRouter for Router {
        fn allocate(&self) -> u32 {
            24
        }
        fn set_routes(&self, changes: &[(u32, Option<Message>)]) -> io::Result<()> {
            let mut routes = self.routes.lock().unwrap();
            for (gsi, message) in changes {
                match message {
                    Some(message) => routes.insert(*gsi, *message),
                    None => routes.remove(gsi),
                };
            }
            Ok(())
        }
        fn register(&self, _: &EventFd, gsi: u32) -> io::Result<()> {
            self.registered.lock().unwrap().push(gsi);
            Ok(())
        }
        fn unregister(&self, _: &EventFd, gsi: u32) -> io::Result<()> {
            self.registered.lock().unwrap().retain(|at| *at != gsi);
            Ok(())
        }
        fn release(&self, gsi: u32) {
            self.released.lock().unwrap().push(gsi);
        }
    }

    fn fired(msix: &Msix) -> bool {
        msix.lines[0]
            .event
            .get()
            .is_some_and(|event| event.read().is_ok())
    }

    #[test]
    fn a_vector_fires_only_when_nothing_masks_it() {
        let router = Arc::new(Router::default());
        let msix = Msix::new(router.clone(), 1).unwrap();
        msix.write_table(0, &0xfee0_0000_u64.to_le_bytes());
        msix.write_table(8, &33_u32.to_le_bytes());
        msix.signal(0);
        assert!(!fired(&msix));
        let mut pending = [0; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [1, 0, 0, 0, 0, 0, 0, 0]);
        msix.write_table(12, &0_u32.to_le_bytes());
        assert!(!fired(&msix));
        msix.set_control(ENABLE | FUNCTION_MASK);
        assert!(!fired(&msix));
        msix.set_control(ENABLE);
        assert!(fired(&msix), "what was pending comes when it is unmasked");
        assert_eq!(
            router.routes.lock().unwrap()[&24],
            Message {
                address: 0xfee0_0000,
                data: 33
            }
        );
        assert_eq!(*router.registered.lock().unwrap(), [24]);
        msix.signal(0);
        assert!(fired(&msix));
        msix.write_table(12, &1_u32.to_le_bytes());
        msix.signal(0);
        assert!(!fired(&msix));
    }

    #[test]
    fn what_is_shut_stays_so() {
        let router = Arc::new(Router::default());
        let msix = Msix::new(router.clone(), 1).unwrap();
        let open = |msix: &Msix| {
            msix.write_table(0, &0xfee0_0000_u64.to_le_bytes());
            msix.write_table(12, &0_u32.to_le_bytes());
            msix.set_control(ENABLE);
        };
        open(&msix);
        assert_eq!(*router.registered.lock().unwrap(), [24]);
        msix.shut();
        msix.shut();
        open(&msix);
        msix.signal(0);
        assert!(!fired(&msix));
        assert!(router.registered.lock().unwrap().is_empty());
        assert!(router.routes.lock().unwrap().is_empty());
        assert_eq!(*router.released.lock().unwrap(), [24]);
    }

    #[test]
    fn any_access_is_harmless() {
        let msix = Msix::new(Arc::new(Router::default()), 2).unwrap();
        for offset in [0, 1, 13, 30, 31, 32, 4096, u64::MAX - 7] {
            for length in [1, 2, 3, 4, 8] {
                let mut data = vec![0xff; length];
                msix.write_table(offset, &data);
                msix.read_table(offset, &mut data);
                msix.read_pending(offset, &mut data);
            }
        }
        msix.signal(2);
        msix.signal(0xffff);
    }
}
