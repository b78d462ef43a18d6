// SPDX-License-Identifier: Apache-2.0
//! What a driver does that leaves the guest, and what does not.

use std::{io::Read, os::unix::net::UnixStream, time::Duration};

use bulkhead_vmm_api::{BalloonConfig, Call, Exits};

use crate::{
    guest::{configuration, own_configuration, register, table, Code, SERIAL},
    vmm::{kvm, Setup, Vmm, LONG},
};

/// Runs code with a balloon in slot 1 until it has printed so much; that, and
/// the machine.
fn run(code: Code, printed: usize) -> (Vec<u8>, Vmm, UnixStream) {
    let mut setup = Setup::new(code.halt().kernel());
    setup.config.devices.balloon = Some(BalloonConfig::default());
    let mut serial = setup.serial();
    let vmm = Vmm::run(&setup);
    (read(&mut serial, printed), vmm, serial)
}

fn read(serial: &mut UnixStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    serial.read_exact(&mut bytes).unwrap();
    bytes
}

/// Exits of code, beside those of the same without what is looked at.
fn memory_exits(code: Code) -> u64 {
    let (_, mut vmm, _serial) = run(code.print("\n"), 1);
    let Exits { mmio, .. } = vmm.status().exits;
    vmm.call(Call::Shutdown).unwrap();
    mmio
}

/// Address of the selected queue's descriptors, lower half.
const DESCRIPTORS: u32 = 0x20;
const QUEUE_SELECT: u32 = 0x16;

/// Where the balloon's MSI-X capability has its message control, in the upper
/// half of the word.
const MSIX: u32 = 0x40 + 3 * 16 + 20;
const ENABLE: u32 = 1 << 31;

/// Local APIC: spurious interrupts, and the requests for vectors 32 to 63.
const APIC_SPURIOUS: u32 = 0xfee0_00f0;
const APIC_REQUESTS: u32 = 0xfee0_0210;

#[test]
fn an_interrupt_table_is_memory() {
    if !kvm("an_interrupt_table_is_memory") {
        return;
    }
    let mut code = Code::new();
    for vector in 0..5 {
        let at = table(1, vector * 16);
        code = code.store32(at, 0xfee0_0000).store32(at + 4, 0);
        code = code.store32(at + 8, 33 + vector).load32(at + 8);
        code = code.store32(at + 12, 0).load32(at + 12);
    }
    assert_eq!(memory_exits(code), 0);
}

/// A driver that breaks a rule, which the device tells it by the interrupt for
/// its configuration: vector 0, which is masked.
fn broken_rule() -> Code {
    Code::new()
        .store32(APIC_SPURIOUS, 0x1ff)
        .store32(table(1, 0), 0xfee0_0000)
        .store32(table(1, 8), 33)
        .store32(configuration(1, MSIX), ENABLE)
        .store16(register(1, 0x10), 0)
        .store8(register(1, 0x14), 3)
        // VERSION_1, and it is alive without queues.
        .store32(register(1, 0x08), 1)
        .store32(register(1, 0x0c), 1)
        .store8(register(1, 0x14), 11)
        .store8(register(1, 0x14), 15)
}

#[test]
fn what_a_mask_holds_up_comes_when_it_is_lifted() {
    if !kvm("what_a_mask_holds_up_comes_when_it_is_lifted") {
        return;
    }
    let pending = register(1, 0x5000);
    let code = broken_rule()
        // NEEDS_RESET; it is pending and has not come.
        .print32(register(1, 0x14))
        .print32(pending)
        .print32(APIC_REQUESTS)
        .store32(table(1, 12), 0)
        .wait_for32(pending, 0)
        .print32(pending)
        .print32(APIC_REQUESTS)
        .print32(table(1, 8))
        .out(SERIAL, b'\n');
    let (printed, ..) = run(code, 25);
    assert_eq!(printed[0], 15 | 64);
    let words: Vec<u32> = printed[4..24]
        .chunks_exact(4)
        .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
        .collect();
    assert_eq!(words, [1, 0, 0, 1 << 1, 33]);
}

#[test]
fn what_a_device_says_of_itself_is_memory_that_can_only_be_read() {
    if !kvm("what_a_device_says_of_itself_is_memory_that_can_only_be_read") {
        return;
    }
    let wanted = own_configuration(1, 0);
    let actual = own_configuration(1, 4);
    assert_eq!(memory_exits(Code::new().load32(wanted).load32(actual)), 0);
    let code = Code::new()
        .store32(wanted, 5)
        .store32(actual, 256)
        .print32(wanted)
        .print32(actual)
        .out(SERIAL, b'\n');
    let (printed, mut vmm, _serial) = run(code, 9);
    assert_eq!(printed, [0, 0, 0, 0, 0, 1, 0, 0, b'\n']);
    let status = vmm.status();
    assert_eq!(status.exits.mmio, 2);
    // A MiB of 4 KiB pages.
    assert_eq!(status.balloon.unwrap().actual_mib, 1);
}

