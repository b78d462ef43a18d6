// SPDX-License-Identifier: Apache-2.0
//! The virtio-pci transport (virtio 1.2 §4.1), modern only.

mod common;
mod lines;
mod notifications;
mod state;
#[cfg(test)]
mod tests;

use std::{
    io,
    sync::{
        atomic::{AtomicBool, AtomicU16, AtomicU8, Ordering},
        Arc, Mutex, OnceLock,
    },
};

use bulkhead_vmm_api::DeviceMetrics;
use vmm_sys_util::eventfd::EventFd;

pub use self::state::FunctionState;
use self::{common::Registers, lines::Lines};
use vm_memory::GuestAddressSpace;

use super::device::{
    Activation, ActiveQueue, DeviceRef, GuestRam, Interrupt, SharedMemory, VirtioDevice,
};
use crate::{
    event::{HandlerRef, LoopHandle},
    pci::{
        config::{ConfigSpace, Identity, VIRTIO_VENDOR},
        host::{Messages, NotifyRegistrar},
        msix::{self, Msix},
        pages::{Page, PAGE},
        PciFunction, BAR_SIZE,
    },
};

// Offsets in BAR 0.
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
/// As the table: it is memory, in BAR 2.
pub const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
/// Guests that a former version booted find their table here; all others have it
/// as memory, in BAR 1.
pub const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;
const REGION_SIZE: u64 = 0x1000;
/// Bytes between the notification addresses of two queues.
const NOTIFY_STRIDE: u64 = 4;

/// Vendor-specific capability (virtio 1.2 §4.1.4).
const VENDOR_CAPABILITY: u8 = 0x09;
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_SHARED_MEMORY: u8 = 8;

/// Where the interrupts' table is: its BAR, and offset 0.
const TABLE_BAR: u32 = 1;
/// And what the device says of itself.
const CONFIG_BAR: u8 = 2;
/// And the memory that it shares with the guest, if any.
const MEMORY_BAR: u8 = 4;
/// Bytes of a device's configuration; none has more.
const CONFIG_SIZE: usize = 256;

/// Enhanced Allocation (PCI Express 5.0 §7.8.5).
const ENHANCED_ALLOCATION: u8 = 0x14;

/// No vector (virtio 1.2 §4.1.5.1.2.1).
const NO_VECTOR: u16 = 0xffff;

/// Device status bits (virtio 1.2 §2.1).
mod status {
    pub const ACKNOWLEDGE: u8 = 1;
    pub const DRIVER: u8 = 2;
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
    pub const FAILED: u8 = 128;
}

/// A virtio device on the PCI bus: its configuration space and BAR 0.
pub struct VirtioPci {
    device: DeviceRef,
    handler: HandlerRef,
    memory: GuestRam,
    event_loop: LoopHandle,
    /// The queues' notifications, from a driver's first use of them on.
    kicks: Vec<OnceLock<EventFd>>,
    /// Which of them KVM raises itself. Changes under the registers' lock.
    raised: Vec<AtomicBool>,
    notify: Arc<dyn NotifyRegistrar>,
    lines: Arc<Lines>,
    at: Addresses,
    config: Mutex<ConfigSpace>,
    msix_control: usize,
    /// It has left the bus. Changes under the registers' lock.
    gone: AtomicBool,
    registers: Mutex<Registers>,
}

/// A driver works with the function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the guest uses it (status {status:#x}): have its agent remove the device first")]
pub struct InUse {
    /// The device's status (virtio 1.2 §2.1).
    pub status: u8,
}

/// Where a function's registers are in guest memory.
#[derive(Debug, Clone, Copy)]
pub struct Addresses {
    /// BAR 0, [`BAR_SIZE`] bytes.
    pub registers: u32,
    /// BAR 1, the page of its interrupts' table.
    pub table: u32,
    /// BAR 2, the page of the device's configuration.
    pub config: u32,
}

impl Addresses {
    fn notify(&self, queue: usize) -> u64 {
        u64::from(self.registers) + NOTIFY + queue as u64 * NOTIFY_STRIDE
    }
}

/// What a transport needs of the VM.
pub struct Wiring {
    /// Interrupts.
    pub messages: Arc<dyn Messages>,
    /// The memory of their table.
    pub table: Page,
    /// What the guest reads as the device's configuration.
    pub config: Page,
    /// Notifications.
    pub notify: Arc<dyn NotifyRegistrar>,
    /// Guest memory.
    pub memory: GuestRam,
    /// The loop the device works on.
    pub event_loop: LoopHandle,
}

