// SPDX-License-Identifier: Apache-2.0
//! The PVH boot protocol (Xen's "x86/HVM direct boot ABI"), of an ELF kernel.

use std::{
    io::{self, Read, Seek, SeekFrom},
    ops::Range,
};

use linux_loader::{
    configurator::{pvh::PvhBootConfigurator, BootConfigurator, BootParams},
    elf::{Elf64_Ehdr, Elf64_Phdr, PT_LOAD},
    loader::{
        elf::{
            start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info},
            Elf, PvhBootCapability,
        },
        KernelLoader,
    },
};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryMmap};

use super::{super::image::Image, layout, BootError, MapEntry, Ramdisk};

const START_MAGIC: u32 = 0x336e_c578;

/// Loads the kernel; its entry point, and where its memory ends.
pub fn load_kernel(
    memory: &GuestMemoryMmap,
    memory_size: u64,
    kernel: &mut Image<'_>,
) -> Result<(u32, u64), BootError> {
    let loaded = Elf::load(
        memory,
        None,
        kernel,
        Some(GuestAddress(layout::HIGH_MEMORY)),
    )
    .map_err(|source| BootError::Kernel {
        memory_mib: memory_size >> 20,
        source,
    })?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(BootError::NoPvhEntry);
    };
    let entry = u32::try_from(entry.0).map_err(|_| BootError::NoPvhEntry)?;
    Ok((entry, loaded.kernel_end))
}

/// Where in guest memory the image's segments go.
pub fn extent(kernel: &mut Image<'_>) -> io::Result<Range<u64>> {
    kernel.rewind()?;
    let mut header = Elf64_Ehdr::default();
    kernel.read_exact(header.as_mut_slice())?;
    kernel.seek(SeekFrom::Start(header.e_phoff))?;
    let (mut start, mut end) = (u64::MAX, 0);
    for _ in 0..header.e_phnum {
        let mut segment = Elf64_Phdr::default();
        kernel.read_exact(segment.as_mut_slice())?;
        if segment.p_type == PT_LOAD {
            start = start.min(segment.p_paddr);
            end = end.max(segment.p_paddr.saturating_add(segment.p_memsz));
        }
    }
    Ok(start..end)
}

/// Writes the start info, with all that it points to.
pub fn write_start_info(
    memory: &GuestMemoryMmap,
    map: &[MapEntry],
    ramdisk: Option<Ramdisk>,
) -> Result<(), BootError> {
    let map: Vec<_> = map
        .iter()
        .map(|(addr, size, type_)| hvm_memmap_table_entry {
            addr: *addr,
            size: *size,
            type_: *type_,
            reserved: 0,
        })
        .collect();
    let info = hvm_start_info {
        magic: START_MAGIC,
        version: 1,
        cmdline_paddr: layout::CMDLINE,
        memmap_paddr: layout::MEMORY_MAP,
        memmap_entries: map.len() as u32,
        rsdp_paddr: layout::ACPI_TABLES,
        nr_modules: u32::from(ramdisk.is_some()),
        modlist_paddr: if ramdisk.is_some() {
            layout::MODULE_LIST
        } else {
            0
        },
        ..Default::default()
    };
    let mut parameters = BootParams::new(&info, GuestAddress(layout::START_INFO));
    parameters.set_sections(&map, GuestAddress(layout::MEMORY_MAP));
    if let Some(Ramdisk { address, size }) = ramdisk {
        let module = hvm_modlist_entry {
            paddr: address,
            size,
            ..Default::default()
        };
        parameters.set_modules(&[module], GuestAddress(layout::MODULE_LIST));
    }
    PvhBootConfigurator::write_bootparams(&parameters, memory).map_err(BootError::Parameters)
}
