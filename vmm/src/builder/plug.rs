// SPDX-License-Identifier: Apache-2.0
//! The devices on the bus: plugged when the machine is built, or while it
//! runs, and unplugged when the guest has let go of them.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
};

use bulkhead_vmm_api::{
    BalloonConfig, BlkConfig, DeviceKind, DeviceStatus, FailureKind, FsConfig, MemConfig,
    NetConfig, PmemConfig, VsockConfig,
};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap, MmapRegion};

use super::{
    growth::{Backing, Growth, GrowthError, Saved},
    system,
    windows::Window,
    BuildError,
};
use crate::{
    arch::x86_64::layout,
    config::Devices,
    confine::{self, seccomp::Worker},
    event::{EventHandler, EventLoop, LoopHandle},
    kvm::vm::Vm,
    memory::WindowAllocator,
    pci::{
        pages::{Page, PAGE},
        PciRoot, BAR_SIZE,
    },
    snapshot::{state::MachineState, SnapshotError},
    virtio::{
        balloon::Balloon,
        blk::Blk,
        console::{self, Console},
        device::{GuestRam, VirtioDevice},
        fs::{self, Fs},
        mem::{Layout, Mem, SLOT},
        net::{Backend, Net},
        pmem::Pmem,
        rng::Rng,
        transport::{Addresses, InUse, VirtioPci, Wiring},
        vsock::Vsock,
    },
};

/// PCI class codes of what the devices are.
mod class {
    pub const COMMUNICATION: u32 = 0x07_8000;
    pub const STORAGE: u32 = 0x01_8000;
    pub const ETHERNET: u32 = 0x02_0000;
    pub const OTHER_NETWORK: u32 = 0x02_8000;
    pub const OTHER_MEMORY: u32 = 0x05_8000;
    pub const UNASSIGNED: u32 = 0xff_0000;
}

/// A device to be plugged.
pub(super) enum Item {
    Pmem(PmemConfig, File),
    Fs(FsConfig, OwnedFd),
    Vsock(VsockConfig, Option<OwnedFd>),
    Net(NetConfig, Backend),
    Blk(BlkConfig, File),
    Rng,
    Balloon(BalloonConfig),
    Mem(MemConfig),
    Console(console::Outputs),
}

/// Where a device is to be, as far as that is settled.
#[derive(Default)]
pub(super) struct Place {
    /// Its number on the bus; none: the lowest free one.
    slot: Option<u8>,
    /// The guest-physical address of the window of a pmem or fs device, and its
    /// size.
    window: Option<(u64, u64)>,
    /// What there was of memory that comes and goes.
    memory: Option<(Layout, Saved)>,
}

/// All devices, in the order of their slots: the guest image first, so that it
/// is /dev/pmem0.
pub(super) fn items(devices: Devices) -> Vec<Item> {
    let pmem = devices.pmem.into_iter();
    let mut items: Vec<_> = pmem
        .map(|(config, file)| Item::Pmem(config, file))
        .collect();
    let fs = devices.fs.into_iter();
    items.extend(fs.map(|(config, directory)| Item::Fs(config, directory)));
    let vsock = devices.vsock.into_iter();
    items.extend(vsock.map(|(config, listener)| Item::Vsock(config, listener)));
    let net = devices.net.into_iter();
    items.extend(net.map(|(config, backend)| Item::Net(config, backend)));
    let blk = devices.blk.into_iter();
    items.extend(blk.map(|(config, file)| Item::Blk(config, file)));
    items.extend(devices.rng.then_some(Item::Rng));
    items.extend(devices.balloon.map(Item::Balloon));
    items.extend(devices.mem.map(Item::Mem));
    items.extend(devices.console.map(Item::Console));
    items
}

