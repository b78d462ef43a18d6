// SPDX-License-Identifier: Apache-2.0
//! Assembles a VM from its checked configuration.

use std::{
    fs::File,
    io,
    sync::{atomic::AtomicBool, Arc, Mutex},
};

use bulkhead_vmm_api::{Exits, FailureKind};
use kvm_ioctls::{Kvm, VcpuFd};
use vm_memory::{FileOffset, GuestMemoryAtomic, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    arch::x86_64::{acpi, boot, cpuid, layout, regs},
    bus::{Bus, BusDevice, RangeError},
    config::Resources,
    event::{EventHandler, EventLoop, LoopHandle},
    kvm::{
        vcpu::{self, Buses, ExitCounters, Shared, VcpuThread},
        vm::Vm,
        KvmError,
    },
    memory::{self, WindowAllocator},
    pci::PciRoot,
    power::{KeyboardReset, OnEnd, PanicPort, PowerRegisters},
    serial::SerialPort,
    timeline::{Moment, Stamps},
    virtio::{
        blk::Blk,
        device::{DeviceRef, GuestRam, VirtioDevice},
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

/// Why a VM could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// KVM refused.
    #[error("{0}")]
    Kvm(KvmError),
    /// No /dev/kvm.
    #[error("/dev/kvm cannot be opened")]
    OpenKvm(#[source] kvm_ioctls::Error),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] memory::MemoryError),
    /// The kernel.
    #[error(transparent)]
    Boot(#[from] boot::BootError),
    /// A device.
    #[error("{device} could not be made")]
    Device {
        /// Which.
        device: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// More devices than slots.
    #[error(transparent)]
    Bus(#[from] crate::pci::BusFull),
    /// The VMM's own layout is at fault.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// A thread or descriptor.
    #[error("{step}")]
    System {
        /// What was tried.
        step: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl From<KvmError> for BuildError {
    fn from(error: KvmError) -> Self {
        Self::Kvm(error)
    }
}

impl BuildError {
    /// For the reply.
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Kvm(_) | Self::OpenKvm(_) => FailureKind::Kvm,
            Self::Boot(_) => FailureKind::BadResource,
            Self::Bus(_) => FailureKind::InvalidRequest,
            Self::Memory(_) | Self::Device { .. } | Self::Range(_) | Self::System { .. } => {
                FailureKind::System
            }
        }
    }
}

fn system(step: &'static str) -> impl FnOnce(io::Error) -> BuildError {
    move |source| BuildError::System { step, source }
}

/// What the machine tells its owner.
#[derive(Clone)]
pub struct Callbacks {
    /// The guest, or KVM, ended the machine. Called on any thread, perhaps
    /// several times.
    pub on_end: OnEnd,
    /// The guest connected to a vsock port of the host.
    pub on_connect: Arc<dyn Fn(u32) + Send + Sync>,
}

/// A VM, ready to run or running. Dropping it stops its threads.
pub struct Machine {
    // Order matters: vCPUs stop first, then loops, then what they use.
    threads: Vec<VcpuThread>,
    vcpus: Vec<VcpuFd>,
    loops: Vec<EventLoop>,
    shared: Arc<Shared>,
    serial: Arc<SerialPort>,
    stamps: Arc<Stamps>,
    /// Devices and the windows mapped into the guest.
    _devices: Vec<DeviceRef>,
    _vm: Arc<Vm>,
    _windows: Vec<MmapRegion>,
}

impl Machine {
    /// Builds the machine; nothing runs yet but idle event loops.
    pub fn build(
        resources: Resources,
        callbacks: &Callbacks,
        stamps: Arc<Stamps>,
    ) -> Result<Self, BuildError> {
        let mut resources = resources;
        vcpu::install_kick_signal().map_err(system("vCPU signal"))?;
        let kvm = Kvm::new().map_err(BuildError::OpenKvm)?;
        let memory = memory::allocate(resources.memory_size)?;
        let vm = Arc::new(Vm::new(&kvm, &memory)?);

        let entry = boot::load(
            &memory,
            resources.memory_size,
            &mut resources.kernel,
            &resources.cmdline,
            resources.initrd.as_mut(),
        )?;
        boot::write_tables(&memory, &acpi::tables(resources.vcpus))?;

        let mut buses = Buses {
            pio: Bus::default(),
            mmio: Bus::default(),
        };
        let serial_event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(system("serial interrupt"))?;
        vm.router()
            .register_line(&serial_event, layout::SERIAL_IRQ)
            .map_err(system("serial interrupt"))?;
        let serial = SerialPort::new(resources.serial.take(), serial_event);
        buses
            .pio
            .insert(u64::from(layout::SERIAL_PORT), 8, serial.clone())?;
        let ends: [(u16, u64, Arc<dyn BusDevice>); 3] = [
            (
                layout::POWER_PORT,
                3,
                Arc::new(PowerRegisters(callbacks.on_end.clone())),
            ),
            (
                layout::KEYBOARD_COMMAND,
                1,
                Arc::new(KeyboardReset(callbacks.on_end.clone())),
            ),
            (
                layout::PVPANIC_PORT,
                1,
                Arc::new(PanicPort(callbacks.on_end.clone())),
            ),
        ];
        for (port, length, device) in ends {
            buses.pio.insert(u64::from(port), length, device)?;
        }

        let mut plug = Plug {
            vm: &vm,
            ram: GuestMemoryAtomic::new(memory),
            mmio: &mut buses.mmio,
            root: PciRoot::default(),
            devices: Vec::new(),
            windows: Vec::new(),
        };
        let loops = plug.all(resources_devices(&mut resources), callbacks)?;
        let Plug {
            root,
            devices,
            windows,
            ..
        } = plug;
        buses
            .mmio
            .insert(layout::ECAM, layout::ECAM_SIZE, Arc::new(root))?;

        let mut vcpus = Vec::new();
        for index in 0..resources.vcpus {
            let vcpu = vm.create_vcpu(index)?;
            let cpuid = cpuid::for_vcpu(vm.supported_cpuid(), index, resources.vcpus);
            vcpu.set_cpuid2(&cpuid)
                .map_err(crate::kvm::failed("CPUID"))?;
            regs::set_boot_msrs(&vcpu).map_err(crate::kvm::failed("MSRs"))?;
            if index == 0 {
                regs::set_pvh_entry(&vcpu, entry.0).map_err(crate::kvm::failed("registers"))?;
            }
            vcpus.push(vcpu);
        }
        Ok(Self {
            threads: Vec::new(),
            vcpus,
            loops,
            shared: Arc::new(Shared {
                buses,
                exits: ExitCounters::default(),
                on_end: callbacks.on_end.clone(),
                stop: AtomicBool::new(false),
            }),
            serial,
            stamps,
            _devices: devices,
            _vm: vm,
            _windows: windows,
        })
    }

    /// Lets the vCPUs run.
    pub fn start(&mut self) -> Result<(), BuildError> {
        self.stamps.set(Moment::KernelEntry);
        for (index, vcpu) in self.vcpus.drain(..).enumerate() {
            let thread = VcpuThread::spawn(index as u8, vcpu, Arc::clone(&self.shared))
                .map_err(system("vCPU thread could not be started"))?;
            self.threads.push(thread);
        }
        Ok(())
    }

    /// Exits counted so far.
    pub fn exits(&self) -> Exits {
        self.shared.exits.read()
    }

    /// Writes what the guest's last, unfinished line was.
    pub fn flush_serial(&self) {
        self.serial.flush();
    }

    /// How many event loops the machine has.
    pub fn loops(&self) -> usize {
        self.loops.len()
    }
}

/// The device part of the resources.
struct DeviceResources {
    pmem: Vec<(bulkhead_vmm_api::PmemConfig, File)>,
    fs: Vec<(bulkhead_vmm_api::FsConfig, std::os::fd::OwnedFd)>,
    vsock: Option<(bulkhead_vmm_api::VsockConfig, Option<std::os::fd::OwnedFd>)>,
    net: Vec<(bulkhead_vmm_api::NetConfig, File)>,
    blk: Vec<(bulkhead_vmm_api::BlkConfig, File)>,
    rng: bool,
    memory_size: u64,
}

fn resources_devices(resources: &mut Resources) -> DeviceResources {
    DeviceResources {
        pmem: std::mem::take(&mut resources.pmem),
        fs: std::mem::take(&mut resources.fs),
        vsock: resources.vsock.take(),
        net: std::mem::take(&mut resources.net),
        blk: std::mem::take(&mut resources.blk),
        rng: resources.rng,
        memory_size: resources.memory_size,
    }
}

/// Plugs devices into the bus.
struct Plug<'a> {
    vm: &'a Arc<Vm>,
    ram: GuestRam,
    mmio: &'a mut Bus,
    root: PciRoot,
    devices: Vec<DeviceRef>,
    windows: Vec<MmapRegion>,
}

impl Plug<'_> {
    /// All devices, in the order of their slots: the guest image first, so
    /// that it is /dev/pmem0. Returns the loops they work on.
    fn all(
        &mut self,
        resources: DeviceResources,
        callbacks: &Callbacks,
    ) -> Result<Vec<EventLoop>, BuildError> {
        let io = EventLoop::spawn("io").map_err(system("event loop could not be started"))?;
        let mut loops = Vec::new();
        let mut windows = WindowAllocator::new(resources.memory_size);
        let named = |device: String| move |source| BuildError::Device { device, source };
        for (config, file) in resources.pmem {
            let name = format!("pmem {}", config.id);
            let device = self.pmem(&config.id, file, config.read_only, &mut windows, &name)?;
            self.plug(device, class::OTHER_MEMORY, &io.handle(), &name)?;
        }
        for (config, directory) in resources.fs {
            let name = format!("fs {}", config.tag);
            // Its requests block, so it has a thread of its own.
            let own = EventLoop::spawn("fs").map_err(system("event loop could not be started"))?;
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
        loops.push(io);
        Ok(loops)
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
        let device = Arc::new(Mutex::new(device));
        let handler: Arc<Mutex<dyn EventHandler>> = device.clone();
        let bar = layout::BAR_WINDOW + self.root.next_slot() as u64 * transport::BAR_SIZE;
        let function = VirtioPci::new(
            device.clone(),
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
        self.root.add(function)?;
        self.devices.push(device);
        Ok(())
    }
}
