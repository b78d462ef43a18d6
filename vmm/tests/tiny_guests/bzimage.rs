// SPDX-License-Identifier: Apache-2.0
//! Kernels in the format of Linux' boot protocol (Documentation/arch/x86/boot.rst
//! of the kernel), which find ESI at the zero page.

use std::fs::File;

use bulkhead_vmm_api::{Call, FailureKind};

use crate::{
    guest::{contents, zeros, Code, SERIAL},
    vmm::{assert_failure, kvm, text, Setup, Vmm},
};

/// Where the setup header is in the file, and in the zero page.
const HEADER: usize = 0x1f1;
/// The code follows the boot sector and one sector of set-up.
const CODE: usize = 1024;

/// What the file says, right or wrong.
struct Bzimage {
    code: Code,
    magic: [u8; 4],
    version: u16,
    /// Bit 0: it is loaded at 1 MiB and not below.
    flags: u8,
    /// Where it is loaded.
    address: u32,
    /// The memory that it needs from 16 MiB on.
    room: u32,
    line_limit: u32,
    ramdisk_max: u32,
}

impl Bzimage {
    fn new(code: Code) -> Self {
        Self {
            code,
            magic: *b"HdrS",
            version: 0x020f,
            flags: 1,
            address: 0x10_0000,
            room: 8 << 20,
            line_limit: 2047,
            ramdisk_max: 0x7fff_ffff,
        }
    }

    fn file(&self) -> File {
        let mut file = vec![0; CODE];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(HEADER, &[1]);
        put(0x1fe, &[0x55, 0xaa]);
        put(0x202, &self.magic);
        put(0x206, &self.version.to_le_bytes());
        put(0x211, &[self.flags]);
        put(0x214, &self.address.to_le_bytes());
        put(0x22c, &self.ramdisk_max.to_le_bytes());
        // Alignment; it can be loaded anywhere.
        put(0x230, &0x20_0000_u32.to_le_bytes());
        put(0x234, &[1]);
        put(0x238, &self.line_limit.to_le_bytes());
        put(0x258, &(16_u64 << 20).to_le_bytes());
        put(0x260, &self.room.to_le_bytes());
        file.extend(self.code.machine_code());
        contents(&file)
    }
}

/// `mov register, [ebp + offset]`; the opcode says which register.
fn load(code: Code, opcode: u8, offset: u32) -> Code {
    code.bytes(&[0x8b, opcode]).bytes(&offset.to_le_bytes())
}

const ESI: u8 = 0xb5;
const ECX: u8 = 0x8d;

#[test]
fn a_bzimage_finds_what_its_boot_protocol_promises() {
    if !kvm("a_bzimage_finds_what_its_boot_protocol_promises") {
        return;
    }
    // mov ebp, esi; then all data segments from the GDT: mov eax, 0x18; mov
    // ds, es and ss, eax
    let code = Code::new()
        .bytes(&[0x89, 0xf5, 0xb8, 0x18, 0, 0, 0])
        .bytes(&[0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0]);
    // Its own header: lea esi, [ebp + 0x202]; mov ecx, 4; cld; rep outsb
    let code = code
        .port(SERIAL)
        .bytes(&[0x8d, 0xb5, 0x02, 0x02, 0, 0])
        .bytes(&[0xb9, 4, 0, 0, 0, 0xfc, 0xf3, 0x6e]);
    // The RSDP: mov ecx, 8; rep outsb
    let code = load(code, ESI, 0x70).bytes(&[0xb9, 8, 0, 0, 0, 0xf3, 0x6e]);
    // The command line, to its NUL: 1: lodsb; test al, al; jz 2f; out dx, al;
    // jmp 1b; 2:
    let code = load(code, ESI, 0x228).bytes(&[0xac, 0x84, 0xc0, 0x74, 0x03, 0xee, 0xeb, 0xf8]);
    // The ramdisk: rep outsb
    let code = load(code, ESI, 0x218);
    let code = load(code, ECX, 0x21c).bytes(&[0xf3, 0x6e]);
    // The number of entries of the memory map, as a digit: mov al, [ebp + 0x1e8];
    // add al, '0'; out dx, al
    let code = code.bytes(&[0x8a, 0x85, 0xe8, 1, 0, 0, 0x04, b'0', 0xee]);
    let mut setup = Setup::new(Bzimage::new(code.power_off()).file());
    setup.config.kernel.cmdline = "quiet init=/x,".into();
    let ramdisk = setup.pass(contents(b"ramdisk,"));
    setup.config.kernel.initrd = Some(ramdisk);
    let serial = setup.serial();
    let mut vmm = Vmm::run(&setup);
    drop(setup);
    assert_eq!(vmm.end().1, 0);
    // Low memory, the firmware's, the rest, and the configuration space.
    assert_eq!(text(serial), "HdrSRSD PTR quiet init=/x,ramdisk,4");
}

#[test]
fn bzimages_that_cannot_be_booted_are_refused() {
    if !kvm("bzimages_that_cannot_be_booted_are_refused") {
        return;
    }
    let good = || Bzimage::new(Code::new().halt());
    for (start, image) in [
        (
            "kernel image cannot be loaded",
            Bzimage {
                magic: *b"none",
                ..good()
            },
        ),
        // A zImage, for memory below 640 KiB.
        (
            "kernel image cannot be loaded",
            Bzimage { flags: 0, ..good() },
        ),
        (
            "kernel image cannot be loaded",
            Bzimage {
                address: 64 << 20,
                ..good()
            },
        ),
        (
            "kernel image cannot be loaded",
            Bzimage {
                address: 0x1000,
                ..good()
            },
        ),
        (
            "kernel image has boot protocol 2.06",
            Bzimage {
                version: 0x0206,
                ..good()
            },
        ),
        // It would end at 33 MiB, of 32.
        (
            "kernel image needs memory up to 0x2100000",
            Bzimage {
                room: 17 << 20,
                ..good()
            },
        ),
        (
            "kernel command line of 5 bytes",
            Bzimage {
                line_limit: 4,
                ..good()
            },
        ),
    ] {
        let mut setup = Setup::new(image.file());
        setup.config.kernel.cmdline = "quiet".into();
        let mut vmm = Vmm::spawn();
        vmm.configure(&setup).unwrap();
        assert_failure(vmm.call(Call::Boot), FailureKind::BadResource, start);
    }
}

#[test]
fn a_ramdisk_is_where_a_bzimage_can_have_it() {
    if !kvm("a_ramdisk_is_where_a_bzimage_can_have_it") {
        return;
    }
    // The kernel needs memory up to 24 MiB, of 32.
    for (size, ramdisk_max, fits) in [
        (8 << 20, 0x7fff_ffff, true),
        ((8 << 20) + 1, 0x7fff_ffff, false),
        (1 << 20, (25 << 20) - 1, true),
        (1 << 20, (24 << 20) + 100, false),
    ] {
        let image = Bzimage {
            ramdisk_max,
            ..Bzimage::new(Code::new().power_off())
        };
        let mut setup = Setup::new(image.file());
        let ramdisk = setup.pass(zeros(size));
        setup.config.kernel.initrd = Some(ramdisk);
        let mut vmm = Vmm::spawn();
        vmm.configure(&setup).unwrap();
        let answer = vmm.call(Call::Boot);
        if fits {
            answer.unwrap();
            assert_eq!(vmm.end().1, 0);
        } else {
            assert_failure(answer, FailureKind::BadResource, "initrd of ");
        }
    }
}
