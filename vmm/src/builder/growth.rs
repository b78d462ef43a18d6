// SPDX-License-Identifier: Apache-2.0
//! Memory that comes and goes (virtio-mem), the host's side of it: the parts of
//! the device's region exist, and are the guest's, as far as it is asked to
//! plug them, and until it has let go of them.

use std::{
    collections::BTreeMap,
    fs::File,
    sync::{Arc, Mutex, MutexGuard},
};

use bulkhead_vmm_api::{FailureKind, MemoryStatus, Pages};
use vm_memory::{
    FileOffset, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryMmap, GuestMemoryRegion,
};

use crate::{
    kvm::{
        vm::{MemorySlot, Vm},
        KvmError,
    },
    memory::{self, MemoryError},
    virtio::{
        device::GuestRam,
        mem::{Mem, BLOCK},
    },
};

/// How new memory is backed, as the rest is.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Backing {
    /// In such pages.
    pub pages: Pages,
    /// The host may keep one copy of pages that are the same.
    pub merge: bool,
}

/// A snapshot's memory file, and where in it this memory begins.
pub(super) struct Saved {
    pub file: File,
    pub offset: u64,
}

/// The memory, with its device.
pub(super) struct Growth {
    vm: Arc<Vm>,
    ram: GuestRam,
    device: Arc<Mutex<Mem>>,
    backing: Backing,
    /// What exists, by the numbers of its parts.
    slots: BTreeMap<u32, MemorySlot>,
}

/// Why the guest has no other memory.
#[derive(Debug, thiserror::Error)]
pub enum GrowthError {
    /// There is no device for it.
    #[error("the VM's memory stays as it is: configure memory that comes and goes (devices.mem)")]
    Absent,
    /// More than the device has.
    #[error("mib: {mib} is more than devices.mem.max_mib = {max_mib}")]
    TooLarge {
        /// Asked for.
        mib: u32,
        /// Configured.
        max_mib: u64,
    },
    /// Not whole blocks.
    #[error("mib: {mib} is not a multiple of {block}")]
    Uneven {
        /// Asked for.
        mib: u32,
        /// A block's MiB.
        block: u64,
    },
    /// It cannot be mapped.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

impl GrowthError {
    /// For the reply.
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Absent | Self::TooLarge { .. } | Self::Uneven { .. } => {
                FailureKind::InvalidRequest
            }
            Self::Memory(_) => FailureKind::System,
            Self::Kvm(_) => FailureKind::Kvm,
        }
    }
}

impl Growth {
    /// For a device whose parts do not exist yet, whatever its layout says.
    pub fn new(vm: Arc<Vm>, ram: GuestRam, device: Arc<Mutex<Mem>>, backing: Backing) -> Self {
        Self {
            vm,
            ram,
            device,
            backing,
            slots: BTreeMap::new(),
        }
    }

    /// Makes the parts that a snapshot's machine had, from its memory file.
    ///
    /// # Errors
    /// One cannot be mapped.
    pub fn restore(&mut self, mapped: &[u32], saved: &Saved) -> Result<(), GrowthError> {
        let mut offset = saved.offset;
        for index in mapped {
            let file = saved.file.try_clone().map_err(MemoryError::File)?;
            let range = self.lock().layout().slot(*index);
            let length = range.end - range.start;
            // No device is there that would have to know.
            self.map(*index, Some(FileOffset::new(file, offset)), &|| ())?;
            offset += length;
        }
        self.tell_mapped(&mut self.lock());
        Ok(())
    }

