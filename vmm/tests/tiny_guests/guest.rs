// SPDX-License-Identifier: Apache-2.0
//! Guests of a few instructions: machine code in an ELF file with a PVH note,
//! which is all the VMM wants of a kernel. They start in 32-bit protected mode
//! with flat segments and EBX at the start info.

use std::{
    fs::File,
    io::{Seek, SeekFrom, Write},
};

use vmm_sys_util::tempfile::TempFile;

/// Where the code is loaded and entered.
const ENTRY: u32 = 0x10_0000;
/// The serial port's data register.
pub const SERIAL: u16 = 0x3f8;
/// Sleep control and reset registers.
pub const SLEEP: u16 = 0x600;
pub const RESET: u16 = 0x602;
/// The keyboard controller's command port.
pub const KEYBOARD: u16 = 0x64;
/// pvpanic.
pub const PANIC: u16 = 0x505;
/// Configuration space of the PCI bus.
const ECAM: u32 = 0xe800_0000;

/// Registers of the devices on it.
const REGISTERS: u32 = 0xc000_0000;
/// Bytes of them for each device.
const REGISTERS_SIZE: u32 = 0x8000;
/// The tables of their interrupts, a page each.
const TABLES: u32 = 0xc010_0000;

/// What the devices say of themselves, a page each.
const OWN_CONFIGURATION: u32 = 0xe810_0000;

/// A word of what the device in a slot says of itself.
pub fn own_configuration(slot: u32, offset: u32) -> u32 {
    OWN_CONFIGURATION + (slot << 12) + offset
}

/// A register of the device in a slot.
pub fn register(slot: u32, offset: u32) -> u32 {
    REGISTERS + slot * REGISTERS_SIZE + offset
}

/// A word of its configuration space.
pub fn configuration(slot: u32, offset: u32) -> u32 {
    ECAM + (slot << 15) + offset
}

/// A word of its interrupts' table.
pub fn table(slot: u32, offset: u32) -> u32 {
    TABLES + (slot << 12) + offset
}

/// Where a driver has the rings of a device's queue.
fn rings(slot: u32, queue: u32) -> u32 {
    0x40_0000 + (slot * 16 + queue) * 0x3000
}
/// The parts of them behind the descriptors.
const AVAILABLE: u32 = 0x1000;
const USED: u32 = 0x2000;

/// Machine code under construction.
#[derive(Clone, Default)]
pub struct Code(Vec<u8>);

impl Code {
    pub fn new() -> Self {
        Self::default()
    }

    /// Any instructions.
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Puts a port's number into DX.
    pub fn port(self, port: u16) -> Self {
        let [low, high] = port.to_le_bytes();
        // mov dx, port
        self.bytes(&[0x66, 0xba, low, high])
    }

    /// Writes a byte to a port.
    pub fn out(self, port: u16, value: u8) -> Self {
        // mov al, value; out dx, al
        self.port(port).bytes(&[0xb0, value, 0xee])
    }

