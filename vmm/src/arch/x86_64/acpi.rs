// SPDX-License-Identifier: Apache-2.0
//! ACPI tables (ACPI 6.5) of a hardware-reduced machine: processors, one PCI
//! bus with ECAM, the serial port, pvpanic, the VM generation id, and registers
//! to power off and reset. No SCI, no fixed hardware, no interrupt links: devices have MSI-X.

use std::ops::Range;

use acpi_tables::{
    aml,
    fadt::{FADTBuilder, Flags, PmProfile},
    gas::{AccessSize, AddressSpace, GAS},
    madt::{EnabledStatus, IoApic, LocalInterruptController, ProcessorLocalApic, MADT},
    mcfg::MCFG,
    rsdp::Rsdp,
    sdt::Sdt,
    xsdt::XSDT,
    Aml,
};

use super::layout;
use crate::power;

const OEM: [u8; 6] = *b"BULKHD";
const TABLE: [u8; 8] = *b"BULKHEAD";
const REVISION: u32 = 1;
/// `ARM`-independent bits of IAPC_BOOT_ARCH: no VGA, no CMOS clock, no
/// legacy devices and no keyboard controller (bits 0 and 1 clear).
const NO_LEGACY: u16 = (1 << 2) | (1 << 5);

/// What the generation id's device is notified of.
const GENERATION_CHANGED: u8 = 0x80;

/// All tables, to be written at [`layout::ACPI_TABLES`]. `windows` are the regions
/// above 4 GiB that PCI devices have.
pub fn tables(vcpus: u8, windows: &[Range<u64>]) -> Vec<u8> {
    let mut image = Image {
        bytes: vec![0; Rsdp::len().next_multiple_of(ALIGN)],
    };
    let dsdt = image.append(&dsdt(windows));
    let fadt = image.append(&fadt(dsdt));
    let madt = image.append(&madt(vcpus));
    let mcfg = image.append(&mcfg());
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    for address in [fadt, madt, mcfg] {
        xsdt.add_entry(address);
    }
    let xsdt = image.append(&bytes(&xsdt));
    let rsdp = bytes(&Rsdp::new(OEM, xsdt));
    image.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    image.bytes
}

const ALIGN: usize = 64;

struct Image {
    bytes: Vec<u8>,
}

impl Image {
    /// Appends a table; its guest-physical address.
    fn append(&mut self, table: &[u8]) -> u64 {
        self.bytes
            .resize(self.bytes.len().next_multiple_of(ALIGN), 0);
        let address = layout::ACPI_TABLES + self.bytes.len() as u64;
        self.bytes.extend_from_slice(table);
        address
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let register = |port: u16| {
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            u64::from(port),
        )
    };
    let mut builder = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::Unspecified)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd);
    builder.iapc_boot_arch = NO_LEGACY.into();
    builder.sleep_control_reg = register(layout::POWER_PORT + power::SLEEP_CONTROL);
    builder.sleep_status_reg = register(layout::POWER_PORT + power::SLEEP_STATUS);
    builder.reset_reg = register(layout::POWER_PORT + power::RESET);
    builder.reset_value = power::RESET_VALUE;
    bytes(&builder.finalize())
}

fn madt(vcpus: u8) -> Vec<u8> {
    let mut madt = MADT::new(
        OEM,
        TABLE,
        REVISION,
        LocalInterruptController::Address(layout::LOCAL_APIC),
    );
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    bytes(&madt)
}

fn mcfg() -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM, TABLE, REVISION);
    mcfg.add_ecam(layout::ECAM, 0, 0, 0);
    bytes(&mcfg)
}