#[test]
fn writes_that_set_up_are_gathered_and_none_is_lost() {
    if !kvm("writes_that_set_up_are_gathered_and_none_is_lost") {
        return;
    }
    // More than KVM's ring holds, twice.
    const WRITES: u32 = 400;
    let descriptors = register(1, DESCRIPTORS);
    let mut code = Code::new().store8(register(1, 0x14), 3);
    for value in 0..WRITES {
        code = code.store32(descriptors, value << 4);
    }
    let code = code
        .store16(register(1, QUEUE_SELECT), 1)
        .store32(descriptors, 7 << 4)
        .print32(descriptors)
        .store16(register(1, QUEUE_SELECT), 0)
        .print32(descriptors)
        .out(SERIAL, b'\n');
    let (printed, mut vmm, _serial) = run(code, 9);
    let words: Vec<u32> = printed[..8]
        .chunks_exact(4)
        .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
        .collect();
    assert_eq!(words, [7 << 4, (WRITES - 1) << 4]);
    // The status, two reads, and what the ring had no room for.
    assert_eq!(vmm.status().exits.mmio, 3 + 2);
}

#[test]
fn what_the_serial_port_only_keeps_is_gathered() {
    if !kvm("what_the_serial_port_only_keeps_is_gathered") {
        return;
    }
    const SCRATCH: u16 = SERIAL + 7;
    // The port's own first write, by which it knows that it is used.
    let mut code = Code::new().out(SERIAL, b'a');
    for value in 0..100 {
        code = code.out(SCRATCH, value);
    }
    let code = code.copy_port(SCRATCH, SERIAL).print("\n");
    let (printed, mut vmm, _serial) = run(code, 3);
    assert_eq!(printed, *b"ac\n");
    assert_eq!(vmm.status().exits.pio, 4);
}

#[test]
fn sizing_a_function_leaves_the_guest_once() {
    if !kvm("sizing_a_function_leaves_the_guest_once") {
        return;
    }
    let mut code = Code::new();
    for at in [0x10, 0x14, 0x18, 0x1c, 0x20, 0x24, 0x30] {
        let register = configuration(1, at);
        code = code.store32(register, u32::MAX).load32(register);
        code = code.store32(register, 0);
    }
    assert_eq!(memory_exits(code), 1);
}

#[test]
fn a_snapshot_has_what_was_gathered() {
    if !kvm("a_snapshot_has_what_was_gathered") {
        return;
    }
    let code = Code::new()
        .store8(register(1, 0x14), 3)
        .print("w\n")
        .store16(register(1, QUEUE_SELECT), 3)
        .count_down(400_000)
        .print32(register(1, QUEUE_SELECT))
        .print("\n");
    let (_, mut vmm, _serial) = run(code, 2);
    // Well within the time that it counts.
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(vmm.status().exits.mmio, 1);
    let snapshot = vmm.snapshot().unwrap();
    drop(vmm);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(LONG)).unwrap();
    let restored = Vmm::restore(&snapshot, |config, fds| {
        fds.push(theirs.into());
        config.serial = Some(2);
        config.devices.balloon = Some(BalloonConfig::default());
    });
    let mut vmm = restored.unwrap();
    vmm.call(Call::Resume).unwrap();
    assert_eq!(read(&mut ours, 4)[..2], [3, 0]);
}

#[test]
fn exits_that_are_no_accesses_are_told_apart() {
    if !kvm("exits_that_are_no_accesses_are_told_apart") {
        return;
    }
    let mut setup = Setup::new(Code::new().print("up\n").spin().kernel());
    let mut serial = setup.serial();
    let mut vmm = Vmm::run(&setup);
    serial.read_exact(&mut [0; 3]).unwrap();
    assert_eq!(vmm.status().exits, vmm.status().vcpus[0]);
    // It does nothing that leaves the guest: it is taken out of it.
    let before = vmm.status().exits;
    vmm.call(Call::Pause).unwrap();
    let after = vmm.status().exits;
    assert!(after.interrupted > before.interrupted, "{after:?}");
    let interrupted = after.interrupted;
    let expected = Exits {
        pio: 3,
        interrupted,
        ..Exits::default()
    };
    assert_eq!(after, expected);
}