    /// Writes a text to the serial port.
    pub fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |code, byte| code.out(SERIAL, byte))
    }

    /// Reads a byte from a port, and writes it to another.
    pub fn copy_port(self, from: u16, to: u16) -> Self {
        // in al, dx; out dx, al
        self.port(from).bytes(&[0xec]).port(to).bytes(&[0xee])
    }

    /// Writes a byte to memory.
    pub fn store8(self, address: u32, value: u8) -> Self {
        // mov byte [address], value
        self.bytes(&[0xc6, 0x05])
            .bytes(&address.to_le_bytes())
            .bytes(&[value])
    }

    /// Writes two.
    pub fn store16(self, address: u32, value: u16) -> Self {
        // mov word [address], value
        self.bytes(&[0x66, 0xc7, 0x05])
            .bytes(&address.to_le_bytes())
            .bytes(&value.to_le_bytes())
    }

    /// Writes four.
    pub fn store32(self, address: u32, value: u32) -> Self {
        // mov dword [address], value
        self.bytes(&[0xc7, 0x05])
            .bytes(&address.to_le_bytes())
            .bytes(&value.to_le_bytes())
    }

    /// Prints the four bytes at an address.
    pub fn print32(self, address: u32) -> Self {
        // mov eax, [address]; out dx, al; shr eax, 8; three times more
        self.port(SERIAL)
            .bytes(&[0xa1])
            .bytes(&address.to_le_bytes())
            .bytes(&[0xee, 0xc1, 0xe8, 8].repeat(4))
    }

    /// Waits until the four bytes at an address have a value.
    pub fn wait_for32(self, address: u32, value: u32) -> Self {
        // 1: cmp dword [address], value; jne 1b
        self.bytes(&[0x81, 0x3d])
            .bytes(&address.to_le_bytes())
            .bytes(&value.to_le_bytes())
            .bytes(&[0x75, 0xf4])
    }

    /// Reads the four bytes at an address.
    pub fn load32(self, address: u32) -> Self {
        // mov eax, [address]
        self.bytes(&[0xa1]).bytes(&address.to_le_bytes())
    }

    /// Prints `yes` if the start info has its magic number, else nothing.
    pub fn check_start_info(self, yes: &str) -> Self {
        let print = Self::new().print(yes).0;
        // cmp dword [ebx], magic; jne past the print
        self.bytes(&[0x81, 0x3b, 0x78, 0xc5, 0x6e, 0x33])
            .bytes(&[0x75, u8::try_from(print.len()).unwrap()])
            .bytes(&print)
    }

    /// Prints the command line that the start info points to.
    pub fn print_command_line(self) -> Self {
        // mov esi, [ebx + 24]; 1: lodsb; test al, al; jz 2f; out dx, al; jmp 1b; 2:
        self.port(SERIAL)
            .bytes(&[0x8b, 0x73, 0x18])
            .bytes(&[0xac, 0x84, 0xc0, 0x74, 0x03, 0xee, 0xeb, 0xf8])
    }

    /// Prints the initial ramdisk that the start info's module list names.
    pub fn print_ramdisk(self) -> Self {
        // mov eax, [ebx + 16]; mov esi, [eax]; mov ecx, [eax + 8]; rep outsb
        self.port(SERIAL)
            .bytes(&[0x8b, 0x43, 0x10, 0x8b, 0x30, 0x8b, 0x48, 0x08])
            .bytes(&[0xfc, 0xf3, 0x6e])
    }

    /// Prints the low byte of a PCI function's device id: 0x40 more than its
    /// virtio type.
    pub fn print_device(self, slot: u32) -> Self {
        // ; shr eax, 16; out dx, al
        self.load32(configuration(slot, 0))
            .bytes(&[0xc1, 0xe8, 0x10])
            .port(SERIAL)
            .bytes(&[0xee])
    }

    /// As [`Self::print_device`], again and again, each with a newline.
    pub fn watch_device(self, slot: u32) -> Self {
        let once = Self::new().print_device(slot).out(SERIAL, b'\n').0;
        // And back to its begin.
        let back = -i8::try_from(once.len() + 2).unwrap();
        self.bytes(&once).bytes(&[0xeb, back as u8])
    }

    /// Tells a virtio device that there is a driver for it (virtio 1.2 §2.1).
    pub fn acknowledge_device(self, slot: u32) -> Self {
        // ACKNOWLEDGE | DRIVER
        self.store8(register(slot, 0x14), 3)
    }

    /// Sets a virtio device's first queues up, and starts it: with room for eight
    /// buffers, of which there are none, and one interrupt for everything (virtio
    /// 1.2 §3.1.1 and §4.1.4.3).
    pub fn start_device(self, slot: u32, queues: u32) -> Self {
        let at = |offset| register(slot, offset);
        let code = self
            // Reset, then somebody who knows it, with VIRTIO_F_VERSION_1.
            .store8(at(0x14), 0)
            .acknowledge_device(slot)
            .store32(at(0x08), 1)
            .store32(at(0x0c), 1)
            .store8(at(0x14), 11)
            .store16(at(0x10), 0);
        let code = (0..queues).fold(code, |code, queue| {
            let rings = rings(slot, queue);
            code.store16(at(0x16), queue as u16)
                .store16(at(0x18), 8)
                .store32(at(0x20), rings)
                .store32(at(0x28), rings + AVAILABLE)
                .store32(at(0x30), rings + USED)
                .store16(at(0x1a), 0)
                .store16(at(0x1c), 1)
        });
        code.store8(at(0x14), 15)
    }

    /// Has a device interrupt the first processor by its vector 0.
    pub fn allow_interrupts(self, slot: u32) -> Self {
        /// Where the control word is of the function's MSI-X capability.
        const CONTROL: u32 = 0x86;
        [0xfee0_0000, 0, 0x40, 0]
            .into_iter()
            .zip((0..).step_by(4))
            .fold(self, |code, (word, offset)| {
                code.store32(table(slot, offset), word)
            })
            .store16(configuration(slot, CONTROL), 0x8000)
    }

    /// Gives a device a buffer to write to in its first queue, and waits until it
    /// has.
    pub fn have_written(self, slot: u32) -> Self {
        const BUFFER: u32 = 0x30_0000;
        const WRITABLE: u32 = 2;
        let rings = rings(slot, 0);
        self.store32(rings, BUFFER)
            .store32(rings + 8, 64)
            .store32(rings + 12, WRITABLE)
            // One of it, after the flags.
            .store32(rings + AVAILABLE, 1 << 16)
            .notify_device(slot)
            .wait_for32(rings + USED, 1 << 16)
    }

    /// Notifies a device of its first queue.
    pub fn notify_device(self, slot: u32) -> Self {
        self.store16(register(slot, 0x3000), 0)
    }

    /// Does what `code` does again and again.
    pub fn for_ever(self, code: Self) -> Self {
        let back = -(code.0.len() as i32 + 5);
        // ; jmp to its begin
        self.bytes(&code.0)
            .bytes(&[0xe9])
            .bytes(&back.to_le_bytes())
    }

    /// Keeps a byte in memory, and prints it again and again from there.
    pub fn print_for_ever(self, byte: u8) -> Self {
        // mov byte [0x1f00000], byte; 1: mov al, [0x1f00000]; out dx, al; jmp 1b
        self.port(SERIAL)
            .bytes(&[0xc6, 0x05, 0x00, 0x00, 0xf0, 0x01, byte])
            .bytes(&[0xa0, 0x00, 0x00, 0xf0, 0x01, 0xee, 0xeb, 0xf8])
    }

    /// Does nothing, so many times.
    pub fn count_down(self, from: u32) -> Self {
        // mov ecx, from; 1: dec ecx; jnz 1b
        self.bytes(&[0xb9])
            .bytes(&from.to_le_bytes())
            .bytes(&[0x49, 0x75, 0xfd])
    }

    /// Lets the local APIC's timer interrupt after so many cycles of the time
    /// stamp counter, prints a byte and a newline, and sleeps until then; prints another for
    /// ever once it is woken. Must be the first.
    pub fn sleep(self, cycles: u32, asleep: u8, woken: u8) -> Self {
        const SEGMENTS: u32 = 0x5000;
        const INTERRUPTS: u32 = 0x6000;
        const TABLES: u32 = 0x5100;
        const STACK: u32 = 0x8000;
        const VECTOR: u32 = 0x55;
        const APIC: u32 = 0xfee0_0000;
        let handler = Self::new().print_for_ever(woken).0;
        let skip = u8::try_from(handler.len()).unwrap();
        // A short jump before it.
        let handler_at = ENTRY + self.0.len() as u32 + 2;
        let gate = INTERRUPTS + VECTOR * 8;
        self.bytes(&[0xeb, skip])
            .bytes(&handler)
            // Flat segments of code and data, where the selectors point to that
            // the guest was started with.
            .store32(SEGMENTS + 0x10, 0x0000_ffff)
            .store32(SEGMENTS + 0x14, 0x00cf_9b00)
            .store32(SEGMENTS + 0x18, 0x0000_ffff)
            .store32(SEGMENTS + 0x1c, 0x00cf_9300)
            .store16(TABLES, 0x1f)
            .store32(TABLES + 2, SEGMENTS)
            // An interrupt gate.
            .store32(gate, 0x10 << 16 | handler_at & 0xffff)
            .store32(gate + 4, handler_at & 0xffff_0000 | 0x8e00)
            .store16(TABLES + 8, 0x7ff)
            .store32(TABLES + 10, INTERRUPTS)
            // lgdt, lidt; mov esp, STACK
            .bytes(&[0x0f, 0x01, 0x15])
            .bytes(&TABLES.to_le_bytes())
            .bytes(&[0x0f, 0x01, 0x1d])
            .bytes(&(TABLES + 8).to_le_bytes())
            .bytes(&[0xbc])
            .bytes(&STACK.to_le_bytes())
            // On, without the interrupts of older controllers (a clone is told
            // that it is one by such a line), its timer in the mode of deadlines.
            .store32(APIC + 0xf0, 0x1ff)
            .store32(APIC + 0x350, 1 << 16)
            .store32(APIC + 0x320, 2 << 17 | VECTOR)
            // rdtsc; add eax, cycles; adc edx, 0; mov ecx, 0x6e0; wrmsr
            .bytes(&[0x0f, 0x31, 0x05])
            .bytes(&cycles.to_le_bytes())
            .bytes(&[0x83, 0xd2, 0])
            .bytes(&[0xb9, 0xe0, 0x06, 0, 0, 0x0f, 0x30])
            .out(SERIAL, asleep)
            .out(SERIAL, b'\n')
            // sti; 1: hlt; jmp 1b
            .bytes(&[0xfb, 0xf4, 0xeb, 0xfd])
    }

    /// Sleeps for ever.
    pub fn halt(self) -> Self {
        // 1: cli; hlt; jmp 1b
        self.bytes(&[0xfa, 0xf4, 0xeb, 0xfc])
    }

    /// Runs for ever.
    pub fn spin(self) -> Self {
        // 1: jmp 1b
        self.bytes(&[0xeb, 0xfe])
    }

    /// An exception without a table to look its handler up in.
    pub fn triple_fault(self) -> Self {
        // lidt [0x5000], where memory is zero; ud2
        self.bytes(&[0x0f, 0x01, 0x1d, 0x00, 0x50, 0x00, 0x00])
            .bytes(&[0x0f, 0x0b])
    }

    pub fn power_off(self) -> Self {
        self.out(SLEEP, (5 << 2) | (1 << 5)).halt()
    }

    /// Its bytes.
    pub fn machine_code(&self) -> &[u8] {
        &self.0
    }

    /// The kernel file.
    pub fn kernel(self) -> File {
        Elf::new(self).file()
    }
}