/// Gives each device the place that one of its kind had in a snapshot's
/// machine, in order.
///
/// # Errors
/// They are not as many of each kind.
pub(super) fn arrange(
    devices: Devices,
    state: &MachineState,
    memory: &File,
) -> Result<Vec<(Item, Place)>, SnapshotError> {
    let mut left = items(devices);
    let mut arranged = Vec::new();
    for (slot, function) in state.slots.iter().zip(&state.functions) {
        let kind = kind_of(function.id);
        let found = left.iter().position(|item| Some(item.kind()) == kind);
        let Some(found) = found else {
            return Err(SnapshotError::Mismatch(match kind {
                Some(kind) => format!(
                    "the snapshot has a {} device in slot {slot}, and no other is given for it",
                    kind.name()
                ),
                None => format!(
                    "the snapshot has virtio device {} in slot {slot}, which this VMM has not",
                    function.id
                ),
            }));
        };
        let window = match kind {
            Some(DeviceKind::Pmem) => Pmem::window_in(function.device()),
            Some(DeviceKind::Fs) => Fs::window_in(function.device()),
            _ => None,
        };
        let memory = match (kind, Mem::layout_in(function.device())) {
            (Some(DeviceKind::Mem), Some(layout)) => {
                let file = memory.try_clone().map_err(|source| SnapshotError::File {
                    what: "use the memory file",
                    source,
                })?;
                let offset = state.memory_size;
                Some((layout, Saved { file, offset }))
            }
            _ => None,
        };
        let place = Place {
            slot: Some(*slot),
            window,
            memory,
        };
        arranged.push((left.remove(found), place));
    }
    match left.first() {
        Some(item) => Err(SnapshotError::Mismatch(format!(
            "{} is more than the snapshot has",
            item.name()
        ))),
        None => Ok(arranged),
    }
}

/// Bytes that a snapshot's memory file has after the memory that was always
/// there.
pub(super) fn grown(items: &[(Item, Place)]) -> u64 {
    let layouts = items.iter().filter_map(|(_, place)| place.memory.as_ref());
    layouts.map(|(layout, _)| layout.mapped_size()).sum()
}

/// The kind with a virtio device id.
fn kind_of(id: u16) -> Option<DeviceKind> {
    DeviceKind::ALL
        .into_iter()
        .find(|kind| kind.virtio_id() == id)
}

impl Item {
    fn kind(&self) -> DeviceKind {
        match self {
            Self::Pmem(..) => DeviceKind::Pmem,
            Self::Fs(..) => DeviceKind::Fs,
            Self::Vsock(..) => DeviceKind::Vsock,
            Self::Net(..) => DeviceKind::Net,
            Self::Blk(..) => DeviceKind::Blk,
            Self::Rng => DeviceKind::Rng,
            Self::Balloon(_) => DeviceKind::Balloon,
            Self::Mem(_) => DeviceKind::Mem,
            Self::Console(_) => DeviceKind::Console,
        }
    }

    fn id(&self) -> &str {
        match self {
            Self::Pmem(config, _) => &config.id,
            Self::Fs(config, _) => &config.tag,
            Self::Net(config, _) => &config.id,
            Self::Blk(config, _) => &config.id,
            Self::Vsock(..) | Self::Rng | Self::Balloon(_) | Self::Mem(_) | Self::Console(_) => "",
        }
    }

    /// For messages.
    fn name(&self) -> String {
        name(self.kind(), self.id())
    }
}

fn name(kind: DeviceKind, id: &str) -> String {
    match id {
        "" => kind.name().to_owned(),
        id => format!("{} {id:?}", kind.name()),
    }
}

/// The threads that devices work on.
pub(super) struct Loops {
    io: EventLoop,
    /// Requests for files block, so each shared directory that is there from
    /// the start has a thread of its own.
    files: Vec<EventLoop>,
    /// They rest until the machine goes on.
    paused: bool,
    /// There will be no more.
    complete: bool,
}

impl Loops {
    pub fn new(paused: bool) -> Result<Self, BuildError> {
        Ok(Self {
            io: rest(EventLoop::new().map_err(system(NO_LOOP))?, paused)?,
            files: Vec::new(),
            paused,
            complete: false,
        })
    }

    /// All of them, those first that may take long.
    pub fn iter(&self) -> impl Iterator<Item = &EventLoop> {
        self.files.iter().chain([&self.io])
    }

    /// From now on nobody but the threads for files can open any, and devices
    /// start no more threads.
    pub fn complete(&mut self) -> Result<(), BuildError> {
        confine::give_up()?;
        self.io
            .start("io", Worker::Devices)
            .map_err(system(NO_LOOP))?;
        self.complete = true;
        Ok(())
    }