    /// Asks the guest to have `mib` MiB. What it needs for that exists from now
    /// on; what it has given back and does not need is gone. `tell` has the other
    /// devices look at memory anew, before there is more for the guest or less in
    /// this process.
    ///
    /// # Errors
    /// So much cannot be. The guest is asked for nothing new then.
    pub fn set(&mut self, mib: u32, tell: &dyn Fn()) -> Result<(), GrowthError> {
        let bytes = u64::from(mib) << 20;
        let layout = self.lock().layout().clone();
        if bytes > layout.size {
            return Err(GrowthError::TooLarge {
                mib,
                max_mib: layout.size >> 20,
            });
        }
        if bytes % BLOCK != 0 {
            return Err(GrowthError::Uneven {
                mib,
                block: BLOCK >> 20,
            });
        }
        let wanted = layout.slots_for(bytes);
        for index in 0..wanted {
            if !self.slots.contains_key(&index) {
                self.map(index, None, tell)?;
            }
        }
        // The driver plugs nothing while its device is held here.
        let device = Arc::clone(&self.device);
        let mut device = lock(&device);
        while let Some((index, _)) = self.slots.last_key_value() {
            if *index < wanted || device.uses(*index) {
                break;
            }
            self.unmap(*index, device.layout().slot(*index).start, tell)?;
        }
        self.tell_mapped(&mut device);
        device.request(bytes);
        Ok(())
    }

    /// How it stands.
    pub fn status(&self) -> MemoryStatus {
        let device = self.lock();
        // A region is at most a few TiB.
        let mib = |bytes: u64| (bytes >> 20) as u32;
        MemoryStatus {
            max_mib: mib(device.layout().size),
            target_mib: mib(device.requested()),
            plugged_mib: mib(device.plugged()),
            mapped_mib: mib(device.layout().mapped_size()),
            slots: self.slots.len() as u32,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Mem> {
        lock(&self.device)
    }

    fn tell_mapped(&self, device: &mut Mem) {
        device.set_mapped(self.slots.keys().copied().collect());
    }

    /// Makes a part exist, for devices and for the guest.
    fn map(
        &mut self,
        index: u32,
        file: Option<FileOffset>,
        tell: &dyn Fn(),
    ) -> Result<(), GrowthError> {
        let range = self.lock().layout().slot(index);
        let saved = file.is_some();
        let region = Arc::new(memory::region(range.clone(), file, self.backing.pages)?);
        if !saved {
            let huge = match self.backing.pages {
                Pages::Transparent => 0..u64::MAX,
                Pages::Small | Pages::Huge => 0..0,
            };
            memory::advise_region(&region, &[huge]);
            if self.backing.merge {
                if let Err(error) = memory::merge_region(&region) {
                    limited!(warn, %error, "guest memory cannot be merged");
                }
            }
        }
        let larger = self
            .ram
            .memory()
            .insert_region(Arc::clone(&region))
            .map_err(MemoryError::Layout)?;
        let slot = self.vm.map_region(&region)?;
        self.replace(larger);
        tell();
        self.slots.insert(index, slot);
        Ok(())
    }

    /// Ends a part of which the guest has nothing plugged.
    fn unmap(&mut self, index: u32, start: u64, tell: &dyn Fn()) -> Result<(), GrowthError> {
        let Some(slot) = self.slots.remove(&index) else {
            return Ok(());
        };
        if let Err(error) = self.vm.unmap_window(slot) {
            // KVM uses it still, and nobody forgets where it is.
            limited!(error, index, "memory not taken back");
            return Err(error.into());
        }
        let memory = self.ram.memory();
        let found = memory
            .iter()
            .find(|region| region.start_addr() == GuestAddress(start));
        if let Some(length) = found.map(GuestMemoryRegion::len) {
            let (smaller, _) = memory
                .remove_region(GuestAddress(start), length)
                .map_err(MemoryError::Layout)?;
            self.replace(smaller);
            // `memory` keeps it until then.
            tell();
        }
        Ok(())
    }

    fn replace(&self, memory: GuestMemoryMmap) {
        self.ram
            .lock()
            .expect("no holder of the memory's lock panics")
            .replace(memory);
    }
}

fn lock(device: &Mutex<Mem>) -> MutexGuard<'_, Mem> {
    device
        .lock()
        .expect("a device that panicked ended the process")
}
