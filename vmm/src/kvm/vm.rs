// SPDX-License-Identifier: Apache-2.0
//! The VM's descriptor, its memory slots, interrupts and notifications.

use std::{
    collections::BTreeSet,
    io,
    sync::{
        atomic::{AtomicBool, AtomicU32, Ordering},
        Arc, Mutex, MutexGuard, OnceLock,
    },
};

use kvm_bindings::{
    kvm_msi, kvm_userspace_memory_region, CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY,
};
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use vm_memory::{
    Address, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};
use vmm_sys_util::eventfd::EventFd;

use super::{failed, KvmError};
use crate::{
    arch::x86_64::{cpuid, layout},
    pci::host::{Message, Messages, NotifyRegistrar},
};

/// KVM_CREATE_VM fails with EINTR when a signal is pending, for no reason of
/// the caller's.
const CREATE_TRIES: u32 = 5;

/// Called once, on any thread.
pub type OnTrap = Arc<dyn Fn() + Send + Sync>;

/// A KVM virtual machine.
pub struct Vm {
    fd: VmFd,
    next_slot: AtomicU32,
    /// Slots that were given back.
    free_slots: Mutex<Vec<u32>>,
    /// Of all MSI-X tables, while they are memory.
    tables: Mutex<Option<MemorySlot>>,
    tables_memory: OnceLock<Arc<MmapRegion>>,
    /// They are not to be memory any more.
    trap_asked: AtomicBool,
    /// Tells who may change that.
    on_trap: OnceLock<OnTrap>,
    /// Where writes are gathered: for as long as there is a machine, whatever
    /// comes and goes there.
    gathering: Mutex<BTreeSet<u64>>,
    /// Mapped into slots: must outlive the machine.
    _memory: GuestMemoryMmap,
}

impl Vm {
    /// Makes the machine with its interrupt controllers and gives it `memory`.
    pub fn new(kvm: &Kvm, memory: &GuestMemoryMmap) -> Result<Self, KvmError> {
        let mut tries = 1;
        let fd = loop {
            match kvm.create_vm() {
                Err(error) if error.errno() == libc::EINTR && tries < CREATE_TRIES => tries += 1,
                other => break other.map_err(failed("no VM can be made"))?,
            }
        };
        // Needed on Intel processors, before the first vCPU.
        fd.set_tss_address(layout::KVM_TSS as usize)
            .map_err(failed("TSS address"))?;
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(failed("identity map address"))?;
        // Local APICs and I/O APIC in the kernel. No PIT: the guest is
        // hardware-reduced and has the TSC deadline timer and kvmclock.
        fd.create_irq_chip()
            .map_err(failed("interrupt controllers"))?;
        let vm = Self {
            fd,
            next_slot: AtomicU32::new(0),
            free_slots: Mutex::new(Vec::new()),
            tables: Mutex::new(None),
            tables_memory: OnceLock::new(),
            trap_asked: AtomicBool::new(false),
            on_trap: OnceLock::new(),
            gathering: Mutex::default(),
            _memory: memory.clone(),
        };
        for region in memory.iter() {
            vm.map_region(region)?;
        }
        Ok(vm)
    }

    /// Makes vCPU number `index`.
    pub fn create_vcpu(&self, index: u8) -> Result<VcpuFd, KvmError> {
        self.fd
            .create_vcpu(u64::from(index))
            .map_err(failed("no vCPU can be made"))
    }

    /// The descriptor.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// Lets `event` raise line `gsi` of the I/O APIC.
    pub fn register_line(&self, event: &EventFd, gsi: u32) -> io::Result<()> {
        self.fd.register_irqfd(event, gsi).map_err(Into::into)
    }

    /// Raises and lowers a line of the I/O APIC, for an edge.
    pub fn pulse_line(&self, gsi: u32) -> Result<(), KvmError> {
        for active in [true, false] {
            self.fd
                .set_irq_line(gsi, active)
                .map_err(failed("interrupt line"))?;
        }
        Ok(())
    }

    /// Maps a mapping of a file (virtio-pmem), or of what the VMM shows, at a
    /// guest-physical address. The caller keeps `mapping` as long as the machine
    /// lives, or until [`Self::unmap_window`] with the slot that is returned.
    pub fn map_window(
        &self,
        guest_address: u64,
        mapping: &MmapRegion,
        read_only: bool,
    ) -> Result<MemorySlot, KvmError> {
        self.add_slot(
            guest_address,
            mapping.size() as u64,
            mapping.as_ptr() as u64,
            read_only,
        )
    }