impl VirtioPci {
    /// Puts `device` behind the registers there. `handler` is the same device
    /// as the event loop holds it.
    pub fn new(
        device: DeviceRef,
        handler: HandlerRef,
        at: Addresses,
        class: u32,
        wiring: Wiring,
    ) -> io::Result<Self> {
        let (id, sizes, features, shared) = {
            let device = device.lock().expect("a new device's lock is whole");
            (
                device.device_id(),
                device.queue_sizes().to_vec(),
                device.features(),
                device.shared_memory(),
            )
        };
        let msix = Msix::new(wiring.messages, wiring.table, sizes.len() as u16 + 1)?;
        let kicks = sizes.iter().map(|_| OnceLock::new()).collect();

        let mut config = ConfigSpace::new(Identity {
            vendor: VIRTIO_VENDOR,
            device: 0x1040 + id,
            class,
            revision: 1,
            subsystem: 0x40,
        });
        for (kind, bar, offset) in [
            (CFG_COMMON, 0, COMMON),
            (CFG_ISR, 0, ISR),
            (CFG_DEVICE, CONFIG_BAR, 0),
        ] {
            let body = vendor_capability(kind, bar, offset, None);
            config.add_capability(VENDOR_CAPABILITY, &body);
        }
        config.add_capability(
            VENDOR_CAPABILITY,
            &vendor_capability(CFG_NOTIFY, 0, NOTIFY, Some(NOTIFY_STRIDE as u32)),
        );
        let capability = config.add_capability(
            msix::CAPABILITY,
            &msix.capability(TABLE_BAR, PENDING as u32),
        );
        let msix_control = capability + 2;
        config.allow_writes(msix_control, &msix::CONTROL_WRITABLE.to_le_bytes());
        if let Some(shared) = shared {
            config.add_capability(VENDOR_CAPABILITY, &shared_memory(shared));
        }
        config.add_capability(ENHANCED_ALLOCATION, &fixed_bars(&at, shared));

        let vectors = (0..=sizes.len())
            .map(|_| AtomicU16::new(NO_VECTOR))
            .collect();
        let this = Self {
            device,
            handler,
            memory: wiring.memory,
            event_loop: wiring.event_loop,
            kicks,
            raised: sizes.iter().map(|_| AtomicBool::new(false)).collect(),
            notify: wiring.notify,
            lines: Arc::new(Lines {
                msix,
                vectors,
                config: Mutex::new(wiring.config),
                generation: AtomicU8::new(0),
                broken: AtomicBool::new(false),
                counters: Arc::default(),
            }),
            config: Mutex::new(config),
            at,
            msix_control,
            gone: AtomicBool::new(false),
            registers: Mutex::new(Registers::new(features, &sizes)),
        };
        this.show_config(&*this.device());
        Ok(this)
    }

    /// Shows the guest what the device says of itself.
    fn show_config(&self, device: &dyn VirtioDevice) {
        let mut config = [0; CONFIG_SIZE];
        device.read_config(0, &mut config);
        self.lines.show_config(&config);
    }

    fn device(&self) -> std::sync::MutexGuard<'_, dyn VirtioDevice + 'static> {
        self.device
            .lock()
            .expect("a device that panicked ended the process")
    }

    /// Takes the function out of the machine, whatever the guest does with it
    /// from now on: nothing of it is registered for notifications, with the
    /// interrupt router or the device's loop when this returns.
    ///
    /// # Errors
    /// A driver works with it; nothing has changed.
    pub fn detach(&self) -> Result<(), InUse> {
        let mut registers = self.registers();
        let status = registers.status;
        // One that has given up does not let go.
        if status & status::DRIVER != 0 && status & status::FAILED == 0 {
            return Err(InUse { status });
        }
        self.gone.store(true, Ordering::SeqCst);
        self.reset(&mut registers);
        drop(registers);
        self.withdraw();
        self.lines.msix.shut();
        Ok(())
    }

    fn is_gone(&self) -> bool {
        self.gone.load(Ordering::SeqCst)
    }

    /// Delivers interrupts that wait for nothing any more, now that the guest's
    /// writes to their table are told.
    pub fn settle_interrupts(&self) {
        self.lines.msix.settle();
    }