fn dsdt(windows: &[Range<u64>]) -> Vec<u8> {
    let window = |start: u64, size: u64| {
        let end = (start + size - 1) as u32;
        let kind = aml::AddressSpaceCacheable::NotCacheable;
        aml::AddressSpace::new_memory(kind, true, start as u32, end, None)
    };
    let bus = aml::AddressSpace::new_bus_number(0_u16, 0_u16);
    let registers = [
        window(layout::BAR_WINDOW, layout::BAR_WINDOW_SIZE),
        window(layout::CONFIG_WINDOW, layout::CONFIG_WINDOW_SIZE),
    ];
    let high: Vec<_> = windows
        .iter()
        .map(|window| {
            let kind = aml::AddressSpaceCacheable::Cacheable;
            aml::AddressSpace::new_memory(kind, true, window.start, window.end - 1, None)
        })
        .collect();
    let mut resources: Vec<&dyn Aml> = vec![&bus];
    resources.extend(registers.iter().map(|window| window as &dyn Aml));
    resources.extend(high.iter().map(|window| window as &dyn Aml));
    let pci = aml::Device::new(
        "_SB_.PCI0".into(),
        vec![
            // A PCI Express root bridge, which is also a PCI one.
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0A08")),
            &aml::Name::new("_CID".into(), &aml::EISAName::new("PNP0A03")),
            &aml::Name::new("_SEG".into(), &0_u8),
            &aml::Name::new("_BBN".into(), &0_u8),
            &aml::Name::new("_UID".into(), &0_u8),
            // All devices are coherent.
            &aml::Name::new("_CCA".into(), &1_u8),
            &aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(resources)),
        ],
    )
    .to_vec();
    // The ECAM window must be reserved by a device of the motherboard.
    let motherboard = aml::Device::new(
        "_SB_.MB00".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0C02")),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&aml::Memory32Fixed::new(
                    true,
                    layout::ECAM as u32,
                    layout::ECAM_SIZE as u32,
                )]),
            ),
        ],
    )
    .to_vec();
    let serial = aml::Device::new(
        "_SB_.COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &0_u8),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::Interrupt::new(true, true, false, false, layout::SERIAL_IRQ),
                    &aml::IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, 8),
                ]),
            ),
        ],
    )
    .to_vec();
    let panic = aml::Device::new(
        "_SB_.PEVT".into(),
        vec![
            &aml::Name::new("_HID".into(), &"QEMU0001"),
            &aml::Name::new("_STA".into(), &0xf_u8),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&aml::IO::new(
                    layout::PVPANIC_PORT,
                    layout::PVPANIC_PORT,
                    1,
                    1,
                )]),
            ),
        ],
    )
    .to_vec();
    // By its compatible id the kernel knows it.
    let generation = aml::Device::new(
        "_SB_.VGEN".into(),
        vec![
            &aml::Name::new("_HID".into(), &"BLKH0001"),
            &aml::Name::new("_CID".into(), &"VM_Gen_Counter"),
            &aml::Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &aml::Name::new(
                "ADDR".into(),
                &aml::Package::new(vec![&(layout::GENERATION_ID as u32), &0_u8]),
            ),
        ],
    )
    .to_vec();
    // Its interrupt says that the generation id is another (ACPI 6.5 §5.6.9).
    let events = aml::Device::new(
        "_SB_.GED0".into(),
        vec![
            &aml::Name::new("_HID".into(), &"ACPI0013"),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&aml::Interrupt::new(
                    true,
                    true,
                    false,
                    false,
                    layout::GENERATION_IRQ,
                )]),
            ),
            &aml::Method::new(
                "_EVT".into(),
                1,
                true,
                vec![&aml::Notify::new(
                    &aml::Path::new("\\_SB_.VGEN"),
                    &GENERATION_CHANGED,
                )],
            ),
        ],
    )
    .to_vec();
    // Power off is sleep state 5; the value is what the register gets.
    let off = aml::Name::new(
        "_S5_".into(),
        &aml::Package::new(vec![&power::SLEEP_TYPE_OFF, &0_u8, &0_u8, &0_u8]),
    )
    .to_vec();
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, REVISION);
    for device in [pci, motherboard, serial, panic, generation, events, off] {
        dsdt.append_slice(&device);
    }
    dsdt.update_checksum();
    dsdt.as_slice().to_vec()
}

/// A term's bytes.
trait ToBytes {
    fn to_vec(&self) -> Vec<u8>;
}

impl<T: Aml> ToBytes for T {
    fn to_vec(&self) -> Vec<u8> {
        bytes(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_is_reached_and_sums_to_zero() {
        let image = tables(3, &[]);
        assert_eq!(&image[..8], b"RSD PTR ");
        assert_eq!(sum(&image[..20]), 0);
        assert_eq!(sum(&image[..36]), 0);
        let at = |address: u64| &image[(address - layout::ACPI_TABLES) as usize..];
        let length = |table: &[u8]| u32::from_le_bytes(table[4..8].try_into().unwrap()) as usize;
        let xsdt = at(u64::from_le_bytes(image[24..32].try_into().unwrap()));
        let xsdt = &xsdt[..length(xsdt)];
        assert_eq!(&xsdt[..4], b"XSDT");
        assert_eq!(sum(xsdt), 0);
        let mut found = Vec::new();
        for entry in xsdt[36..].chunks(8) {
            let table = at(u64::from_le_bytes(entry.try_into().unwrap()));
            let table = &table[..length(table)];
            assert_eq!(sum(table), 0, "{:?}", &table[..4]);
            found.push(table[..4].to_vec());
            if &table[..4] == b"FACP" {
                let dsdt = at(u64::from_le_bytes(table[140..148].try_into().unwrap()));
                assert_eq!(&dsdt[..4], b"DSDT");
                assert_eq!(sum(&dsdt[..length(dsdt)]), 0);
            }
        }
        assert_eq!(found, [b"FACP", b"APIC", b"MCFG"]);
        assert!(image.len() as u64 <= layout::HIGH_MEMORY - layout::ACPI_TABLES);
    }

    #[test]
    fn windows_are_resources_of_the_bus() {
        let windows = [5 << 30..6 << 30, 1 << 40..(1 << 40) + (2 << 20)];
        // Of the descriptor (ACPI 6.5 §6.4.3.5.1): least and last address, then an
        // offset and the length.
        let descriptor = |window: &Range<u64>| {
            let numbers = [window.start, window.end - 1, 0, window.end - window.start];
            numbers.map(u64::to_le_bytes).concat()
        };
        let has = |image: &[u8], window| {
            let wanted: Vec<u8> = descriptor(window);
            image.windows(wanted.len()).any(|bytes| bytes == wanted)
        };
        for window in &windows {
            assert!(has(&tables(1, &windows), window));
            assert!(!has(&tables(1, &[]), window));
        }
    }
}