/// What the file says, right or wrong.
pub struct Elf {
    pub code: Code,
    /// Where the code is to be loaded.
    pub address: u64,
    /// Type of the note that has the entry point: 18 is PVH's.
    pub note: u32,
    /// Program header entries said to be there.
    pub segments: u16,
}

impl Elf {
    pub fn new(code: Code) -> Self {
        Self {
            code,
            address: u64::from(ENTRY),
            note: 18,
            segments: 2,
        }
    }

    pub fn file(&self) -> File {
        const HEADER: u64 = 64;
        const SEGMENT: u64 = 56;
        let note_at = HEADER + 2 * SEGMENT;
        let note_size = 12 + 4 + 4;
        let code_at = note_at + note_size;
        let mut file = Vec::new();
        let mut put = |bytes: &[u8]| file.extend_from_slice(bytes);
        // e_ident: 64 bits, little endian, version 1.
        put(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        // e_type: executable, e_machine: x86-64, e_version.
        put(&[2, 0, 62, 0, 1, 0, 0, 0]);
        put(&u64::from(ENTRY).to_le_bytes());
        put(&HEADER.to_le_bytes());
        // e_shoff, e_flags.
        put(&[0; 12]);
        for field in [HEADER as u16, SEGMENT as u16, self.segments, 0, 0, 0] {
            put(&field.to_le_bytes());
        }
        let length = self.code.0.len() as u64;
        for (kind, at, address, size) in [
            (1_u32, code_at, self.address, length),
            (4, note_at, 0, note_size),
        ] {
            put(&kind.to_le_bytes());
            put(&7_u32.to_le_bytes());
            for field in [at, address, address, size, size, 4] {
                put(&field.to_le_bytes());
            }
        }
        for field in [4, 4, self.note] {
            put(&field.to_le_bytes());
        }
        put(b"Xen\0");
        put(&ENTRY.to_le_bytes());
        put(&self.code.0);
        contents(&file)
    }
}

/// A file with these bytes.
pub fn contents(bytes: &[u8]) -> File {
    let mut file = TempFile::new().unwrap().into_file();
    file.write_all(bytes).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    file
}

/// A file of zeros.
pub fn zeros(length: u64) -> File {
    let file = TempFile::new().unwrap().into_file();
    file.set_len(length).unwrap();
    file
}
