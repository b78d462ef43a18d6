// SPDX-License-Identifier: Apache-2.0
//! What a virtio device is to the transport and to the VM's builder.
//!
//! The transport (virtio-pci) owns registers, features and queue set-up. On
//! DRIVER_OK it hands the queues over with [`VirtioDevice::activate`]; from
//! then on the device works them on its event loop. A device folder holds
//! `device.rs`, `event.rs`, `state.rs` and `tests.rs`.

use std::sync::{Arc, Mutex};

use virtio_queue::Queue;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::{chain::Queues, counters::Counters};
use crate::event::{EventHandler, HandlerRef, LoopHandle};

/// Guest memory as devices hold it: replaced as a whole on hotplug.
pub type GuestRam = GuestMemoryAtomic<GuestMemoryMmap>;

/// Raises a device's interrupts; the transport implements it.
pub trait Interrupt: Send + Sync {
    /// Tells the driver that queue `index` has used buffers. The device has
    /// asked the queue whether the driver wants to know.
    fn signal_queue(&self, index: usize);
    /// Says what the configuration space is from now on, all of it.
    fn show_config(&self, config: &[u8]);
    /// Tells the driver that it changed.
    fn signal_config(&self);
    /// Marks the device DEVICE_NEEDS_RESET (virtio 1.2 §2.1.2) and tells the
    /// driver: the driver broke a rule, and the device has stopped.
    fn device_broken(&self);
}

/// A queue the driver has set up.
pub struct ActiveQueue {
    /// Index in the device, from 0.
    pub index: usize,
    /// The split virtqueue.
    pub queue: Queue,
    /// The driver's notifications (an ioeventfd).
    pub kick: EventFd,
}

/// What a device gets on DRIVER_OK.
pub struct Activation {
    /// Guest memory.
    pub memory: GuestRam,
    /// To interrupt the driver.
    pub interrupt: Arc<dyn Interrupt>,
    /// The enabled queues.
    pub queues: Vec<ActiveQueue>,
    /// Features both sides agreed on.
    pub features: u64,
    /// The loop to register descriptors with (kicks and the device's own).
    pub event_loop: LoopHandle,
    /// The device itself, as the loop holds it.
    pub handler: HandlerRef,
    /// Where it counts what it does.
    pub counters: Arc<Counters>,
}

/// A region of guest-physical memory that belongs to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedMemory {
    /// Its number among the device's.
    pub id: u8,
    /// Where it is.
    pub address: u64,
    /// In bytes.
    pub size: u64,
}

/// Why a device could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver set the queues up in a way the device cannot work with.
    #[error("driver set queue {0} up wrongly")]
    BadQueue(usize),
    /// A system call failed.
    #[error("device could not {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
}

/// Why a state could not be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Not in this condition: says which, and what to do.
    #[error("{0}")]
    Busy(&'static str),
    /// The saved state is of another device, or damaged.
    #[error("{0}")]
    Unfit(String),
    /// It could not start to work again.
    #[error("cannot work again")]
    Activate(#[source] DeviceError),
}

/// A virtio device, seen from the transport. Events reach it through
/// [`EventHandler`].
pub trait VirtioDevice: EventHandler {
    /// Device id (virtio 1.2 §5).
    fn device_id(&self) -> u16;

    /// Name in logs and status.
    fn name(&self) -> &str;

    /// Largest size of each queue; its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Features offered, VIRTIO_F_VERSION_1 included.
    fn features(&self) -> u64;

    /// Reads the device-specific configuration at `offset`; what lies beyond
    /// its end reads as zero. Between DRIVER_OK and reset, what changes it
    /// otherwise than [`Self::write_config`] says so
    /// ([`Interrupt::show_config`]).
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes it; most devices have nothing writable.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Guest memory that is the device's (virtio 1.2 §2.10), for as long as there
    /// is one.
    fn shared_memory(&self) -> Option<SharedMemory> {
        None
    }

    /// DRIVER_OK: takes the queues and starts to work. Runs on a vCPU thread,
    /// so it only wires descriptors up.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;

    /// Stops and forgets the queues (virtio 1.2 §2.1.1, status 0). Every
    /// descriptor registered with the loop is unregistered on return.
    fn reset(&mut self);

    /// The queues between DRIVER_OK and reset.
    fn queues(&self) -> Option<&Queues>;

    /// Guest memory has changed, and what is not of it any more is about to be
    /// gone from this process.
    fn memory_changed(&mut self) {}

    /// Saves what the device knows besides its queues and features, while its
    /// loop rests.
    fn save(&mut self) -> Result<Vec<u8>, StateError>;

    /// Takes what [`Self::save`] gave, before it is activated.
    fn restore(&mut self, state: &[u8]) -> Result<(), StateError>;

    /// Tells the driver what is not as it was. Called once after a restore,
    /// while its loop rests, if the driver had activated the device.
    fn announce(&mut self) {}
}

/// A device as the transport and the builder hold it. The same allocation
/// serves as the loop's [`HandlerRef`] (upcast of the `Arc`).
pub type DeviceRef = Arc<Mutex<dyn VirtioDevice>>;

/// Reads from a configuration structure; what lies beyond its end is zero.
pub fn read_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|offset| config.get(offset..))
        .unwrap_or_default();
    let length = rest.len().min(data.len());
    data[..length].copy_from_slice(&rest[..length]);
    data[length..].fill(0);
}

/// For devices whose saved state is empty.
pub fn expect_empty(state: &[u8]) -> Result<(), StateError> {
    if state.is_empty() {
        Ok(())
    } else {
        Err(StateError::Unfit(format!(
            "{} bytes of state where none are",
            state.len()
        )))
    }
}
