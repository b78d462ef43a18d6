// SPDX-License-Identifier: Apache-2.0
//! Loads a kernel and describes the machine to it by the PVH boot protocol
//! (Xen's "x86/HVM direct boot ABI").

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    ops::Range,
};

use linux_loader::{
    cmdline::Cmdline,
    configurator::{pvh::PvhBootConfigurator, BootConfigurator, BootParams},
    elf::{Elf64_Ehdr, Elf64_Phdr, PT_LOAD},
    loader::{
        elf::{
            start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info},
            Elf, PvhBootCapability,
        },
        load_cmdline, KernelLoader,
    },
};
use vm_memory::{Address, ByteValued, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

use super::{image::Image, layout};
use crate::memory;

const START_MAGIC: u32 = 0x336e_c578;
const MAP_RAM: u32 = 1;
const MAP_RESERVED: u32 = 2;
const PAGE: u64 = 4096;

/// Why a kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Not an ELF kernel, or larger than memory.
    #[error("kernel image cannot be loaded into {memory_mib} MiB of memory (it must be an uncompressed ELF vmlinux)")]
    Kernel {
        /// Size of the guest's memory.
        memory_mib: u64,
        /// What the loader said.
        #[source]
        source: linux_loader::loader::Error,
    },
    /// No PVH note.
    #[error("kernel image has no PVH entry point: build it with CONFIG_PVH=y")]
    NoPvhEntry,
    /// Too long, or with characters that may not be in it.
    #[error(
        "kernel command line of {length} bytes is not usable (at most {max}, no NUL, no newline)"
    )]
    Cmdline {
        /// Its length.
        length: usize,
        /// The most there may be.
        max: usize,
    },
    /// The ramdisk does not fit between kernel and end of memory.
    #[error("initrd of {size} bytes does not fit into memory")]
    InitrdTooLarge {
        /// Its size.
        size: u64,
    },
    /// Reading the ramdisk failed.
    #[error("initrd cannot be read")]
    Initrd(#[source] std::io::Error),
    /// A table does not fit into memory.
    #[error("boot parameters cannot be written")]
    Parameters(#[source] linux_loader::configurator::Error),
    /// As above.
    #[error("guest memory cannot be written")]
    Memory(#[source] vm_memory::GuestMemoryError),
}

/// Loads kernel, command line and ramdisk, and writes the start info. Returns
/// the entry point.
pub fn load(
    memory: &GuestMemoryMmap,
    memory_size: u64,
    kernel: &File,
    cmdline: &str,
    initrd: Option<&mut File>,
) -> Result<GuestAddress, BootError> {
    let loaded = Elf::load(
        memory,
        None,
        &mut Image::new(kernel),
        Some(GuestAddress(layout::HIGH_MEMORY)),
    )
    .map_err(|source| BootError::Kernel {
        memory_mib: memory_size >> 20,
        source,
    })?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(BootError::NoPvhEntry);
    };

    let cmdline_error = || BootError::Cmdline {
        length: cmdline.len(),
        max: layout::CMDLINE_SIZE - 1,
    };
    if cmdline.bytes().any(|byte| byte == 0 || byte == b'\n') {
        return Err(cmdline_error());
    }
    let mut line = Cmdline::new(layout::CMDLINE_SIZE).map_err(|_| cmdline_error())?;
    if !cmdline.is_empty() {
        line.insert_str(cmdline).map_err(|_| cmdline_error())?;
    }
    load_cmdline(memory, GuestAddress(layout::CMDLINE), &line).map_err(|_| cmdline_error())?;

    let modules = initrd
        .map(|file| load_initrd(memory, memory_size, loaded.kernel_end, file))
        .transpose()?;
    write_start_info(memory, memory_size, modules)?;
    Ok(entry)
}

/// Where in guest memory the image's segments go; empty for what is no ELF
/// file, which [`load`] refuses.
pub fn extent(kernel: &File) -> Range<u64> {
    read_extent(kernel).unwrap_or_default()
}

fn read_extent(kernel: &File) -> std::io::Result<Range<u64>> {
    let mut kernel = Image::new(kernel);
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

/// Puts the ramdisk at the top of the first memory region.
fn load_initrd(
    memory: &GuestMemoryMmap,
    memory_size: u64,
    kernel_end: u64,
    file: &mut File,
) -> Result<hvm_modlist_entry, BootError> {
    let size = file.metadata().map_err(BootError::Initrd)?.len();
    let top = memory_size.min(layout::MMIO_START);
    let address = top
        .checked_sub(size)
        .map(|address| address & !(PAGE - 1))
        .filter(|address| *address >= kernel_end)
        .ok_or(BootError::InitrdTooLarge { size })?;
    memory
        .read_exact_volatile_from(GuestAddress(address), file, size as usize)
        .map_err(BootError::Memory)?;
    Ok(hvm_modlist_entry {
        paddr: address,
        size,
        ..Default::default()
    })
}

fn write_start_info(
    memory: &GuestMemoryMmap,
    memory_size: u64,
    module: Option<hvm_modlist_entry>,
) -> Result<(), BootError> {
    let map = memory_map(memory_size);
    let info = hvm_start_info {
        magic: START_MAGIC,
        version: 1,
        cmdline_paddr: layout::CMDLINE,
        memmap_paddr: layout::MEMORY_MAP,
        memmap_entries: map.len() as u32,
        rsdp_paddr: layout::ACPI_TABLES,
        nr_modules: u32::from(module.is_some()),
        modlist_paddr: if module.is_some() {
            layout::MODULE_LIST
        } else {
            0
        },
        ..Default::default()
    };
    let mut parameters = BootParams::new(&info, GuestAddress(layout::START_INFO));
    parameters.set_sections(&map, GuestAddress(layout::MEMORY_MAP));
    if let Some(module) = module {
        parameters.set_modules(&[module], GuestAddress(layout::MODULE_LIST));
    }
    PvhBootConfigurator::write_bootparams(&parameters, memory).map_err(BootError::Parameters)
}

/// The memory map: memory, the firmware area, the ECAM window.
fn memory_map(memory_size: u64) -> Vec<hvm_memmap_table_entry> {
    let entry = |addr, size, type_| hvm_memmap_table_entry {
        addr,
        size,
        type_,
        reserved: 0,
    };
    let mut map = vec![
        entry(0, layout::LOW_MEMORY_END, MAP_RAM),
        entry(
            layout::ACPI_TABLES,
            layout::HIGH_MEMORY - layout::ACPI_TABLES,
            MAP_RESERVED,
        ),
    ];
    for (base, length) in memory::ranges(memory_size) {
        let start = base.max(layout::HIGH_MEMORY);
        map.push(entry(start, base + length - start, MAP_RAM));
    }
    map.push(entry(layout::ECAM, layout::ECAM_SIZE, MAP_RESERVED));
    map
}

/// Writes ACPI tables where the start info says they are.
pub fn write_tables(memory: &GuestMemoryMmap, tables: &[u8]) -> Result<(), BootError> {
    debug_assert!(tables.len() as u64 <= layout::HIGH_MEMORY - layout::ACPI_TABLES);
    memory
        .write_slice(tables, GuestAddress(layout::ACPI_TABLES))
        .map_err(BootError::Memory)
}

/// The last address of guest memory, for bounds.
pub fn last_address(memory: &GuestMemoryMmap) -> u64 {
    memory.last_addr().raw_value()
}