    /// For a shared directory: a thread of its own, or the first one's.
    fn files(&mut self) -> Result<LoopHandle, BuildError> {
        if !self.complete {
            let files = EventLoop::spawn("fs", Worker::Files).map_err(system(NO_LOOP))?;
            self.files.push(rest(files, self.paused)?);
            return Ok(self.files[self.files.len() - 1].handle());
        }
        let shared = self.files.first().ok_or(BuildError::NoFiles)?;
        Ok(shared.handle())
    }
}

const NO_LOOP: &str = "event loop could not be started";

/// Lets a loop rest from its beginning, if `paused`.
fn rest(event_loop: EventLoop, paused: bool) -> Result<EventLoop, BuildError> {
    if paused && !event_loop.pause() {
        // It has nothing to do yet.
        return Err(system("event loop does not rest")(
            io::ErrorKind::TimedOut.into(),
        ));
    }
    Ok(event_loop)
}

/// A device on the bus.
pub(super) struct Plugged {
    pub(super) kind: DeviceKind,
    id: String,
    function: Arc<VirtioPci>,
    pub(super) window: Option<Window>,
}

/// Why a device is not unplugged.
#[derive(Debug, thiserror::Error)]
pub enum UnplugError {
    /// There is none.
    #[error("slot: there is no device in slot {slot}")]
    Absent {
        /// Asked for.
        slot: u8,
    },
    /// It stays as long as the machine.
    #[error("slot: {device} in slot {slot} cannot be unplugged: pmem, fs, net and blk can")]
    Fixed {
        /// Asked for.
        slot: u8,
        /// What is there.
        device: String,
    },
    /// The guest has not let go.
    #[error("{device} in slot {slot}")]
    InUse {
        /// Asked for.
        slot: u8,
        /// What is there.
        device: String,
        /// By the guest's driver.
        #[source]
        source: InUse,
    },
}

impl UnplugError {
    /// For the reply.
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Absent { .. } => FailureKind::InvalidRequest,
            Self::Fixed { .. } => FailureKind::Unsupported,
            Self::InUse { .. } => FailureKind::WrongState,
        }
    }
}

/// The bus with its devices, and what plugging more takes.
pub(super) struct Board {
    pub(super) vm: Arc<Vm>,
    ram: GuestRam,
    root: Arc<PciRoot>,
    /// The memory of all interrupts' tables.
    tables: Arc<MmapRegion>,
    pub(super) plugged: BTreeMap<u8, Plugged>,
    balloon: Option<Arc<Mutex<Balloon>>>,
    growth: Option<Growth>,
    pub(super) windows: WindowAllocator,
    backing: Backing,
    on_connect: Arc<dyn Fn(u32) + Send + Sync>,
}

impl Board {
    /// An empty bus.
    pub fn new(
        vm: Arc<Vm>,
        ram: GuestRam,
        root: Arc<PciRoot>,
        tables: Arc<MmapRegion>,
        windows: WindowAllocator,
        backing: Backing,
        on_connect: Arc<dyn Fn(u32) + Send + Sync>,
    ) -> Self {
        Self {
            vm,
            ram,
            root,
            tables,
            plugged: BTreeMap::new(),
            balloon: None,
            growth: None,
            windows,
            backing,
            on_connect,
        }
    }

    /// The functions with their slots, in the order of the bus.
    pub fn functions(&self) -> impl Iterator<Item = (u8, &Arc<VirtioPci>)> {
        let plugged = self.plugged.iter();
        plugged.map(|(slot, plugged)| (*slot, &plugged.function))
    }

    /// What is there.
    pub fn status(&self) -> Vec<DeviceStatus> {
        let plugged = self.plugged.iter();
        plugged
            .map(|(slot, plugged)| DeviceStatus {
                slot: *slot,
                kind: plugged.kind,
                id: plugged.id.clone(),
                metrics: plugged.function.metrics(),
            })
            .collect()
    }

    /// The balloon, where there is one.
    pub fn balloon(&self) -> Option<&Arc<Mutex<Balloon>>> {
        self.balloon.as_ref()
    }

