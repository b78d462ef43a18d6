// SPDX-License-Identifier: Apache-2.0
//! Puts everything on the machine's buses.

use std::{
    fs::File,
    io,
    sync::{atomic::AtomicBool, Arc, Mutex},
};

use kvm_ioctls::VcpuFd;
use vm_memory::{FileOffset, GuestMemoryAtomic, GuestMemoryMmap, MmapRegion};

use super::{system, BuildError, Callbacks, Host, Machine};
use crate::{
    arch::x86_64::layout,
    bus::{Bus, BusDevice},
    config::Devices,
    confine::seccomp::Worker,
    event::{EventHandler, EventLoop, LoopHandle},
    generation::GenerationId,
    kvm::{
        vcpu::{self, Buses, ExitCounters, Rest, Shared},
        vm::Vm,
    },
    memory::WindowAllocator,
    pci::PciRoot,
    power::{KeyboardReset, PanicPort, PowerRegisters},
    serial::SerialPort,
    timeline::Stamps,
    virtio::{
        balloon::Balloon,
        blk::Blk,
        device::{GuestRam, VirtioDevice},
        fs::Fs,
        net::Net,
        pmem::Pmem,
        rng::Rng,
        transport::{self, VirtioPci, Wiring},
        vsock::Vsock,
    },
};

/// PCI class codes of what the devices are.
mod class {
    pub const STORAGE: u32 = 0x01_8000;
    pub const ETHERNET: u32 = 0x02_0000;
    pub const OTHER_NETWORK: u32 = 0x02_8000;
    pub const OTHER_MEMORY: u32 = 0x05_8000;
    pub const UNASSIGNED: u32 = 0xff_0000;
}

/// What differs between a machine that boots and one that is restored.
pub(super) struct Parts {
    pub host: Arc<Host>,
    pub vm: Arc<Vm>,
    pub memory: GuestMemoryMmap,
    pub memory_size: u64,
    pub vcpus: Vec<VcpuFd>,
    pub serial: Arc<SerialPort>,
    pub paused: bool,
}

impl Parts {
    /// Puts everything on the buses.
    pub fn assemble(
        self,
        devices: Devices,
        callbacks: &Callbacks,
        stamps: Arc<Stamps>,
    ) -> Result<Machine, BuildError> {
        vcpu::install_kick_signal().map_err(system("vCPU signal"))?;
        let mut buses = Buses {
            pio: Bus::default(),
            mmio: Bus::default(),
        };
        let on_end = || callbacks.on_end.clone();
        let ports: [(u16, u64, Arc<dyn BusDevice>); 4] = [
            (layout::SERIAL_PORT, 8, self.serial.clone()),
            (layout::POWER_PORT, 3, Arc::new(PowerRegisters(on_end()))),
            (
                layout::KEYBOARD_COMMAND,
                1,
                Arc::new(KeyboardReset(on_end())),
            ),
            (layout::PVPANIC_PORT, 1, Arc::new(PanicPort(on_end()))),
        ];
        for (port, length, device) in ports {
            buses.pio.insert(u64::from(port), length, device)?;
        }
        let on_read = callbacks.on_generation_read.clone();
        let generation = GenerationId::new(move || on_read()).map_err(system("generation id"))?;
        buses
            .mmio
            .insert(layout::GENERATION_ID, 0x1000, Arc::new(generation))?;
        let mut plug = Plug {
            vm: &self.vm,
            ram: GuestMemoryAtomic::new(self.memory.clone()),
            mmio: &mut buses.mmio,
            root: PciRoot::default(),
            functions: Vec::new(),
            balloon: None,
            windows: Vec::new(),
            paused: self.paused,
        };
        let loops = plug.all(devices, self.memory_size, callbacks)?;
        let Plug {
            root,
            functions,
            balloon,
            windows,
            ..
        } = plug;
        let root = Arc::new(root);
        root.show(|memory| {
            self.vm
                .map_window(layout::ECAM, memory, true)
                .map_err(BuildError::Kvm)
        })?;
        buses
            .mmio
            .insert(layout::ECAM, layout::ECAM_SIZE, root.clone())?;
        let vcpus = self.vcpus.into_iter();
        Ok(Machine {
            threads: Vec::new(),
            vcpus: vcpus.map(|vcpu| Arc::new(Mutex::new(vcpu))).collect(),
            loops,
            shared: Arc::new(Shared {
                buses,
                exits: ExitCounters::default(),
                on_end: callbacks.on_end.clone(),
                rest: Rest::default(),
                stop: AtomicBool::new(false),
            }),
            serial: self.serial,
            stamps,
            memory: self.memory,
            root,
            functions,
            balloon,
            vm: self.vm,
            host: self.host,
            paused: self.paused,
            _windows: windows,
        })
    }
}

/// Plugs devices into the bus.
struct Plug<'a> {
    vm: &'a Arc<Vm>,
    ram: GuestRam,
    mmio: &'a mut Bus,
    root: PciRoot,
    functions: Vec<Arc<VirtioPci>>,
    balloon: Option<Arc<Mutex<Balloon>>>,
    windows: Vec<MmapRegion>,
    /// Loops rest until the machine goes on.
    paused: bool,
}