    /// Gives the guest the memory of all MSI-X tables, once, until it is to be
    /// taken away: then `on_trap` has somebody call [`Self::unmap_tables`].
    pub fn map_tables(&self, memory: Arc<MmapRegion>, on_trap: OnTrap) -> Result<(), KvmError> {
        let _ = self.on_trap.set(on_trap);
        let memory = self.tables_memory.get_or_init(|| memory);
        let slot = self.map_window(layout::TABLE_WINDOW, memory, false)?;
        *self.tables() = Some(slot);
        Ok(())
    }

    /// Takes the tables' memory away, if that was asked for and is not done yet;
    /// whether it was just now.
    pub fn unmap_tables(&self) -> Result<bool, KvmError> {
        if !self.trap_asked.load(Ordering::SeqCst) {
            return Ok(false);
        }
        let slot = self.tables().take();
        slot.map_or(Ok(false), |slot| self.unmap_window(slot).map(|()| true))
    }

    fn tables(&self) -> MutexGuard<'_, Option<MemorySlot>> {
        self.tables
            .lock()
            .expect("no holder of the tables' lock panics")
    }

    /// Gives the guest a region of memory, which the caller keeps as it does a
    /// window's mapping.
    pub fn map_region(&self, region: &GuestRegionMmap) -> Result<MemorySlot, KvmError> {
        self.add_slot(
            region.start_addr().raw_value(),
            region.len(),
            region.as_ptr() as u64,
            false,
        )
    }

    /// Takes a window, or a region, out of the guest: its accesses there reach
    /// nothing.
    pub fn unmap_window(&self, slot: MemorySlot) -> Result<(), KvmError> {
        let region = kvm_userspace_memory_region {
            slot: slot.0,
            ..Default::default()
        };
        // SAFETY: a size of zero removes the slot; no memory is referred to.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(failed("memory slot"))?;
        self.free_slots().push(slot.0);
        Ok(())
    }

    fn free_slots(&self) -> MutexGuard<'_, Vec<u32>> {
        self.free_slots
            .lock()
            .expect("no holder of the slots' lock panics")
    }

    fn add_slot(
        &self,
        guest_address: u64,
        size: u64,
        host_address: u64,
        read_only: bool,
    ) -> Result<MemorySlot, KvmError> {
        let free = self.free_slots().pop();
        let slot = free.unwrap_or_else(|| self.next_slot.fetch_add(1, Ordering::Relaxed));
        let region = kvm_userspace_memory_region {
            slot,
            flags: if read_only { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: guest_address,
            memory_size: size,
            userspace_addr: host_address,
        };
        // SAFETY: the range is a whole mapping of guest memory or of a window;
        // the former is kept by `self`, the latter by the caller, and Rust
        // code reaches it only by volatile access.
        match unsafe { self.fd.set_user_memory_region(region) } {
            Ok(()) => Ok(MemorySlot(slot)),
            Err(error) => {
                self.free_slots().push(slot);
                Err(failed("memory slot")(error))
            }
        }
    }
}

impl Vm {
    /// Once for each zone, which `number` tells apart.
    fn gather(&self, number: u64, zone: IoEventAddress, size: u32) {
        let mut gathering = self.gathering.lock().expect("no holder of the set panics");
        if !gathering.insert(number) {
            return;
        }
        if let Err(error) = self.fd.register_coalesced_mmio(zone, size) {
            tracing::warn!(%error, "writes are not gathered");
        }
    }
}

/// What CPUID may say here.
pub fn supported_cpuid(kvm: &Kvm) -> Result<CpuId, KvmError> {
    let mut supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(failed("supported CPUID"))?;
    cpuid::mend_for_emulator(&mut supported, cpuid::host_signature());
    Ok(supported)
}

/// A part of guest-physical memory, to be given back.
#[derive(Debug, PartialEq, Eq)]
pub struct MemorySlot(u32);

impl Messages for Vm {
    fn send(&self, message: Message) -> io::Result<()> {
        // Without a table of routes, of which every change takes the kernel a
        // grace period.
        let message = kvm_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..Default::default()
        };
        self.fd.signal_msi(message).map(drop).map_err(Into::into)
    }

    fn trap_tables(&self) {
        if self.trap_asked.swap(true, Ordering::SeqCst) {
            return;
        }
        if let Some(on_trap) = self.on_trap.get() {
            on_trap();
        }
    }
}

impl NotifyRegistrar for Vm {
    fn register_notify(&self, event: &EventFd, address: u64) -> io::Result<()> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(Into::into)
    }

    fn unregister_notify(&self, event: &EventFd, address: u64) -> io::Result<()> {
        self.fd
            .unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(Into::into)
    }

    fn gather_writes(&self, address: u64, size: u32) {
        self.gather(address, IoEventAddress::Mmio(address), size);
    }

    fn gather_port_writes(&self, port: u16, count: u32) {
        let port = u64::from(port);
        // No memory of a device's lies there.
        self.gather(port, IoEventAddress::Pio(port), count);
    }
}
