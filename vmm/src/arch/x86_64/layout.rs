// SPDX-License-Identifier: Apache-2.0
//! Where things lie in the guest's physical address space.
//!
//! ```text
//! 0x0000_0500  a GDT, for a kernel that is entered by Linux' boot protocol
//! 0x0000_6000  PVH start info, module list, memory map; or Linux' zero page
//! 0x0002_0000  command line
//! 0x000e_0000  ACPI tables, the RSDP first
//! 0x0010_0000  kernel and all other memory, up to 3 GiB
//! 0xc000_0000  device registers (BARs), and the tables of their interrupts
//! 0xe800_0000  PCI configuration space (ECAM, one bus), then what devices say of
//!              themselves
//! 0xfec0_0000  I/O APIC, VM generation id, local APICs, KVM's own pages
//! 4 GiB        the rest of memory, then windows: persistent memory, and memory
//!              that comes and goes
//! ```

/// `hvm_start_info`.
pub const START_INFO: u64 = 0x6000;
/// Its module list (one entry: the initial ramdisk).
pub const MODULE_LIST: u64 = 0x6040;
/// Its memory map.
pub const MEMORY_MAP: u64 = 0x7000;
/// The zero page of Linux' boot protocol, which holds its memory map.
pub const ZERO_PAGE: u64 = 0x7000;
/// The GDT of that protocol.
pub const GDT: u64 = 0x500;
/// The kernel's command line.
pub const CMDLINE: u64 = 0x20000;
/// Room for it, with its NUL.
pub const CMDLINE_SIZE: usize = 2048;
/// End of conventional memory: what is above belongs to firmware tables.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// The RSDP; the other tables follow.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// End of the firmware area, start of high memory.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// Memory below 4 GiB ends here; the rest continues at [`HIGH_RAM`].
pub const MMIO_START: u64 = 0xc000_0000;
/// Device registers.
pub const BAR_WINDOW: u64 = MMIO_START;
/// Size of their window.
pub const BAR_WINDOW_SIZE: u64 = 0x1000_0000;
/// Interrupt tables, a page for each device, within that window.
pub const TABLE_WINDOW: u64 = BAR_WINDOW + 0x10_0000;
/// PCI configuration space: 32 devices of 8 functions of 4 KiB.
pub const ECAM: u64 = 0xe800_0000;
/// One bus.
pub const ECAM_SIZE: u64 = 0x10_0000;
/// Devices' own configuration, a page for each, directly behind.
pub const CONFIG_WINDOW: u64 = ECAM + ECAM_SIZE;
/// Size of it.
pub const CONFIG_WINDOW_SIZE: u64 = 0x2_0000;
/// I/O APIC.
pub const IOAPIC: u32 = 0xfec0_0000;
/// The VM generation id.
pub const GENERATION_ID: u64 = 0xfed1_0000;
/// Local APICs.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that KVM needs on Intel processors.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// One page of identity map that KVM needs on Intel processors.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Where memory continues above the 32-bit hole.
pub const HIGH_RAM: u64 = 0x1_0000_0000;
/// Persistent memory windows are aligned and sized in this unit.
pub const WINDOW_ALIGN: u64 = 2 << 20;

/// COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Its interrupt line.
pub const SERIAL_IRQ: u32 = 4;
/// Interrupt line of the generic event device: there is a new generation id.
pub const GENERATION_IRQ: u32 = 5;
/// Keyboard controller's command port, for the reset it can pulse.
pub const KEYBOARD_COMMAND: u16 = 0x64;
/// pvpanic's port.
pub const PVPANIC_PORT: u16 = 0x505;
/// ACPI sleep control, sleep status and reset registers.
pub const POWER_PORT: u16 = 0x600;
