// SPDX-License-Identifier: Apache-2.0
//! A bus with one function on it, whose device works when it is told to, on the
//! calling thread.

use std::{
    fs::File,
    io,
    path::Path,
    sync::{Arc, Mutex, OnceLock},
};

use bulkhead_vmm::{
    bus::BusDevice,
    confine::seccomp::Worker,
    event::{EventHandler, EventLoop},
    pci::{
        host::{Message, Messages, NotifyRegistrar},
        pages::Page,
        BarWindow, PciRoot, BAR_SIZE,
    },
    virtio::{
        balloon::Balloon,
        blk::Blk,
        device::DeviceRef,
        mem::{Layout, Mem, SLOT},
        net::{Backend, Net},
        pmem::Pmem,
        rng::Rng,
        transport::{Addresses, VirtioPci, Wiring},
        vsock::Vsock,
    },
};
use bulkhead_vmm_api::{BalloonConfig, BlkConfig, NetConfig, VsockConfig};
use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd, tempfile::TempFile};

/// Bytes of guest memory.
pub const MEMORY: usize = 0x4_0000;
/// Kinds of devices that there are.
pub const KINDS: u8 = 7;
/// Where the function is on the bus.
pub const SLOT_NUMBER: usize = 1;
/// Where registers begin.
const REGISTERS: u32 = 0xc000_0000;

struct Nobody;

impl EventHandler for Nobody {
    fn handle(&mut self, _: u32, _: EventSet) {}
}

impl Messages for Nobody {
    fn send(&self, _: Message) -> io::Result<()> {
        Ok(())
    }
    fn trap_tables(&self) {}
}

impl NotifyRegistrar for Nobody {
    fn register_notify(&self, _: &EventFd, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn unregister_notify(&self, _: &EventFd, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn gather_writes(&self, _: u64, _: u32) {}
    fn gather_port_writes(&self, _: u16, _: u32) {}
}

/// A file in memory.
pub fn file(size: u64) -> File {
    let file = TempFile::new_in(Path::new("/dev/shm")).expect("a file");
    let file = file.into_file();
    file.set_len(size).expect("its size");
    file
}

/// A device of the kind with that number.
fn device(kind: u8) -> DeviceRef {
    match kind % KINDS {
        0 => Arc::new(Mutex::new(Rng::new())),
        1 => Arc::new(Mutex::new(Balloon::new(&BalloonConfig::default()))),
        2 => Arc::new(Mutex::new(Pmem::new("p", 1 << 32, 2 << 20, None))),
        3 => Arc::new(Mutex::new(Mem::new(Layout::new(0, 2 * SLOT)))),
        4 => {
            let config = BlkConfig {
                id: "b".into(),
                queues: Some(2),
                ..BlkConfig::default()
            };
            Arc::new(Mutex::new(Blk::new(&config, file(8192)).expect("a disk")))
        }
        5 => {
            let config = NetConfig {
                id: "n".into(),
                tap: 0,
                mac: [2, 0, 0, 0, 0, 1],
                mtu: Some(1500),
                more_queues: vec![0],
                ..NetConfig::default()
            };
            let tap = |_| File::open("/dev/null").expect("/dev/null");
            let backend = Backend {
                taps: (0..2).map(tap).collect(),
                vhost: None,
            };
            Arc::new(Mutex::new(
                Net::new(&config, backend).expect("an interface"),
            ))
        }
        _ => {
            let config = VsockConfig {
                cid: 3,
                listener: None,
                uds_path: "/nowhere/v".into(),
                ready_port: None,
            };
            let vsock = Vsock::new(&config, None, Arc::new(|_| ()));
            Arc::new(Mutex::new(vsock.expect("a device")))
        }
    }
}

/// The bus.
#[allow(dead_code)] // the targets use one or the other
pub struct Machine {
    /// The guest's.
    pub memory: GuestMemoryMmap,
    /// Configuration space.
    pub root: Arc<PciRoot>,
    /// Registers.
    pub window: BarWindow,
    /// What is on the bus.
    pub function: Arc<VirtioPci>,
    /// The table of its interrupts, which the guest writes without anybody's
    /// knowing.
    pub table: Page,
    device: DeviceRef,
    /// The loop's, which has nothing to do.
    _handler: Arc<Mutex<dyn EventHandler>>,
}

#[allow(dead_code)]
impl Machine {
    /// With a device of a kind.
    pub fn new(kind: u8) -> Self {
        Self::with(kind, vm_memory())
    }

    /// With that memory.
    pub fn with(kind: u8, memory: GuestMemoryMmap) -> Self {
        static LOOP: OnceLock<EventLoop> = OnceLock::new();
        let event_loop =
            LOOP.get_or_init(|| EventLoop::spawn("fuzz", Worker::Devices).expect("an event loop"));
        let root = PciRoot::new(Arc::new(Nobody), 0xe800_0000).expect("memory");
        let root = Arc::new(root);
        let device = device(kind);
        let handler: Arc<Mutex<dyn EventHandler>> = Arc::new(Mutex::new(Nobody));
        let table = Page::alone().expect("memory");
        let wiring = Wiring {
            messages: Arc::new(Nobody),
            table: table.clone(),
            config: root.page(SLOT_NUMBER).expect("a page"),
            notify: Arc::new(Nobody),
            memory: GuestMemoryAtomic::new(memory.clone()),
            event_loop: event_loop.handle(),
        };
        let at = Addresses {
            registers: REGISTERS + SLOT_NUMBER as u32 * BAR_SIZE as u32,
            table: 0xc010_1000,
            config: 0xe810_1000,
        };
        let weak = Arc::downgrade(&handler);
        let function = VirtioPci::new(Arc::clone(&device), weak, at, 0, wiring);
        let function = Arc::new(function.expect("a function"));
        let slot = root.add(Arc::clone(&function) as _).expect("an empty bus");
        assert_eq!(slot, SLOT_NUMBER);
        Self {
            memory,
            window: BarWindow::all(Arc::clone(&root)),
            root,
            function,
            table,
            device,
            _handler: handler,
        }
    }

    /// Writes a register of the function's.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        let base = SLOT_NUMBER as u64 * BAR_SIZE;
        self.window.write(base + offset, bytes);
    }

    /// Lets the device work on an event.
    pub fn event(&self, token: u32) {
        let mut device = self.device.lock().expect("a panic has ended this");
        device.handle(token, EventSet::IN);
    }

    /// How many queues it has.
    pub fn queues(&self) -> usize {
        let device = self.device.lock().expect("a panic has ended this");
        device.queue_sizes().len()
    }
}

impl Drop for Machine {
    /// As when the machine ends: nothing is left with the loop.
    fn drop(&mut self) {
        self.device.lock().expect("a panic has ended this").reset();
    }
}

/// Memory of a guest.
pub fn vm_memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory")
}
