// SPDX-License-Identifier: Apache-2.0
//! The machine's life: built or restored, started, paused, resumed, saved.

use std::{
    fs::File,
    os::fd::IntoRawFd,
    sync::{atomic::Ordering, Arc, Mutex, MutexGuard},
};

use bulkhead_vmm_api::{BalloonStatus, DeviceStatus, Exits, MemoryStatus, Pages};
use kvm_ioctls::VcpuFd;
use vm_memory::{GuestMemory, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::{
    assemble::Parts,
    growth::{Backing, Growth, GrowthError},
    plug::{self, Board, Loops, Place, UnplugError},
    system, BuildError, Callbacks, Host,
};
use crate::{
    arch::x86_64::{acpi, boot, cpuid, image::Image, layout, regs},
    config::{Devices, Resources, RestoreResources},
    confine::{self, seccomp::Worker},
    event::EventLoop,
    kvm::{
        exits::ExitCounters,
        state::{check_features, msrs_to_save, xsave_size, VcpuState, VmState},
        vcpu::{Shared, VcpuThread},
        vm::{supported_cpuid, Vm},
    },
    memory,
    serial::SerialPort,
    snapshot::{self, state::MachineState, SnapshotError},
    timeline::{Moment, Stamps},
    virtio::{balloon::Balloon, device::StateError, transport::VirtioPci},
};

/// A VM, ready to run, running or paused. Dropping it stops its threads.
pub struct Machine {
    // Order matters: vCPUs stop first, then loops, then what they use.
    pub(super) threads: Vec<VcpuThread>,
    pub(super) vcpus: Vec<Arc<Mutex<VcpuFd>>>,
    pub(super) loops: Loops,
    pub(super) shared: Arc<Shared>,
    pub(super) serial: Arc<SerialPort>,
    pub(super) stamps: Arc<Stamps>,
    /// Bytes of memory that are always there.
    pub(super) memory_size: u64,
    pub(super) board: Board,
    pub(super) vm: Arc<Vm>,
    pub(super) host: Arc<Host>,
    pub(super) paused: bool,
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
        let memory = memory::allocate(resources.memory_size, resources.pages)?;
        let mut kernel = Image::new(&resources.kernel);
        let huge = match (resources.pages, &resources.merge_group) {
            (Pages::Transparent, _) => std::iter::once(0..u64::MAX).collect(),
            // Merging would take huge pages apart first; reserved ones are so anyway.
            (Pages::Small, Some(_)) | (Pages::Huge, _) => Vec::new(),
            (Pages::Small, None) => boot::dense(
                resources.memory_size,
                &mut kernel,
                resources.initrd.as_ref(),
            ),
        };
        memory::advise(&memory, &huge);
        let backing = Backing {
            pages: resources.pages,
            merge: resources.merge_group.is_some(),
        };
        if let Some(held) = resources.merge_group.take() {
            // Closed by the kernel, which does so after it has given the memory
            // back, however this process ends.
            let _ = held.into_raw_fd();
            if let Err(error) = memory::merge(&memory) {
                tracing::warn!(%error, "guest memory cannot be merged");
            }
        }
        stamps.set(Moment::MemoryMapped);
        let vm = Arc::new(Vm::new(&host.kvm, &memory)?);
        let entry = boot::load(
            &memory,
            resources.memory_size,
            &mut kernel,
            &resources.cmdline,
            resources.initrd.as_mut(),
        )?;
        let interrupt = serial_interrupt(&vm)?;
        let serial = SerialPort::new(resources.serial.take(), interrupt, Some(vm.clone()));
        let supported = supported_cpuid(&host.kvm)?;
        let mut vcpus = Vec::new();
        for index in 0..resources.vcpus {
            let vcpu = vm.create_vcpu(index)?;
            let cpuid = cpuid::for_vcpu(&supported, index, resources.vcpus);
            vcpu.set_cpuid2(&cpuid)
                .map_err(crate::kvm::failed("CPUID"))?;
            regs::set_boot_msrs(&vcpu).map_err(crate::kvm::failed("MSRs"))?;
            if index == 0 {
                regs::set_entry(&vcpu, entry).map_err(crate::kvm::failed("registers"))?;
            }
            vcpus.push(vcpu);
        }
        let parts = Parts {
            host,
            vm,
            memory: memory.clone(),
            memory_size: resources.memory_size,
            vcpus,
            serial,
            paused: false,
            backing,
        };
        let items = plug::items(resources.devices).into_iter();
        let items = items.map(|item| (item, Place::default())).collect();
        let machine = parts.assemble(items, callbacks, stamps)?;
        let tables = acpi::tables(resources.vcpus, &machine.board.dax_windows());
        boot::write_tables(&memory, &tables)?;
        machine.stamps.set(Moment::Assembled);
        Ok(machine)
    }

    /// Builds a machine from a snapshot; it is paused.
    pub fn restore(
        host: Arc<Host>,
        resources: RestoreResources,
        callbacks: &Callbacks,
        stamps: Arc<Stamps>,
    ) -> Result<Self, BuildError> {
        let state = snapshot::state::read(&resources.state)?;
        check_features(&state.vcpus, &host.kvm).map_err(SnapshotError::from)?;
        let items = plug::arrange(resources.devices, &state, &resources.memory)?;
        let grown = plug::grown(&items);
        let memory = memory::map_snapshot(state.memory_size, grown, &resources.memory)?;
        stamps.set(Moment::MemoryMapped);
        let vm = Arc::new(Vm::new(&host.kvm, &memory)?);
        let interrupt = serial_interrupt(&vm)?;
        let serial = SerialPort::restore(
            state.serial.clone(),
            resources.serial,
            interrupt,
            Some(vm.clone()),
        )
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
            backing: Backing::default(),
        };
        let machine = parts.assemble(items, callbacks, stamps)?;
        machine.stamps.set(Moment::Assembled);
        machine.restore_state(&state)?;
        machine.stamps.set(Moment::Restored);
        Ok(machine)
    }

    /// Interrupt controllers first: a device may interrupt as soon as it has
    /// its state. When all have theirs the guest is told that it is a clone.
    /// The clock last, for it goes on.
    fn restore_state(&self, state: &MachineState) -> Result<(), SnapshotError> {
        state.vm.restore_irqchips(self.vm.fd())?;
        let xsave_size = xsave_size(&self.host.kvm);
        for (index, (vcpu, state)) in self.vcpus.iter().zip(&state.vcpus).enumerate() {
            state.restore(&lock(vcpu), xsave_size, index == 0)?;
        }
        // As many, and of the same kinds: so they were arranged.
        for ((slot, function), state) in self.board.functions().zip(&state.functions) {
            function
                .restore(state)
                .map_err(|source| device_error(slot, function, source))?;
        }
        self.board.refresh();
        self.vm.pulse_line(layout::GENERATION_IRQ)?;
        Ok(state.vm.restore_clock(self.vm.fd())?)
    }

    /// Lets the vCPUs run for the first time, and confines the calling thread to
    /// what it needs from now on.
    pub fn start(&mut self) -> Result<(), BuildError> {
        give_back_heap();
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
            self.shared.drain();
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

    /// Does what the machine's own threads may not: they have said so
    /// ([`Callbacks::on_trap`]).
    ///
    /// # Errors
    /// It cannot be done.
    pub fn attend(&self) -> Result<(), BuildError> {
        if self.vm.unmap_tables()? {
            for (_, function) in self.board.functions() {
                function.settle_interrupts();
            }
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
        let slots = self.board.functions().map(|(slot, _)| slot).collect();
        let functions = self.board.functions().map(|(slot, function)| {
            function
                .save()
                .map_err(|source| device_error(slot, function, source))
        });
        let functions = functions.collect::<Result<_, _>>()?;
        let vcpus = self.vcpus.iter();
        let state = MachineState {
            memory_size: self.memory_size,
            slots,
            functions,
            vm: VmState::save(self.vm.fd())?,
            vcpus: vcpus
                .map(|vcpu| VcpuState::save(&lock(vcpu), &msrs, xsave_size))
                .collect::<Result<_, _>>()?,
            serial: self.serial.save(),
            windows: snapshot::state::WINDOWS.to_vec(),
        };
        snapshot::state::write(&state, state_file)?;
        snapshot::memory::write(&self.board.memory(), &self.host.pagemap, memory_file)
            .map(|written| tracing::debug!(written, "memory written"))
            .map_err(|source| SnapshotError::File {
                what: "write the memory file",
                source,
            })
    }

    /// Exits counted so far, of each vCPU.
    pub fn exits(&self) -> Vec<Exits> {
        let vcpus = self.shared.exits.iter();
        vcpus.map(ExitCounters::read).collect()
    }

    /// Asks the guest for `mib` MiB of its memory.
    ///
    /// # Errors
    /// There is no balloon, or not so much memory.
    pub fn set_balloon(&self, mib: u32) -> Result<(), BalloonError> {
        let balloon = self.board.balloon().ok_or(BalloonError::Absent)?;
        let memory = self.board.memory();
        if memory::is_reserved(&memory) {
            return Err(BalloonError::Reserved);
        }
        let size: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
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
        self.board
            .balloon()
            .map(|balloon| lock_device(balloon).status())
    }

    /// Asks the guest to have `mib` MiB beyond what it booted with.
    ///
    /// # Errors
    /// There is no such device, or so much cannot be.
    pub fn set_memory(&mut self, mib: u32) -> Result<(), GrowthError> {
        self.board.grow_to(mib)
    }

    /// How that memory stands.
    pub fn memory(&self) -> Option<MemoryStatus> {
        self.board.growth().map(Growth::status)
    }

    /// The vCPUs' threads, of a machine that has run.
    pub fn vcpu_threads(&self) -> Vec<u32> {
        let ids = self.shared.ids.iter();
        ids.map(|id| id.load(Ordering::Relaxed))
            .filter(|id| *id != 0)
            .collect()
    }

    /// Writes what the guest's last, unfinished line was.
    pub fn flush_serial(&self) {
        self.serial.flush();
    }

    /// How many event loops the machine has.
    pub fn loops(&self) -> usize {
        self.loops.iter().count()
    }

    /// What is on the PCI bus.
    pub fn devices(&self) -> Vec<DeviceStatus> {
        self.board.status()
    }

    /// Puts devices on the bus while the guest runs, or rests; the slot of the
    /// last one. The guest finds them when it looks at the bus again.
    ///
    /// # Errors
    /// One cannot be made, or the bus is full.
    pub fn plug(&mut self, devices: Devices) -> Result<Option<u8>, BuildError> {
        // What was written where there was nothing yet is not the device's.
        self.shared.drain();
        let mut last = None;
        for item in plug::items(devices) {
            last = Some(self.board.plug(item, Place::default(), &mut self.loops)?);
        }
        Ok(last)
    }

    /// Takes a device off the bus again.
    ///
    /// # Errors
    /// It cannot be, or the guest uses it.
    pub fn unplug(&mut self, slot: u8) -> Result<(), UnplugError> {
        self.shared.drain();
        self.board.unplug(slot)
    }
}

/// Why the balloon has no other size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BalloonError {
    /// There is none.
    #[error("the VM has no balloon: configure one (devices.balloon)")]
    Absent,
    /// Nothing would come of it.
    #[error("guest memory is in reserved huge pages, of which nothing is given back (pages)")]
    Reserved,
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

fn device_error(slot: u8, function: &VirtioPci, source: StateError) -> SnapshotError {
    SnapshotError::Device {
        slot: slot.into(),
        name: function.name(),
        source,
    }
}

/// Gives the host what building the machine took of the heap, and what is not
/// used any more: files that were read, most of all.
fn give_back_heap() {
    // SAFETY: the allocator's own affair; what is in use stays.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// The event that raises the serial port's line.
fn serial_interrupt(vm: &Vm) -> Result<EventFd, BuildError> {
    let event =
        EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(system("serial interrupt"))?;
    vm.register_line(&event, layout::SERIAL_IRQ)
        .map_err(system("serial interrupt"))?;
    Ok(event)
}