    /// Memory that comes and goes, where there is such a device.
    pub fn growth(&self) -> Option<&Growth> {
        self.growth.as_ref()
    }

    /// Asks the guest to have `mib` MiB of that.
    pub fn grow_to(&mut self, mib: u32) -> Result<(), GrowthError> {
        let plugged = &self.plugged;
        let growth = self.growth.as_mut().ok_or(GrowthError::Absent)?;
        // Networks may have others reach memory; all others look at it each time.
        let networks = || plugged.values().filter(|one| one.kind == DeviceKind::Net);
        growth.set(mib, &|| {
            networks().for_each(|network| network.function.memory_changed());
        })
    }

    /// All of the guest's memory, as it is now.
    pub fn memory(&self) -> Arc<GuestMemoryMmap> {
        self.ram.memory().into_inner()
    }

    /// Shows the guest what was restored.
    pub fn refresh(&self) {
        self.root.refresh();
    }

    /// Puts a device on the bus; its slot. Nothing is left of one that cannot be
    /// made.
    pub fn plug(&mut self, item: Item, place: Place, loops: &mut Loops) -> Result<u8, BuildError> {
        let kind = item.kind();
        let id = item.id().to_owned();
        let named = |source| BuildError::Device {
            device: name(kind, &id),
            source,
        };
        let slot = match place.slot {
            Some(slot) => usize::from(slot),
            None => self.root.free_slot()?,
        };
        let taken = |plugged: &&Plugged| plugged.kind == kind && plugged.id == id;
        if loops.complete && self.plugged.values().any(|plugged| taken(&plugged)) {
            return Err(BuildError::Twice {
                device: name(kind, &id),
            });
        }
        let io = loops.io.handle();
        let mut window = None;
        let function = match item {
            Item::Pmem(config, file) => {
                let flush = (!config.read_only).then(|| file.try_clone()).transpose();
                let flush = flush.map_err(named)?;
                let made = self.window(file, config.read_only, place.window, &named)?;
                let size = made.mapping.size() as u64;
                let device = Pmem::new(&config.id, made.address, size, flush);
                window = Some(made);
                self.function(device, class::OTHER_MEMORY, io, slot)
            }
            Item::Fs(config, directory) => {
                let own = loops.files()?;
                // Files are opened on their own thread once this one may not. A
                // clone looks into the directory when its guest does.
                let device = match loops.complete || loops.paused {
                    true => Fs::unprepared(&config, directory),
                    false => Fs::new(&config, directory),
                };
                let device = device.map_err(named)?;
                window = self.dax_window(&config, place.window, loops.complete, &named)?;
                let device =
                    device.with_window(window.as_ref().map(|window| {
                        fs::Window::new(window.address, Arc::clone(&window.mapping))
                    }));
                self.function(device, class::STORAGE, own, slot)
            }
            Item::Vsock(config, listener) => {
                let device = Vsock::new(&config, listener, self.on_connect.clone());
                self.function(device.map_err(named)?, class::OTHER_NETWORK, io, slot)
            }
            Item::Net(config, backend) => {
                let device = Net::new(&config, backend).map_err(named)?;
                self.function(device, class::ETHERNET, io, slot)
            }
            Item::Blk(config, file) => {
                let device = Blk::new(&config, file).map_err(named)?;
                self.function(device, class::STORAGE, io, slot)
            }
            Item::Console(outputs) => {
                self.function(Console::new(outputs), class::COMMUNICATION, io, slot)
            }
            Item::Rng => self.function(Rng::new(), class::UNASSIGNED, io, slot),
            Item::Mem(config) => {
                let device = self.grow(config, place.memory, &named)?;
                self.shared_function(device, class::OTHER_MEMORY, io, slot)
            }
            Item::Balloon(config) => {
                let device = Arc::new(Mutex::new(Balloon::new(&config)));
                self.balloon = Some(Arc::clone(&device));
                self.shared_function(device, class::OTHER_MEMORY, io, slot)
            }
        };
        let added = function.map_err(named).and_then(|function| {
            let function = Arc::new(function);
            match self.root.add_at(slot, function.clone()) {
                Ok(()) => Ok(function),
                Err(full) => {
                    // No driver has seen it.
                    let _ = function.detach();
                    Err(full.into())
                }
            }
        });
        match added {
            Ok(function) => {
                let plugged = Plugged {
                    kind,
                    id,
                    function,
                    window,
                };
                // The bus has 32.
                let slot = slot as u8;
                self.plugged.insert(slot, plugged);
                Ok(slot)
            }
            Err(error) => {
                if let Some(window) = window {
                    self.close(window);
                }
                Err(error)
            }
        }
    }

