// SPDX-License-Identifier: Apache-2.0
//! A guest that sets a device up as it likes: configuration space, the
//! transport's registers, the interrupts' table, queues and what is in them, in
//! any order and with any widths; and that is saved and restored meanwhile.
#![no_main]

mod machine;

use bulkhead_vmm::{bus::BusDevice, pci::BAR_SIZE};
use libfuzzer_sys::fuzz_target;
use machine::{Machine, MEMORY, SLOT_NUMBER};
use vm_memory::{Bytes, GuestAddress};

/// Bytes of a step.
const STEP: usize = 12;
/// The common configuration's registers: offset and width (virtio 1.2 §4.1.4.3).
const REGISTERS: [(u64, usize); 17] = [
    (0x00, 4),
    (0x04, 4),
    (0x08, 4),
    (0x0c, 4),
    (0x10, 2),
    (0x12, 2),
    (0x14, 1),
    (0x16, 2),
    (0x18, 2),
    (0x1a, 2),
    (0x1c, 2),
    (0x20, 8),
    (0x24, 4),
    (0x28, 8),
    (0x2c, 4),
    (0x30, 8),
    (0x34, 4),
];
/// Bytes between the queues' rings, and where they are in them.
const QUEUE_SPACE: u64 = 0x4000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;

/// A driver that does it right up to DRIVER_OK, with as many queues as `queues`
/// has bits.
fn set_up(machine: &Machine, queues: u8, features: u32) {
    for status in [0, 1, 3] {
        machine.write(0x14, &[status]);
    }
    // VIRTIO_F_VERSION_1, and of the rest what is asked for.
    for (half, bits) in [(0_u32, features), (1, 1)] {
        machine.write(0x08, &half.to_le_bytes());
        machine.write(0x0c, &bits.to_le_bytes());
    }
    machine.write(0x14, &[11]);
    for queue in (0..8_u16).filter(|queue| queues >> queue & 1 != 0) {
        let base = u64::from(queue) * QUEUE_SPACE;
        machine.write(0x16, &queue.to_le_bytes());
        machine.write(0x18, &32_u16.to_le_bytes());
        for (register, address) in [(0x20, base), (0x28, base + AVAILABLE), (0x30, base + USED)] {
            machine.write(register, &address.to_le_bytes());
        }
        machine.write(0x1a, &queue.to_le_bytes());
        machine.write(0x1c, &1_u16.to_le_bytes());
    }
    machine.write(0x14, &[15]);
}

fuzz_target!(|data: &[u8]| {
    let Some((kind, steps)) = data.split_first() else {
        return;
    };
    let mut machine = Machine::new(*kind);
    let identity = |machine: &Machine| {
        let mut identity = [0; 4];
        machine.root.read((SLOT_NUMBER as u64) << 15, &mut identity);
        identity
    };
    let before = identity(&machine);
    for step in steps.chunks_exact(STEP) {
        let word = u32::from_le_bytes([step[1], step[2], step[3], 0]);
        let length = usize::from(step[0] >> 4) % 9;
        let (written, mut read) = (&step[4..][..length], [0; 8]);
        let queue = usize::from(step[1]) % machine.queues();
        match step[0] % 16 {
            // All of the window of configuration space, and a little beyond.
            0 => machine.root.write(u64::from(word % 0x11_0000), written),
            1 => machine
                .root
                .read(u64::from(word % 0x11_0000), &mut read[..length]),
            // The function's own part.
            2 => {
                let offset = (SLOT_NUMBER as u64) << 15 | u64::from(word % 0x1000);
                machine.root.write(offset, written);
            }
            // All registers, and a little beyond.
            3 => machine.window.write(u64::from(word % 0x11_0000), written),
            4 => machine
                .window
                .read(u64::from(word % 0x11_0000), &mut read[..length]),
            5 => machine.write(u64::from(word) % BAR_SIZE, written),
            // A register in its width.
            6..=8 => {
                let (offset, width) = REGISTERS[usize::from(step[1]) % REGISTERS.len()];
                machine.write(offset, &step[4..][..width]);
            }
            9 => set_up(
                &machine,
                step[1],
                u32::from_le_bytes([step[4], step[5], step[6], step[7]]),
            ),
            // What the guest writes where nobody is told.
            10 | 11 => {
                let at = GuestAddress(u64::from(word) % MEMORY as u64);
                let _ = machine.memory.write_slice(&step[4..], at);
            }
            12 => machine.table.set_word(
                usize::from(step[1]) & !3,
                u32::from_le_bytes([step[4], step[5], step[6], step[7]]),
            ),
            // A chain is available: a descriptor of one buffer.
            13 => {
                let base = queue as u64 * QUEUE_SPACE;
                let put = |at: u64, bytes: &[u8]| {
                    let _ = machine.memory.write_slice(bytes, GuestAddress(at));
                };
                let length = u32::from(step[4]) << (step[5] % 12);
                put(base, &u64::from(word).to_le_bytes());
                put(base + 8, &length.to_le_bytes());
                put(base + 12, &[step[6] & 7, 0, step[7] % 32, 0]);
                put(base + AVAILABLE + 2, &step[8..10]);
                machine.write(0x3000 + queue as u64 * 4, &[0; 2]);
                machine.event(queue as u32);
            }
            14 => machine.event(u32::from(step[1])),
            // What is saved can be restored, by another machine with the same
            // memory; it goes on.
            _ => match machine.function.save() {
                Ok(state) => {
                    let next = Machine::with(*kind, machine.memory.clone());
                    next.function
                        .restore(&state)
                        .expect("it was saved by this version");
                    machine = next;
                }
                Err(error) => panic!("a device that is at rest cannot be saved: {error}"),
            },
        }
    }
    assert_eq!(
        identity(&machine),
        before,
        "the guest changed what the function is"
    );
});