impl Plug<'_> {
    /// All devices, in the order of their slots: the guest image first, so
    /// that it is /dev/pmem0. Returns the loops they work on.
    fn all(
        &mut self,
        resources: Devices,
        memory_size: u64,
        callbacks: &Callbacks,
    ) -> Result<Vec<EventLoop>, BuildError> {
        let io = self.event_loop("io", Worker::Devices)?;
        let mut loops = Vec::new();
        let mut windows = WindowAllocator::new(memory_size);
        let named = |device: String| move |source| BuildError::Device { device, source };
        for (config, file) in resources.pmem {
            let name = format!("pmem {}", config.id);
            let device = self.pmem(&config.id, file, config.read_only, &mut windows, &name)?;
            self.plug(device, class::OTHER_MEMORY, &io.handle(), &name)?;
        }
        for (config, directory) in resources.fs {
            let name = format!("fs {}", config.tag);
            // Its requests block, so it has a thread of its own.
            let own = self.event_loop("fs", Worker::Files)?;
            let device = Fs::new(&config, directory).map_err(named(name.clone()))?;
            self.plug(device, class::STORAGE, &own.handle(), &name)?;
            loops.push(own);
        }
        if let Some((config, listener)) = resources.vsock {
            let device = Vsock::new(&config, listener, callbacks.on_connect.clone())
                .map_err(named("vsock".into()))?;
            self.plug(device, class::OTHER_NETWORK, &io.handle(), "vsock")?;
        }
        for (config, tap) in resources.net {
            let name = format!("net {}", config.id);
            let device = Net::new(&config, tap).map_err(named(name.clone()))?;
            self.plug(device, class::ETHERNET, &io.handle(), &name)?;
        }
        for (config, file) in resources.blk {
            let name = format!("blk {}", config.id);
            let device = Blk::new(&config, file).map_err(named(name.clone()))?;
            self.plug(device, class::STORAGE, &io.handle(), &name)?;
        }
        if resources.rng {
            self.plug(Rng::new(), class::UNASSIGNED, &io.handle(), "rng")?;
        }
        if let Some(config) = resources.balloon {
            let device = Arc::new(Mutex::new(Balloon::new(&config)));
            self.balloon = Some(device.clone());
            self.plug_shared(device, class::OTHER_MEMORY, &io.handle(), "balloon")?;
        }
        loops.push(io);
        Ok(loops)
    }

    fn event_loop(&self, name: &str, worker: Worker) -> Result<EventLoop, BuildError> {
        let event_loop =
            EventLoop::spawn(name, worker).map_err(system("event loop could not be started"))?;
        if self.paused && !event_loop.pause() {
            // It has nothing to do yet.
            return Err(system("event loop does not rest")(
                io::ErrorKind::TimedOut.into(),
            ));
        }
        Ok(event_loop)
    }

    fn pmem(
        &mut self,
        id: &str,
        file: File,
        read_only: bool,
        windows: &mut WindowAllocator,
        name: &str,
    ) -> Result<Pmem, BuildError> {
        let failed = |source| BuildError::Device {
            device: name.to_owned(),
            source,
        };
        let size = file.metadata().map_err(failed)?.len();
        let protection = if read_only {
            libc::PROT_READ
        } else {
            libc::PROT_READ | libc::PROT_WRITE
        };
        let flush = file.try_clone().map_err(failed)?;
        let mapping = MmapRegion::build(
            Some(FileOffset::new(file, 0)),
            size as usize,
            protection,
            libc::MAP_SHARED | libc::MAP_NORESERVE,
        )
        .map_err(|error| failed(io::Error::other(error)))?;
        let address = windows.reserve(size);
        self.vm.map_window(address, &mapping, read_only)?;
        self.windows.push(mapping);
        Ok(Pmem::new(id, address, size, (!read_only).then_some(flush)))
    }

    fn plug<D: VirtioDevice + 'static>(
        &mut self,
        device: D,
        class: u32,
        event_loop: &LoopHandle,
        name: &str,
    ) -> Result<(), BuildError> {
        self.plug_shared(Arc::new(Mutex::new(device)), class, event_loop, name)
    }

    /// A device that the machine's owner speaks to as well.
    fn plug_shared<D: VirtioDevice + 'static>(
        &mut self,
        device: Arc<Mutex<D>>,
        class: u32,
        event_loop: &LoopHandle,
        name: &str,
    ) -> Result<(), BuildError> {
        let handler: Arc<Mutex<dyn EventHandler>> = device.clone();
        let bar = layout::BAR_WINDOW + self.root.next_slot() as u64 * transport::BAR_SIZE;
        let function = VirtioPci::new(
            device,
            Arc::downgrade(&handler),
            bar as u32,
            class,
            Wiring {
                router: self.vm.router().clone(),
                notify: self.vm.as_ref(),
                memory: self.ram.clone(),
                event_loop: event_loop.clone(),
            },
        )
        .map_err(|source| BuildError::Device {
            device: name.to_owned(),
            source,
        })?;
        let function = Arc::new(function);
        self.mmio
            .insert(bar, transport::BAR_SIZE, function.clone())?;
        self.root.add(function.clone())?;
        self.functions.push(function);
        Ok(())
    }
}