    /// Takes a device off the bus that the guest has let go of.
    ///
    /// # Errors
    /// There is none, it cannot be, or the guest uses it: it stays.
    pub fn unplug(&mut self, slot: u8) -> Result<(), UnplugError> {
        let plugged = self
            .plugged
            .get(&slot)
            .ok_or(UnplugError::Absent { slot })?;
        let device = name(plugged.kind, &plugged.id);
        match plugged.kind {
            DeviceKind::Pmem | DeviceKind::Fs | DeviceKind::Net | DeviceKind::Blk => {}
            DeviceKind::Vsock
            | DeviceKind::Rng
            | DeviceKind::Balloon
            | DeviceKind::Mem
            | DeviceKind::Console => {
                return Err(UnplugError::Fixed { slot, device });
            }
        }
        plugged
            .function
            .detach()
            .map_err(|source| UnplugError::InUse {
                slot,
                device,
                source,
            })?;
        self.root.remove(usize::from(slot));
        if let Some(window) = self.plugged.remove(&slot).and_then(|gone| gone.window) {
            self.close(window);
        }
        Ok(())
    }

    /// Makes the device of memory that comes and goes, with its place in the
    /// guest.
    fn grow(
        &mut self,
        config: MemConfig,
        saved: Option<(Layout, Saved)>,
        named: &dyn Fn(io::Error) -> BuildError,
    ) -> Result<Arc<Mutex<Mem>>, BuildError> {
        let size = u64::from(config.max_mib) << 20;
        let base = match &saved {
            Some((layout, _)) => self
                .windows
                .reserve_at(layout.base, layout.size)
                .then_some(layout.base),
            None => self.windows.reserve_aligned(size, SLOT),
        };
        let base = base
            .ok_or_else(|| named(io::Error::other("there is no place for it in guest memory")))?;
        let device = Arc::new(Mutex::new(Mem::new(Layout::new(base, size))));
        let vm = Arc::clone(&self.vm);
        let mut growth = Growth::new(vm, self.ram.clone(), Arc::clone(&device), self.backing);
        if let Some((layout, saved)) = &saved {
            if layout.size == size {
                growth.restore(&layout.mapped, saved)?;
            }
            // Else it is told when its state is restored.
        }
        self.growth = Some(growth);
        Ok(device)
    }

    fn function<D: VirtioDevice + 'static>(
        &self,
        device: D,
        class: u32,
        event_loop: LoopHandle,
        slot: usize,
    ) -> io::Result<VirtioPci> {
        self.shared_function(Arc::new(Mutex::new(device)), class, event_loop, slot)
    }

    /// Of a device that the machine's owner speaks to as well.
    fn shared_function<D: VirtioDevice + 'static>(
        &self,
        device: Arc<Mutex<D>>,
        class: u32,
        event_loop: LoopHandle,
        slot: usize,
    ) -> io::Result<VirtioPci> {
        let handler: Arc<Mutex<dyn EventHandler>> = device.clone();
        // All lie below 4 GiB.
        let at = Addresses {
            registers: (layout::BAR_WINDOW + slot as u64 * BAR_SIZE) as u32,
            table: (layout::TABLE_WINDOW + (slot * PAGE) as u64) as u32,
            config: (layout::CONFIG_WINDOW + (slot * PAGE) as u64) as u32,
        };
        let no_page = || io::Error::other("there is no such device number");
        VirtioPci::new(
            device,
            Arc::downgrade(&handler),
            at,
            class,
            Wiring {
                messages: self.vm.clone(),
                table: Page::new(&self.tables, slot * PAGE).ok_or_else(no_page)?,
                config: self.root.page(slot).ok_or_else(no_page)?,
                notify: self.vm.clone(),
                memory: self.ram.clone(),
                event_loop,
            },
        )
    }
}
