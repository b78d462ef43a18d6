// SPDX-License-Identifier: Apache-2.0
//! The root bus behind the ECAM window (PCI Express 5.0 §7.2.2), and the
//! registers of what is on it.
//!
//! A guest reads configuration space a thousand times while it boots and
//! writes it a hundred times, and reading has no effect. So the window is
//! memory that the guest may only read, and the bus keeps it as the functions
//! say; only writes leave the guest. Behind it, in the same memory, is a page for
//! what each device says of itself. Functions come and go while it looks.

use std::sync::{Arc, Mutex, RwLock};

use vm_memory::{mmap::MmapRegionError, Bytes, MmapRegion, VolatileMemory};

use super::{
    config::{self, ConfigSpace, Identity},
    host::NotifyRegistrar,
    pages::{Page, PAGE},
};
use crate::bus::BusDevice;

/// Device numbers on the bus.
pub const SLOTS: usize = 32;
/// Bytes of the window per device: eight functions of 4 KiB.
const SLOT_SIZE: usize = 8 * 4096;
/// Bytes of registers (BAR 0) per device.
pub const BAR_SIZE: u64 = 0x8000;

/// A function, as the bus sees it.
pub trait PciFunction: Send + Sync {
    /// Reads configuration space.
    fn read_config(&self, offset: usize, data: &mut [u8]);
    /// Writes it.
    fn write_config(&self, offset: usize, data: &[u8]);
    /// Reads the registers, for which `data` is zero: any offset below
    /// [`BAR_SIZE`], any length.
    fn read_bar(&self, _offset: u64, _data: &mut [u8]) {}
    /// Writes them.
    fn write_bar(&self, _offset: u64, _data: &[u8]) {}
}

/// No free device number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the PCI bus is full: at most {} devices", SLOTS - 1)]
pub struct BusFull;

type Slots = [Option<Arc<dyn PciFunction>>; SLOTS];

/// The bus with the host bridge at device 0.
pub struct PciRoot {
    slots: RwLock<Slots>,
    /// What the guest reads. Held while a function's space changes, so that the
    /// last change is what it shows.
    shown: Mutex<Arc<MmapRegion>>,
    registrar: Arc<dyn NotifyRegistrar>,
    /// Where the window is.
    base: u64,
}

struct HostBridge(ConfigSpace);

impl PciFunction for HostBridge {
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        self.0.read(offset, data);
    }
    fn write_config(&self, _offset: usize, _data: &[u8]) {}
}

/// Bytes of what is shown: all spaces, then a page for each device.
const SHOWN: usize = SLOTS * (SLOT_SIZE + PAGE);

impl PciRoot {
    /// A bus with nothing but its bridge, and its window at `base`.
    ///
    /// # Errors
    /// There is no memory.
    pub fn new(registrar: Arc<dyn NotifyRegistrar>, base: u64) -> Result<Self, MmapRegionError> {
        // An Intel host bridge that has no driver and no registers.
        let bridge = ConfigSpace::new(Identity {
            vendor: 0x8086,
            device: 0x0d57,
            class: 0x06_0000,
            revision: 0,
            subsystem: 0,
        });
        let mut slots = Slots::default();
        slots[0] = Some(Arc::new(HostBridge(bridge)));
        let this = Self {
            slots: RwLock::new(slots),
            shown: Mutex::new(Arc::new(MmapRegion::new(SHOWN)?)),
            registrar,
            base,
        };
        this.refresh();
        Ok(this)
    }

    /// The memory to put at the start of the window, for the guest to read: the
    /// spaces of all device numbers, as they are and will be, and the pages
    /// behind them. Functions that never existed read as zero, which is no vendor
    /// either, and take no memory.
    pub fn memory(&self) -> Arc<MmapRegion> {
        Arc::clone(&self.shown())
    }

    /// The page for what a device says of itself; none: there is no such number.
    pub fn page(&self, slot: usize) -> Option<Page> {
        Page::new(&self.shown(), SLOTS * SLOT_SIZE + slot.checked_mul(PAGE)?)
    }

    /// Plugs a function in at the lowest free device number, which is
    /// returned.
    ///
    /// # Errors
    /// There is none.
    pub fn add(&self, function: Arc<dyn PciFunction>) -> Result<usize, BusFull> {
        let slot = self.free_slot()?;
        self.add_at(slot, function)?;
        Ok(slot)
    }

