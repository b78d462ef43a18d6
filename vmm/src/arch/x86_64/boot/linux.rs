// SPDX-License-Identifier: Apache-2.0
//! Linux' boot protocol, of a bzImage, which is entered in 32-bit protected mode
//! and unpacks itself (Documentation/arch/x86/boot.rst of the kernel).

use std::{
    io::{self, Read, Seek, SeekFrom},
    ops::Range,
};

use linux_loader::{
    configurator::{linux::LinuxBootConfigurator, BootConfigurator, BootParams},
    loader::{
        bootparam::{boot_e820_entry, boot_params, setup_header},
        bzimage::BzImage,
        KernelLoader,
    },
};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use super::{super::image::Image, layout, BootError, MapEntry, Ramdisk};

/// Where the setup header is in the file.
const HEADER_AT: u64 = 0x1f1;
/// The magic number in it.
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// Of protocols from this version on, a header says where the kernel unpacks
/// itself, how much memory that takes, and that it can be given an RSDP.
const VERSION: u16 = 0x020c;
/// A boot loader without a number of its own.
const OTHER_LOADER: u8 = 0xff;

/// Flat segments of 4 GiB for the selectors 0x10 (code) and 0x18 (data).
const SEGMENTS: [u64; 4] = [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
/// The last byte of them, for the GDT's register.
pub const GDT_LIMIT: u16 = (size_of::<[u64; 4]>() - 1) as u16;

/// A kernel in guest memory that has not unpacked itself yet.
pub struct Packed {
    header: setup_header,
    /// Its first instruction.
    pub entry: u32,
    /// Where the memory that it needs ends.
    pub end: u64,
}

impl Packed {
    /// The longest command line that it takes.
    pub fn line_limit(&self) -> usize {
        (self.header.cmdline_size as usize).min(layout::CMDLINE_SIZE - 1)
    }

    /// Where the memory ends in which it looks for a ramdisk.
    pub fn ramdisk_limit(&self) -> u64 {
        u64::from(self.header.initrd_addr_max) + 1
    }
}

/// Loads the kernel.
pub fn load_kernel(
    memory: &GuestMemoryMmap,
    memory_size: u64,
    kernel: &mut Image<'_>,
) -> Result<Packed, BootError> {
    let memory_mib = memory_size >> 20;
    let loaded = BzImage::load(
        memory,
        None,
        kernel,
        Some(GuestAddress(layout::HIGH_MEMORY)),
    )
    .map_err(|source| BootError::Kernel { memory_mib, source })?;
    // The loader gives the header of whatever it loads.
    let header = loaded.setup_header.unwrap_or_default();
    let version = header.version;
    if version < VERSION {
        let (major, minor) = (version >> 8, version & 0xff);
        return Err(BootError::OldProtocol { major, minor });
    }
    let end = unpacked(&header).end.max(loaded.kernel_end);
    if end > memory_size.min(layout::MMIO_START) {
        return Err(BootError::Unpacked { end, memory_mib });
    }
    let entry = header.code32_start;
    Ok(Packed { header, entry, end })
}

/// Where in guest memory the kernel will unpack itself.
pub fn extent(kernel: &mut Image<'_>) -> io::Result<Range<u64>> {
    kernel.seek(SeekFrom::Start(HEADER_AT))?;
    let mut header = setup_header::default();
    kernel.read_exact(header.as_mut_slice())?;
    if header.header != HEADER_MAGIC || header.version < VERSION {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(unpacked(&header))
}

/// Where it unpacks itself, having been loaded where it asks to be: there, or
/// where it would rather be if that is higher.
fn unpacked(header: &setup_header) -> Range<u64> {
    let alignment = u64::from(header.kernel_alignment).max(1);
    let loaded = u64::from(header.code32_start).next_multiple_of(alignment);
    let start = match header.relocatable_kernel {
        0 => header.pref_address,
        _ => loaded.max(header.pref_address),
    };
    start..start.saturating_add(header.init_size.into())
}

/// Writes the zero page, with a command line of `line` bytes, and the GDT.
pub fn write_zero_page(
    memory: &GuestMemoryMmap,
    kernel: &Packed,
    line: usize,
    map: &[MapEntry],
    ramdisk: Option<Ramdisk>,
) -> Result<(), BootError> {
    let mut page = boot_params {
        hdr: kernel.header,
        acpi_rsdp_addr: layout::ACPI_TABLES,
        ..Default::default()
    };
    page.hdr.type_of_loader = OTHER_LOADER;
    page.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    page.hdr.cmdline_size = line as u32;
    if let Some(Ramdisk { address, size }) = ramdisk {
        // Both are below where memory below 4 GiB ends.
        page.hdr.ramdisk_image = address as u32;
        page.hdr.ramdisk_size = size as u32;
    }
    for (entry, (addr, size, type_)) in page.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry {
            addr: *addr,
            size: *size,
            type_: *type_,
        };
        page.e820_entries += 1;
    }
    let parameters = BootParams::new(&page, GuestAddress(layout::ZERO_PAGE));
    LinuxBootConfigurator::write_bootparams(&parameters, memory).map_err(BootError::Parameters)?;
    memory
        .write_obj(SEGMENTS, GuestAddress(layout::GDT))
        .map_err(BootError::Memory)
}
