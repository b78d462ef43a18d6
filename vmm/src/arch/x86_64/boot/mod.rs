// SPDX-License-Identifier: Apache-2.0
//! Loads a kernel and describes the machine to it: an ELF file by the PVH boot
//! protocol ([`pvh`]), a bzImage by Linux' own ([`linux`]).

mod linux;
mod pvh;

use std::{
    fs::File,
    io::{Read, Seek},
    ops::Range,
};

use linux_loader::{cmdline::Cmdline, loader::load_cmdline};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

pub use linux::GDT_LIMIT;

use super::{image::Image, layout};
use crate::memory;

/// Types of memory in a map, the same in both protocols.
const MAP_RAM: u32 = 1;
const MAP_RESERVED: u32 = 2;
const PAGE: u64 = 4096;
/// What an ELF file begins with.
const ELF_MAGIC: &[u8] = b"\x7fELF";

/// Where a kernel is entered, in 32-bit protected mode without paging, and by
/// which protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// RBX has the address of the start info.
    Pvh(u32),
    /// RSI has the address of the zero page; a GDT is at [`layout::GDT`].
    Linux(u32),
}

/// A part of the memory map: base, length and type.
type MapEntry = (u64, u64, u32);

/// A ramdisk in guest memory.
struct Ramdisk {
    address: u64,
    size: u64,
}