    /// Plugs a function in at a device number.
    ///
    /// # Errors
    /// It is taken, or there is no such number.
    pub fn add_at(&self, slot: usize, function: Arc<dyn PciFunction>) -> Result<(), BusFull> {
        match self.slots_mut().get_mut(slot) {
            Some(free @ None) => *free = Some(Arc::clone(&function)),
            _ => return Err(BusFull),
        }
        update(&self.shown(), slot, function.as_ref());
        Ok(())
    }

    /// Takes a function off the bus: the guest finds nothing there from now on.
    pub fn remove(&self, slot: usize) {
        if let Some(taken) = self.slots_mut().get_mut(slot) {
            *taken = None;
        }
        let shown = self.shown();
        if slot < SLOTS {
            show_space(&shown, slot, &[0xff; config::SIZE]);
        }
    }

    /// The lowest device number that is free.
    ///
    /// # Errors
    /// There is none.
    pub fn free_slot(&self) -> Result<usize, BusFull> {
        let slots = self.slots.read().expect(NO_PANIC);
        slots.iter().position(Option::is_none).ok_or(BusFull)
    }

    /// Shows the functions' spaces as they are now: they changed otherwise than
    /// by a write to the window.
    pub fn refresh(&self) {
        let functions = self.slots.read().expect(NO_PANIC).clone();
        let shown = self.shown();
        for (slot, function) in functions.iter().enumerate() {
            if let Some(function) = function {
                update(&shown, slot, function.as_ref());
            }
        }
    }

    fn slots_mut(&self) -> std::sync::RwLockWriteGuard<'_, Slots> {
        self.slots.write().expect(NO_PANIC)
    }

    fn shown(&self) -> std::sync::MutexGuard<'_, Arc<MmapRegion>> {
        self.shown
            .lock()
            .expect("no holder of the window's lock panics")
    }

    fn at(&self, slot: usize) -> Option<Arc<dyn PciFunction>> {
        self.slots.read().expect(NO_PANIC).get(slot)?.clone()
    }

    /// Splits an ECAM offset: function 0 of a device that is there, and the
    /// register.
    fn decode(&self, offset: u64) -> Option<(usize, Arc<dyn PciFunction>, usize)> {
        let bus = offset >> 20;
        let device = (offset >> 15) & 0x1f;
        let function = (offset >> 12) & 7;
        if bus != 0 || function != 0 {
            return None;
        }
        let slot = device as usize;
        Some((slot, self.at(slot)?, (offset & 0xfff) as usize))
    }
}

const NO_PANIC: &str = "no holder of the slots' lock panics";

/// Shows a function's space, of which the rest is zero.
fn update(memory: &MmapRegion, slot: usize, function: &dyn PciFunction) {
    let mut space = [0; config::SIZE];
    function.read_config(0, &mut space);
    show_space(memory, slot, &space);
}

/// The identity last: a guest that looks at this moment sees all or nothing.
fn show_space(memory: &MmapRegion, slot: usize, space: &[u8; config::SIZE]) {
    const IDENTITY: usize = 4;
    let at = slot * SLOT_SIZE;
    let all = memory.as_volatile_slice();
    let written = all
        .write_slice(&space[IDENTITY..], at + IDENTITY)
        .and_then(|()| all.write_slice(&space[..IDENTITY], at));
    debug_assert!(written.is_ok(), "all slots are shown");
}

impl BusDevice for PciRoot {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.decode(offset) {
            Some((_, function, register)) => function.read_config(register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((slot, function, register)) = self.decode(offset) {
            if config::FIXED.contains(&register) {
                // A guest writes here to find base addresses, and nothing comes
                // of it. The first time tells that it does.
                let first = self.base + (slot * SLOT_SIZE + config::FIXED.start) as u64;
                self.registrar
                    .gather_writes(first, config::FIXED.len() as u32);
            }
            let shown = self.shown();
            function.write_config(register, data);
            // It may have been taken off meanwhile.
            if self
                .at(slot)
                .is_some_and(|now| Arc::ptr_eq(&now, &function))
            {
                update(&shown, slot, function.as_ref());
            }
        }
    }
}

/// The registers of all functions, or a page of them.
pub struct BarWindow {
    root: Arc<PciRoot>,
    /// Of each device.
    size: u64,
    /// Where they begin among a device's registers.
    first: u64,
}

impl BarWindow {
    /// All: device n's lie at n times [`BAR_SIZE`].
    pub fn all(root: Arc<PciRoot>) -> Self {
        Self {
            root,
            size: BAR_SIZE,
            first: 0,
        }
    }