    /// Tells the device that guest memory has changed
    /// ([`VirtioDevice::memory_changed`]).
    pub fn memory_changed(&self) {
        self.device().memory_changed();
    }

    /// What the device has done.
    pub fn metrics(&self) -> DeviceMetrics {
        self.lines.counters.read()
    }

    /// Virtio device id (virtio 1.2 §5).
    pub fn device_id(&self) -> u16 {
        self.device().device_id()
    }

    /// The device's name.
    pub fn name(&self) -> String {
        self.device().name().to_owned()
    }

    /// The device's interrupts, for what changes outside of a queue.
    pub fn interrupt(&self) -> Arc<dyn Interrupt> {
        self.lines.clone()
    }

    fn config(&self) -> std::sync::MutexGuard<'_, ConfigSpace> {
        self.config
            .lock()
            .expect("no holder of the configuration's lock panics")
    }

    fn registers(&self) -> std::sync::MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .expect("no holder of the registers' lock panics")
    }

    fn write_status(&self, registers: &mut Registers, value: u8) {
        if value == 0 {
            self.reset(registers);
        } else {
            self.add_status(registers, value);
        }
        // It may have changed while nobody was to be told.
        self.show_config(&*self.device());
    }

    fn add_status(&self, registers: &mut Registers, value: u8) {
        let added = value & !registers.status;
        if added & (status::ACKNOWLEDGE | status::DRIVER) != 0 {
            // A driver sets up what it writes before it goes on by another
            // status, reads something or notifies.
            for (first, end) in common::SET_UP {
                let address = u64::from(self.at.registers) + COMMON + first;
                self.notify.gather_writes(address, (end - first) as u32);
            }
        }
        // Bits are only ever added, in the order of virtio 1.2 §3.1.1.
        if registers.status & !value != 0 {
            return;
        }
        if added & status::FEATURES_OK != 0 && !registers.features_acceptable() {
            // Left clear: the driver reads it back and gives up.
            registers.status |= value & !(status::FEATURES_OK | status::DRIVER_OK);
            return;
        }
        registers.status = value & !status::NEEDS_RESET;
        if added & status::DRIVER_OK == 0 {
            return;
        }
        let ready = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        if registers.status & ready == ready && registers.status & status::FAILED == 0 {
            self.activate(registers, false);
        } else {
            // Too early, or too late: as if it had not been said, so that the
            // status tells, also when it is restored, whether there is a driver.
            registers.status &= !status::DRIVER_OK;
        }
    }

    /// With `later`, KVM raises a queue's notifications from its first on: a
    /// clone has many queues of which its guest uses few, and telling KVM of one
    /// takes as long as six exits.
    fn activate(&self, registers: &Registers, later: bool) {
        let memory = self.memory.memory();
        let mut queues = Vec::new();
        for (index, setup) in registers.queues.iter().enumerate() {
            if !setup.enabled {
                continue;
            }
            let Some(queue) = setup.build(&memory, registers.event_idx()) else {
                limited!(warn, queue = index, "driver set a queue up wrongly");
                self.lines.device_broken();
                return;
            };
            let kick = self.kick(index).and_then(|kick| {
                if !later {
                    self.raise(index, kick)?;
                }
                kick.try_clone()
            });
            let kick = match kick {
                Ok(kick) => kick,
                Err(error) => {
                    limited!(error, %error, "no notifications of a queue");
                    self.lines.device_broken();
                    return;
                }
            };
            queues.push(ActiveQueue { index, queue, kick });
        }
        let activation = Activation {
            memory: self.memory.clone(),
            interrupt: self.lines.clone(),
            queues,
            features: registers.driver_features,
            event_loop: self.event_loop.clone(),
            handler: self.handler.clone(),
            counters: Arc::clone(&self.lines.counters),
        };
        let mut device = self.device();
        if let Err(error) = device.activate(activation) {
            limited!(error, device = device.name(), %error, "device not activated");
            self.lines.device_broken();
        }
    }

    fn reset(&self, registers: &mut Registers) {
        self.device().reset();
        for kick in self.kicks.iter().filter_map(OnceLock::get) {
            // Empties it; it may be empty.
            let _ = kick.read();
        }
        for vector in &self.lines.vectors {
            vector.store(NO_VECTOR, Ordering::Relaxed);
        }
        self.lines.broken.store(false, Ordering::SeqCst);
        registers.reset();
    }

    fn status(&self, registers: &Registers) -> u8 {
        let broken = self.lines.broken.load(Ordering::SeqCst);
        registers.status | if broken { status::NEEDS_RESET } else { 0 }
    }

    /// A vector the driver may use, or none.
    fn checked_vector(&self, value: u16) -> u16 {
        if usize::from(value) < self.lines.vectors.len() {
            value
        } else {
            NO_VECTOR
        }
    }
}