/// Why a kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Neither an ELF kernel nor a bzImage, or larger than memory.
    #[error("kernel image cannot be loaded into {memory_mib} MiB of memory (it must be an ELF vmlinux or a bzImage)")]
    Kernel {
        /// Size of the guest's memory.
        memory_mib: u64,
        /// What the loader said.
        #[source]
        source: linux_loader::loader::Error,
    },
    /// An old bzImage, which does not say how much memory it needs.
    #[error(
        "kernel image has boot protocol {major}.{minor:02}: a bzImage must have 2.12 or newer"
    )]
    OldProtocol {
        /// Of the version.
        major: u16,
        /// Of the version.
        minor: u16,
    },
    /// A bzImage unpacks itself beyond the end of memory.
    #[error(
        "kernel image needs memory up to {end:#x} to unpack itself, and there are {memory_mib} MiB"
    )]
    Unpacked {
        /// Where it would end.
        end: u64,
        /// Size of the guest's memory.
        memory_mib: u64,
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

/// Loads kernel, command line and ramdisk, and writes the description of the
/// machine that goes with the kernel's protocol. Returns where it is entered.
pub fn load(
    memory: &GuestMemoryMmap,
    memory_size: u64,
    kernel: &mut Image<'_>,
    cmdline: &str,
    initrd: Option<&mut File>,
) -> Result<Entry, BootError> {
    if is_elf(kernel) {
        let (entry, end) = pvh::load_kernel(memory, memory_size, kernel)?;
        load_line(memory, cmdline, layout::CMDLINE_SIZE - 1)?;
        let ramdisk = load_ramdisk(memory, end..ramdisk_end(memory_size), initrd)?;
        pvh::write_start_info(memory, &memory_map(memory_size), ramdisk)?;
        return Ok(Entry::Pvh(entry));
    }
    let image = linux::load_kernel(memory, memory_size, kernel)?;
    let line = load_line(memory, cmdline, image.line_limit())?;
    let room = image.end..ramdisk_end(memory_size).min(image.ramdisk_limit());
    let ramdisk = load_ramdisk(memory, room, initrd)?;
    linux::write_zero_page(memory, &image, line, &memory_map(memory_size), ramdisk)?;
    Ok(Entry::Linux(image.entry))
}

/// Bytes that the kernel keeps for each page of memory (its `struct page`).
const PAGE_STRUCTURE: u64 = 64;
/// Where memory is dense, ranges begin and end at multiples of this.
const DENSE_UNIT: u64 = 2 << 20;

/// The parts of a guest's memory that its boot fills: where the kernel is, and
/// the end of memory, where the ramdisk is, and the kernel's first large
/// allocation, of what it notes about each page.
pub fn dense(memory_size: u64, kernel: &mut Image<'_>, initrd: Option<&File>) -> Vec<Range<u64>> {
    let mut parts = vec![extent(kernel)];
    if let Some((base, length)) = memory::ranges(memory_size).pop() {
        // A ramdisk is in the first region, which need not be the last.
        let ramdisk = initrd.filter(|_| base == 0);
        let ramdisk = ramdisk.and_then(|file| file.metadata().ok());
        let filled = (memory_size / PAGE * PAGE_STRUCTURE)
            .saturating_add(ramdisk.map_or(0, |metadata| metadata.len()));
        let end = base + length;
        let start = end.saturating_sub(filled).max(base) & !(DENSE_UNIT - 1);
        parts.push(start..end);
    }
    parts
}

/// Where in guest memory the kernel will be; empty for what is none, which
/// [`load`] refuses.
pub fn extent(kernel: &mut Image<'_>) -> Range<u64> {
    let extent = if is_elf(kernel) {
        pvh::extent(kernel)
    } else {
        linux::extent(kernel)
    };
    extent.unwrap_or_default()
}

fn is_elf(kernel: &mut Image<'_>) -> bool {
    let mut magic = [0; ELF_MAGIC.len()];
    kernel.rewind().is_ok() && kernel.read_exact(&mut magic).is_ok() && magic == ELF_MAGIC
}

/// Puts the command line where it belongs; its length.
fn load_line(memory: &GuestMemoryMmap, cmdline: &str, max: usize) -> Result<usize, BootError> {
    let length = cmdline.len();
    let refused = || BootError::Cmdline { length, max };
    if length > max || cmdline.bytes().any(|byte| byte == 0 || byte == b'\n') {
        return Err(refused());
    }
    let mut line = Cmdline::new(layout::CMDLINE_SIZE).map_err(|_| refused())?;
    if !cmdline.is_empty() {
        line.insert_str(cmdline).map_err(|_| refused())?;
    }
    load_cmdline(memory, GuestAddress(layout::CMDLINE), &line).map_err(|_| refused())?;
    Ok(length)
}

/// End of the memory that a ramdisk may be in: that of the first region.
fn ramdisk_end(memory_size: u64) -> u64 {
    memory_size.min(layout::MMIO_START)
}

/// Puts the ramdisk at the end of `room`, and never where the machine is
/// described: a kernel may lie below that.
fn load_ramdisk(
    memory: &GuestMemoryMmap,
    room: Range<u64>,
    file: Option<&mut File>,
) -> Result<Option<Ramdisk>, BootError> {
    let Some(file) = file else {
        return Ok(None);
    };
    let size = file.metadata().map_err(BootError::Initrd)?.len();
    let start = room.start.max(layout::HIGH_MEMORY);
    let address = room
        .end
        .checked_sub(size)
        .map(|address| address & !(PAGE - 1))
        .filter(|address| *address >= start)
        .ok_or(BootError::InitrdTooLarge { size })?;
    memory
        .read_exact_volatile_from(GuestAddress(address), file, size as usize)
        .map_err(BootError::Memory)?;
    Ok(Some(Ramdisk { address, size }))
}

/// The memory map: memory, the firmware area, the ECAM window.
fn memory_map(memory_size: u64) -> Vec<MapEntry> {
    let mut map = vec![
        (0, layout::LOW_MEMORY_END, MAP_RAM),
        (
            layout::ACPI_TABLES,
            layout::HIGH_MEMORY - layout::ACPI_TABLES,
            MAP_RESERVED,
        ),
    ];
    for (base, length) in memory::ranges(memory_size) {
        let start = base.max(layout::HIGH_MEMORY);
        map.push((start, base + length - start, MAP_RAM));
    }
    map.push((layout::ECAM, layout::ECAM_SIZE, MAP_RESERVED));
    map
}

/// Writes ACPI tables where the kernel is told that they are.
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

#[cfg(test)]
mod tests {
    use vmm_sys_util::tempfile::TempFile;

    use super::*;

    #[test]
    fn the_end_of_memory_is_dense_by_its_size_and_the_ramdisks() {
        const MIB: u64 = 1 << 20;
        let kernel = TempFile::new().unwrap().into_file();
        let ramdisk = TempFile::new().unwrap().into_file();
        ramdisk.set_len(3 * MIB).unwrap();
        for (memory_size, ramdisk, expected) in [
            (256 * MIB, None, 252 * MIB..256 * MIB),
            (256 * MIB, Some(&ramdisk), 248 * MIB..256 * MIB),
            (1024 * MIB, None, 1008 * MIB..1024 * MIB),
            // 80 MiB are noted about 5 GiB, and a ramdisk is below 4 GiB.
            (5120 * MIB, Some(&ramdisk), 6064 * MIB..6144 * MIB),
        ] {
            let parts = dense(memory_size, &mut Image::new(&kernel), ramdisk);
            assert_eq!(parts, [0..0, expected]);
        }
    }

    #[test]
    fn a_ramdisk_lies_above_what_describes_the_machine() {
        const SIZE: u64 = 32 << 20;
        let memory = memory::allocate(SIZE, bulkhead_vmm_api::Pages::Small).unwrap();
        let load = |start, size| {
            let mut file = TempFile::new().unwrap().into_file();
            file.set_len(size).unwrap();
            load_ramdisk(&memory, start..SIZE, Some(&mut file))
        };
        let room = SIZE - layout::HIGH_MEMORY;
        for start in [0, 0x5000, layout::HIGH_MEMORY] {
            let all = load(start, room).unwrap().unwrap();
            assert_eq!((all.address, all.size), (layout::HIGH_MEMORY, room));
            let refused = load(start, room + 1);
            let expected =
                matches!(refused, Err(BootError::InitrdTooLarge { size }) if size == room + 1);
            assert!(expected, "{start:#x}");
        }
        let small = load(layout::HIGH_MEMORY, 1).unwrap().unwrap();
        assert_eq!(small.address, SIZE - PAGE);
    }
}
