// SPDX-License-Identifier: Apache-2.0
//! Assembles a VM from its checked configuration.

use std::{
    fs::File,
    io,
    os::fd::IntoRawFd,
    sync::{atomic::AtomicBool, Arc, Mutex, MutexGuard},
};

use bulkhead_vmm_api::{BalloonStatus, Exits, FailureKind};
use kvm_ioctls::{Kvm, VcpuFd};
use vm_memory::{
    FileOffset, GuestMemory, GuestMemoryAtomic, GuestMemoryMmap, GuestMemoryRegion, MmapRegion,
};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    arch::x86_64::{acpi, boot, cpuid, layout, regs},
    bus::{Bus, BusDevice, RangeError},
    config::{Devices, Resources, RestoreResources},
    confine::{self, jail::JailError, seccomp::Worker},
    event::{EventHandler, EventLoop, LoopHandle},
    generation::GenerationId,
    kvm::{
        state::{msrs_to_save, xsave_size, VcpuState, VmState},
        vcpu::{self, Buses, ExitCounters, Rest, Shared, VcpuThread},
        vm::Vm,
        KvmError,
    },
    memory::{self, MemoryError, WindowAllocator},
    pci::PciRoot,
    power::{KeyboardReset, OnEnd, PanicPort, PowerRegisters},
    serial::SerialPort,
    snapshot::{self, state::MachineState, SnapshotError},
    timeline::{Moment, Stamps},
    virtio::{
        balloon::Balloon,
        blk::Blk,
        device::{GuestRam, StateError, VirtioDevice},
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
    /// No memory for the bus's configuration space.
    #[error("PCI configuration space could not be mapped")]
    ConfigSpace(#[from] vm_memory::mmap::MmapRegionError),
    /// A snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The process cannot be confined.
    #[error(transparent)]
    Jail(#[from] JailError),
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
            Self::Snapshot(error) => error.kind(),
            Self::Memory(MemoryError::Size { .. }) => FailureKind::BadResource,
            Self::Jail(_)
            | Self::Memory(_)
            | Self::Device { .. }
            | Self::Range(_)
            | Self::ConfigSpace(_)
            | Self::System { .. } => FailureKind::System,
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
    /// The guest read its generation id for the first time. Called on a
    /// vCPU's thread.
    pub on_generation_read: Arc<dyn Fn() + Send + Sync>,
}

/// What a machine uses of the host that has a path: opened before the process
/// loses sight of it.
pub struct Host {
    kvm: Kvm,
    /// Which pages of this process exist.
    pagemap: File,
}

impl Host {
    /// Opens it.
    ///
    /// # Errors
    /// No KVM, no /proc.
    pub fn open() -> Result<Self, BuildError> {
        Ok(Self {
            kvm: Kvm::new().map_err(BuildError::OpenKvm)?,
            pagemap: snapshot::memory::open_pagemap()
                .map_err(system("/proc/self/pagemap cannot be opened"))?,
        })
    }
}

/// A VM, ready to run, running or paused. Dropping it stops its threads.
pub struct Machine {
    // Order matters: vCPUs stop first, then loops, then what they use.
    threads: Vec<VcpuThread>,
    vcpus: Vec<Arc<Mutex<VcpuFd>>>,
    loops: Vec<EventLoop>,
    shared: Arc<Shared>,
    serial: Arc<SerialPort>,
    stamps: Arc<Stamps>,
    memory: GuestMemoryMmap,
    root: Arc<PciRoot>,
    /// In the order of the bus.
    functions: Vec<Arc<VirtioPci>>,
    balloon: Option<Arc<Mutex<Balloon>>>,
    vm: Arc<Vm>,
    host: Arc<Host>,
    paused: bool,
    /// Mapped into the guest.
    _windows: Vec<MmapRegion>,
}

impl Machine {
    /// Builds the machine; nothing runs yet but idle event loops.
    pub fn build(
        host: Arc<Host>,
        resources: Resources,
        callbacks: &Callbacks,
        stamps: Arc<Stamps>,
    ) -> Result<Self, BuildError> {
        let mut resources = resources;
        let memory = memory::allocate(resources.memory_size)?;
        let huge = match (resources.huge_pages, &resources.merge_group) {
            (true, _) => 0..u64::MAX,
            // Merging would take huge pages apart first.
            (false, Some(_)) => 0..0,
            (false, None) => boot::extent(&mut resources.kernel),
        };
        memory::advise(&memory, huge);
        if let Some(held) = resources.merge_group.take() {
            // Closed by the kernel, which does so after it has given the memory
            // back, however this process ends.
            let _ = held.into_raw_fd();
            if let Err(error) = memory::merge(&memory) {
                tracing::warn!(%error, "guest memory cannot be merged");
            }
        }
        let vm = Arc::new(Vm::new(&host.kvm, &memory)?);
        let entry = boot::load(
            &memory,
            resources.memory_size,
            &mut resources.kernel,
            &resources.cmdline,
            resources.initrd.as_mut(),
        )?;
        boot::write_tables(&memory, &acpi::tables(resources.vcpus))?;
        let serial = SerialPort::new(resources.serial.take(), serial_interrupt(&vm)?);
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
        let parts = Parts {
            host,
            vm,
            memory,
            memory_size: resources.memory_size,
            vcpus,
            serial,
            paused: false,
        };
        parts.assemble(resources.devices, callbacks, stamps)
    }

    /// Builds a machine from a snapshot; it is paused.
    pub fn restore(
        host: Arc<Host>,
        resources: RestoreResources,
        callbacks: &Callbacks,
        stamps: Arc<Stamps>,
    ) -> Result<Self, BuildError> {
        let state = snapshot::state::read(&resources.state)?;
        let memory = memory::map_snapshot(state.memory_size, &resources.memory)?;
        let vm = Arc::new(Vm::new(&host.kvm, &memory)?);
        let interrupt = serial_interrupt(&vm)?;
        let serial = SerialPort::restore(state.serial.clone(), resources.serial, interrupt)
            .map_err(system("serial port"))?;
        let mut vcpus = Vec::new();
        for index in 0..state.vcpus.len() {
            // At most as many as a machine can have.
            vcpus.push(vm.create_vcpu(index as u8)?);
        }
        let parts = Parts {
            host,
            vm,
            memory,
            memory_size: state.memory_size,
            vcpus,
            serial,
            paused: true,
        };
        let machine = parts.assemble(resources.devices, callbacks, stamps)?;
        machine.restore_state(&state)?;
        Ok(machine)
    }

    /// Interrupt controllers first: a device may interrupt as soon as it has
    /// its state. When all have theirs the guest is told that it is a clone.
    /// The clock last, for it goes on.
    fn restore_state(&self, state: &MachineState) -> Result<(), SnapshotError> {
        if self.functions.len() != state.functions.len() {
            return Err(SnapshotError::Mismatch(format!(
                "{} devices for a snapshot with {}",
                self.functions.len(),
                state.functions.len()
            )));
        }
        state.vm.restore_irqchips(self.vm.fd())?;
        let xsave_size = xsave_size(&self.host.kvm);
        for (index, (vcpu, state)) in self.vcpus.iter().zip(&state.vcpus).enumerate() {
            state.restore(&lock(vcpu), xsave_size, index == 0)?;
        }
        for (index, (function, state)) in self.functions.iter().zip(&state.functions).enumerate() {
            function
                .restore(state)
                .map_err(|source| device_error(index, function, source))?;
        }
        self.root.refresh();
        self.vm.pulse_line(layout::GENERATION_IRQ)?;
        Ok(state.vm.restore_clock(self.vm.fd())?)
    }

    /// Lets the vCPUs run for the first time, and confines the calling thread to
    /// what it needs from now on.
    pub fn start(&mut self) -> Result<(), BuildError> {
        self.shared.rest.before_start();
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            let thread = VcpuThread::spawn(index as u8, Arc::clone(vcpu), Arc::clone(&self.shared))
                .map_err(system("vCPU thread could not be started"))?;
            self.threads.push(thread);
        }
        // These are all threads that there will be. The guest does not run
        // before everybody is confined.
        confine::enter(Worker::Control);
        self.shared.rest.wait_for(self.threads.len());
        self.loops.iter().for_each(EventLoop::wait_until_confined);
        self.stamps.set(Moment::KernelEntry);
        self.shared.rest.end();
        Ok(())
    }

    /// Makes vCPUs, then loops rest. False, and all go on, when one does not:
    /// the machine is about to end, or waits for the host.
    pub fn pause(&mut self) -> bool {
        if !self.paused {
            if !self.shared.rest.begin(&self.threads) {
                return false;
            }
            if !self.loops.iter().all(EventLoop::pause) {
                self.loops.iter().for_each(EventLoop::resume);
                self.shared.rest.end();
                return false;
            }
            self.paused = true;
        }
        true
    }

    /// Lets loops, then vCPUs go on.
    pub fn resume(&mut self) -> Result<(), BuildError> {
        if self.paused {
            self.paused = false;
            self.loops.iter().for_each(EventLoop::resume);
            if self.threads.is_empty() {
                return self.start();
            }
            self.shared.rest.end();
        }
        Ok(())
    }

    /// Whether it rests.
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// Writes a paused machine to the two files.
    ///
    /// # Errors
    /// A device cannot be saved as it is; a file cannot be written.
    pub fn snapshot(&self, state_file: &File, memory_file: &File) -> Result<(), SnapshotError> {
        let msrs = msrs_to_save(&self.host.kvm)?;
        let xsave_size = xsave_size(&self.host.kvm);
        // Devices first: they are what may refuse.
        let functions = self.functions.iter().enumerate().map(|(index, function)| {
            function
                .save()
                .map_err(|source| device_error(index, function, source))
        });
        let functions = functions.collect::<Result<_, _>>()?;
        let vcpus = self.vcpus.iter();
        let state = MachineState {
            memory_size: self.memory.iter().map(GuestMemoryRegion::len).sum(),
            functions,
            vm: VmState::save(self.vm.fd())?,
            vcpus: vcpus
                .map(|vcpu| VcpuState::save(&lock(vcpu), &msrs, xsave_size))
                .collect::<Result<_, _>>()?,
            serial: self.serial.save(),
        };
        snapshot::state::write(&state, state_file)?;
        snapshot::memory::write(&self.memory, &self.host.pagemap, memory_file)
            .map(|written| tracing::debug!(written, "memory written"))
            .map_err(|source| SnapshotError::File {
                what: "write the memory file",
                source,
            })
    }

    /// Exits counted so far.
    pub fn exits(&self) -> Exits {
        self.shared.exits.read()
    }

    /// Asks the guest for `mib` MiB of its memory.
    ///
    /// # Errors
    /// There is no balloon, or not so much memory.
    pub fn set_balloon(&self, mib: u32) -> Result<(), BalloonError> {
        let balloon = self.balloon.as_ref().ok_or(BalloonError::Absent)?;
        let size: u64 = self.memory.iter().map(GuestMemoryRegion::len).sum();
        if u64::from(mib) << 20 >= size {
            return Err(BalloonError::TooLarge {
                mib,
                memory_mib: size >> 20,
            });
        }
        lock_device(balloon).set_target(mib);
        Ok(())
    }

    /// How the balloon stands.
    pub fn balloon(&self) -> Option<BalloonStatus> {
        self.balloon
            .as_ref()
            .map(|balloon| lock_device(balloon).status())
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

/// Why the balloon has no other size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BalloonError {
    /// There is none.
    #[error("the VM has no balloon: configure one (devices.balloon)")]
    Absent,
    /// As large as the guest.
    #[error("mib: {mib} is not less than the guest's {memory_mib} MiB of memory")]
    TooLarge {
        /// Asked for.
        mib: u32,
        /// All there is.
        memory_mib: u64,
    },
}

fn lock_device(balloon: &Mutex<Balloon>) -> MutexGuard<'_, Balloon> {
    balloon
        .lock()
        .expect("a device that panicked ended the process")
}

fn lock(vcpu: &Mutex<VcpuFd>) -> MutexGuard<'_, VcpuFd> {
    vcpu.lock().expect("a vCPU that panicked ended the process")
}

fn device_error(index: usize, function: &VirtioPci, source: StateError) -> SnapshotError {
    SnapshotError::Device {
        // The host bridge is device 0.
        slot: index + 1,
        name: function.name(),
        source,
    }
}

/// The event that raises the serial port's line.
fn serial_interrupt(vm: &Vm) -> Result<EventFd, BuildError> {
    let event =
        EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(system("serial interrupt"))?;
    vm.router()
        .register_line(&event, layout::SERIAL_IRQ)
        .map_err(system("serial interrupt"))?;
    Ok(event)
}

/// What differs between a machine that boots and one that is restored.
struct Parts {
    host: Arc<Host>,
    vm: Arc<Vm>,
    memory: GuestMemoryMmap,
    memory_size: u64,
    vcpus: Vec<VcpuFd>,
    serial: Arc<SerialPort>,
    paused: bool,
}

impl Parts {
    /// Puts everything on the buses.
    fn assemble(
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