    /// The page of them at `first`: device n's lies at n times [`PAGE`].
    pub fn page(root: Arc<PciRoot>, first: u64) -> Self {
        Self {
            root,
            size: PAGE as u64,
            first,
        }
    }

    /// Bytes of the window.
    pub fn size(&self) -> u64 {
        SLOTS as u64 * self.size
    }

    fn decode(&self, offset: u64) -> Option<(Arc<dyn PciFunction>, u64)> {
        let slot = usize::try_from(offset / self.size).ok()?;
        Some((self.root.at(slot)?, self.first + offset % self.size))
    }
}

impl BusDevice for BarWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.decode(offset) {
            Some((function, register)) => function.read_bar(register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((function, register)) = self.decode(offset) {
            function.write_bar(register, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use vmm_sys_util::eventfd::EventFd;

    use super::*;

    #[derive(Default)]
    struct Registrar(Mutex<Vec<(u64, u32)>>);

    impl NotifyRegistrar for Registrar {
        fn register_notify(&self, _: &EventFd, _: u64) -> io::Result<()> {
            Ok(())
        }
        fn unregister_notify(&self, _: &EventFd, _: u64) -> io::Result<()> {
            Ok(())
        }
        fn gather_writes(&self, address: u64, size: u32) {
            self.0.lock().unwrap().push((address, size));
        }
        fn gather_port_writes(&self, _: u16, _: u32) {}
    }

    fn root() -> PciRoot {
        PciRoot::new(Arc::new(Registrar::default()), 0).unwrap()
    }

    #[test]
    fn what_does_nothing_is_gathered_from_the_first_time_on() {
        let registrar = Arc::new(Registrar::default());
        let root = PciRoot::new(registrar.clone(), 0x8000_0000).unwrap();
        root.add(Arc::new(HostBridge(space(1)))).unwrap();
        for (offset, gathered) in [
            (0x0f, None),
            (0x34, None),
            (2 << 15 | 0x10, None),
            (0x10, Some(0x8000_0010)),
            (1 << 15 | 0x30, Some(0x8000_8010)),
        ] {
            root.write(offset, &[0; 4]);
            let seen = registrar.0.lock().unwrap().pop();
            assert_eq!(seen, gathered.map(|at| (at, 0x24)), "{offset:#x}");
        }
    }

    #[test]
    fn the_bridge_answers_and_empty_slots_read_all_ones() {
        let root = root();
        let mut data = [0; 4];
        root.read(0, &mut data);
        assert_eq!(data, [0x86, 0x80, 0x57, 0x0d]);
        for offset in [1 << 15, 1 << 12, 31 << 15, 1 << 20, u64::MAX] {
            root.read(offset, &mut data);
            assert_eq!(data, [0xff; 4]);
            root.write(offset, &data);
        }
    }

    struct Scratch(Mutex<ConfigSpace>);

    impl PciFunction for Scratch {
        fn read_config(&self, offset: usize, data: &mut [u8]) {
            self.0.lock().unwrap().read(offset, data);
        }
        fn write_config(&self, offset: usize, data: &[u8]) {
            self.0.lock().unwrap().write(offset, data);
        }
    }

    #[test]
    fn what_is_shown_is_what_would_be_read() {
        let root = root();
        let mut space = ConfigSpace::new(Identity {
            vendor: 1,
            device: 2,
            class: 0,
            revision: 0,
            subsystem: 0,
        });
        space.allow_writes(0x40, &[0xff; 4]);
        let scratch = Arc::new(Scratch(Mutex::new(space)));
        root.add(scratch.clone()).unwrap();
        let memory = root.memory();
        assert_eq!(memory.size(), SLOTS * (SLOT_SIZE + PAGE));
        let page = root.page(31).unwrap();
        page.set_word(PAGE - 4, 9);
        let last = memory.as_volatile_slice().read_obj(memory.size() - 4);
        assert_eq!(last.map(u32::from_le).unwrap(), 9);
        assert!(root.page(32).is_none() && root.page(usize::MAX).is_none());
        let same = |root: &PciRoot| {
            for slot in 0..2 {
                let mut seen = [1; 4096];
                let all = memory.as_volatile_slice();
                all.read_slice(&mut seen, slot * SLOT_SIZE).unwrap();
                let mut read = [1; 4096];
                root.read((slot * SLOT_SIZE) as u64, &mut read);
                assert_eq!(seen, read);
            }
        };
        same(&root);
        root.write(1 << 15 | 0x40, &[5; 4]);
        let mut seen = [0; 4];
        root.read(1 << 15 | 0x40, &mut seen);
        assert_eq!(seen, [5; 4]);
        same(&root);
        // There are no BARs to be sized.
        root.write(1 << 15 | 0x10, &[0xff; 4]);
        root.read(1 << 15 | 0x10, &mut seen);
        assert_eq!(seen, [0; 4]);
        same(&root);
        scratch.write_config(0x0c, &[7]);
        root.refresh();
        same(&root);
    }

    fn space(device: u16) -> ConfigSpace {
        ConfigSpace::new(Identity {
            vendor: 1,
            device,
            class: 0,
            revision: 0,
            subsystem: 0,
        })
    }

    #[test]
    fn what_comes_and_goes_is_shown() {
        let root = root();
        let memory = root.memory();
        let seen = |slot: usize| {
            let all = memory.as_volatile_slice();
            all.read_obj::<u32>(slot * SLOT_SIZE).unwrap()
        };
        assert_eq!(seen(1), 0);
        for (slot, device) in [(1, 7), (2, 8)] {
            assert_eq!(root.add(Arc::new(HostBridge(space(device)))), Ok(slot));
            assert_eq!(seen(slot), u32::from(device) << 16 | 1);
        }
        root.remove(1);
        assert_eq!(seen(1), u32::MAX);
        assert_eq!(seen(2), 8 << 16 | 1);
        // What the guest writes to it now does not bring it back.
        root.write(1 << 15 | 4, &[6, 0]);
        assert_eq!(seen(1), u32::MAX);
        assert_eq!(root.add(Arc::new(HostBridge(space(9)))), Ok(1));
        assert_eq!(seen(1), 9 << 16 | 1);
        let taken = root.add_at(2, Arc::new(HostBridge(space(9))));
        assert_eq!(taken, Err(BusFull));
    }

    struct Registers(Mutex<Vec<u64>>);

    impl PciFunction for Registers {
        fn read_config(&self, _: usize, _: &mut [u8]) {}
        fn write_config(&self, _: usize, _: &[u8]) {}
        fn read_bar(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write_bar(&self, offset: u64, _: &[u8]) {
            self.0.lock().unwrap().push(offset);
        }
    }

    #[test]
    fn registers_are_found_by_their_slot() {
        let root = Arc::new(root());
        let registers = Arc::new(Registers(Mutex::default()));
        root.add_at(3, registers.clone()).unwrap();
        let page = BarWindow::page(Arc::clone(&root), 0x4000);
        assert_eq!(page.size(), 32 << 12);
        page.write(3 << 12 | 7, &[0; 2]);
        page.write(2 << 12 | 7, &[0; 2]);
        page.write(page.size() + 7, &[0; 2]);
        assert_eq!(registers.0.lock().unwrap().drain(..).as_slice(), [0x4007]);
        let window = BarWindow::all(root);
        let mut data = [0; 2];
        for (offset, found) in [
            (3 * BAR_SIZE + 5, 5),
            (2 * BAR_SIZE + 5, 0xff),
            (4 * BAR_SIZE, 0xff),
            (SLOTS as u64 * BAR_SIZE, 0xff),
            (u64::MAX, 0xff),
        ] {
            window.read(offset, &mut data);
            assert_eq!(data, [found; 2]);
            window.write(offset, &data);
        }
        assert_eq!(*registers.0.lock().unwrap(), [5]);
    }

    #[test]
    fn the_bus_holds_31_devices() {
        let root = root();
        for expected in 1..SLOTS {
            assert_eq!(root.add(Arc::new(HostBridge(space(2)))), Ok(expected));
        }
        assert_eq!(root.add(Arc::new(HostBridge(space(2)))), Err(BusFull));
    }
}