impl PciFunction for VirtioPci {
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    fn write_config(&self, offset: usize, data: &[u8]) {
        let mut config = self.config();
        let before = config.u16_at(self.msix_control);
        config.write(offset, data);
        let after = config.u16_at(self.msix_control);
        if before != after {
            self.lines.msix.set_control(after);
        }
    }

    fn read_bar(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset & !(REGION_SIZE - 1) {
            COMMON => self.read_common(offset - COMMON, data),
            DEVICE => self.device().read_config(offset - DEVICE, data),
            TABLE => self.lines.msix.read_table(offset - TABLE, data),
            PENDING => self.lines.msix.read_pending(offset - PENDING, data),
            // ISR: nothing, there are no lines to interrupt by.
            _ => {}
        }
    }

    fn write_bar(&self, offset: u64, data: &[u8]) {
        match offset & !(REGION_SIZE - 1) {
            COMMON => self.write_common(offset - COMMON, data),
            DEVICE => {
                let mut device = self.device();
                device.write_config(offset - DEVICE, data);
                self.show_config(&*device);
            }
            // Normally an ioeventfd takes it.
            NOTIFY => self.notified(((offset - NOTIFY) / NOTIFY_STRIDE) as usize),
            TABLE => self.lines.msix.write_table(offset - TABLE, data),
            _ => {}
        }
    }
}

/// The body of an Enhanced Allocation capability: BARs that are memory at fixed
/// addresses. Nobody need look for a place for them.
fn fixed_bars(at: &Addresses, shared: Option<SharedMemory>) -> Vec<u8> {
    /// Enabled; what else could be there is not; two more double words.
    const ENTRY: u32 = 1 << 31 | 0xff << 16 | 2;
    let page = PAGE as u32;
    let bars = [
        (at.registers, BAR_SIZE as u32),
        (at.table, page),
        (at.config, page),
    ];
    // How many; padding to a double word.
    let mut body = vec![(bars.len() + usize::from(shared.is_some())) as u8, 0];
    for (number, (address, size)) in (0_u32..).zip(bars) {
        for word in [ENTRY | number << 4, address, size - 4] {
            body.extend_from_slice(&word.to_le_bytes());
        }
    }
    if let Some(shared) = shared {
        /// Of an address, and of the offset of the last double word: another word
        /// is above it.
        const WIDE: u32 = 2;
        let entry = (ENTRY + 2) | (u32::from(MEMORY_BAR) << 4);
        let last = shared.size - 4;
        for word in [
            entry,
            shared.address as u32 | WIDE,
            last as u32 | WIDE,
            (shared.address >> 32) as u32,
            (last >> 32) as u32,
        ] {
            body.extend_from_slice(&word.to_le_bytes());
        }
    }
    body
}

/// `struct virtio_pci_cap64` after id and next pointer (virtio 1.2 §4.1.4.7): all
/// of a BAR.
fn shared_memory(shared: SharedMemory) -> Vec<u8> {
    let mut body = vec![24, CFG_SHARED_MEMORY, MEMORY_BAR, shared.id, 0, 0];
    for word in [0, shared.size as u32, 0, (shared.size >> 32) as u32] {
        body.extend_from_slice(&word.to_le_bytes());
    }
    body
}

/// `struct virtio_pci_cap` after id and next pointer.
fn vendor_capability(kind: u8, bar: u8, offset: u64, notify_multiplier: Option<u32>) -> Vec<u8> {
    let length = if notify_multiplier.is_some() { 20 } else { 16 };
    let mut body = vec![length, kind, bar, 0, 0, 0];
    body.extend_from_slice(&(offset as u32).to_le_bytes());
    body.extend_from_slice(&(REGION_SIZE as u32).to_le_bytes());
    if let Some(multiplier) = notify_multiplier {
        body.extend_from_slice(&multiplier.to_le_bytes());
    }
    body
}
