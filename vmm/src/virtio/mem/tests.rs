// SPDX-License-Identifier: Apache-2.0

use super::{Layout, Mem, BLOCK, SLOT};
use crate::virtio::{
    device::VirtioDevice,
    testing::{Driver, READ_ONLY, READ_WRITE},
};

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
const ACK: u16 = 0;
const NACK: u16 = 1;
const ERROR: u16 = 3;
/// Where the region lies: far from the driver's memory, but for a test.
const BASE: u64 = 4 << 30;

fn device(base: u64) -> Mem {
    let mut device = Mem::new(Layout::new(base, 4 * SLOT));
    device.set_mapped(vec![0, 1]);
    device.request(64 << 20);
    device
}

fn driver() -> Driver<Mem> {
    Driver::new(device(BASE))
}

/// The answer, and the state in it.
fn ask(driver: &mut Driver<Mem>, kind: u16, address: u64, count: u16) -> (u16, u16) {
    let mut request = vec![0; 24];
    request[..2].copy_from_slice(&kind.to_le_bytes());
    request[8..16].copy_from_slice(&address.to_le_bytes());
    request[16..18].copy_from_slice(&count.to_le_bytes());
    let at = driver.buffer(24);
    driver.write(at, &request);
    let answer = driver.buffer(10);
    driver.write(answer, &[0xff; 10]);
    driver.queue(0, &[(at, 24, READ_ONLY), (answer, 10, READ_WRITE)]);
    driver.kick(0);
    assert_eq!(driver.used(0), [10]);
    let bytes = driver.read(answer, 10);
    let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    (word(0), word(8))
}

fn field(driver: &mut Driver<Mem>, index: u64) -> u64 {
    let mut bytes = [0; 8];
    driver.device().read_config(index * 8, &mut bytes);
    u64::from_le_bytes(bytes)
}

#[test]
fn blocks_are_plugged_up_to_what_was_asked_for() {
    let mut driver = driver();
    let fields: Vec<u64> = (0..7).map(|index| field(&mut driver, index)).collect();
    assert_eq!(fields, [BLOCK, 0, BASE, 4 * SLOT, 2 * SLOT, 0, 64 << 20]);
    assert_eq!(ask(&mut driver, PLUG, BASE, 16), (ACK, 0));
    assert_eq!(ask(&mut driver, PLUG, BASE + SLOT, 15), (ACK, 0));
    assert_eq!(driver.device().plugged(), 62 << 20);
    assert_eq!(field(&mut driver, 5), 62 << 20);
    assert_eq!(ask(&mut driver, PLUG, BASE + (64 << 20), 2), (NACK, 0));
    assert_eq!(ask(&mut driver, STATE, BASE, 16), (ACK, 0));
    assert_eq!(ask(&mut driver, STATE, BASE, 17), (ACK, 2));
    assert_eq!(ask(&mut driver, STATE, BASE + (64 << 20), 1), (ACK, 1));
    assert!(driver.device().uses(0) && driver.device().uses(1));
    driver.device().request(0);
    assert_eq!(ask(&mut driver, UNPLUG, BASE, 16), (ACK, 0));
    assert!(!driver.device().uses(0));
    assert_eq!(ask(&mut driver, UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!(driver.device().plugged(), 0);
    assert!(!driver.broken());
}

#[test]
fn what_a_driver_may_not_is_refused() {
    let mut driver = driver();
    let wrong = [
        (PLUG, BASE - BLOCK, 1),
        (PLUG, BASE + 4096, 1),
        (PLUG, BASE, 0),
        // In what it must not use yet, and beyond all.
        (PLUG, BASE + 2 * SLOT - BLOCK, 2),
        (PLUG, BASE + 4 * SLOT, 1),
        (PLUG, u64::MAX - BLOCK + 1, u16::MAX),
        (PLUG, 0, 1),
        (UNPLUG, BASE, 1),
        (STATE, BASE + 2 * SLOT, 1),
        (4, BASE, 1),
        (u16::MAX, BASE, 1),
    ];
    for (kind, address, count) in wrong {
        let answer = ask(&mut driver, kind, address, count);
        assert_eq!(answer, (ERROR, 0), "{kind} {address:#x} {count}");
    }
    assert_eq!(ask(&mut driver, PLUG, BASE, 2), (ACK, 0));
    assert_eq!(ask(&mut driver, PLUG, BASE + BLOCK, 2), (ERROR, 0));
    assert_eq!(ask(&mut driver, UNPLUG, BASE + BLOCK, 2), (ERROR, 0));
    assert_eq!(driver.device().plugged(), 2 * BLOCK);
    assert!(!driver.broken());
}

#[test]
fn a_request_in_the_wrong_form_stops_the_device() {
    for chain in [
        vec![(0_u64, 23_u32, READ_ONLY), (64, 10, READ_WRITE)],
        vec![(0, 24, READ_ONLY), (64, 9, READ_WRITE)],
        vec![(0, 24, READ_ONLY)],
        vec![(64, 10, READ_WRITE)],
        vec![(0, 24, READ_ONLY), (1 << 40, 10, READ_WRITE)],
    ] {
        let mut driver = driver();
        let at = driver.buffer(128);
        let moved: Vec<_> = chain
            .iter()
            .map(|(offset, length, flags)| (at + offset, *length, *flags))
            .collect();
        driver.queue(0, &moved);
        driver.kick(0);
        assert!(driver.broken(), "{chain:?}");
    }
}

#[test]
fn unplugged_memory_is_given_back() {
    // A region of which the driver's own memory is the first part.
    let mut driver = Driver::new(device(0));
    let at = 10 << 20;
    driver.write(at, &[7; 4096]);
    assert_eq!(ask(&mut driver, PLUG, at, 1), (ACK, 0));
    assert_eq!(driver.read(at, 1), [7]);
    assert_eq!(ask(&mut driver, UNPLUG, at, 1), (ACK, 0));
    assert_eq!(driver.read(at, 1), [0]);
}

#[test]
fn what_is_plugged_outlasts_the_driver_and_a_snapshot() {
    let mut driver = driver();
    assert_eq!(ask(&mut driver, PLUG, BASE, 3), (ACK, 0));
    driver.restart();
    assert_eq!(driver.device().plugged(), 3 * BLOCK);
    let state = driver.device().save().unwrap();
    let layout = Mem::layout_in(&state).unwrap();
    assert_eq!(layout.mapped, [0, 1]);

    let mut other = Mem::new(Layout::new(BASE, 4 * SLOT));
    other.set_mapped(layout.mapped);
    other.restore(&state).unwrap();
    assert_eq!(other.plugged(), 3 * BLOCK);
    assert_eq!(other.requested(), 64 << 20);

    // Other regions, and what is no state.
    let mut smaller = Mem::new(Layout::new(BASE, SLOT));
    let error = smaller.restore(&state).unwrap_err().to_string();
    assert_eq!(error, "it can become 128 MiB and could become 512");
    assert!(device(BASE).restore(&state[1..]).is_err());
    assert!(device(BASE).restore(&[&state[..], &[0]].concat()).is_err());
    let mut unplaced = device(BASE);
    unplaced.set_mapped(vec![0]);
    assert!(unplaced.restore(&state).is_err());
}

#[test]
fn parts_are_few_and_cover_the_region() {
    for size in [1, 2, 3, 16, 17, 100, 8192_u64].map(|slots| slots * SLOT) {
        let layout = Layout::new(BASE, size);
        let count = layout.slots_for(size);
        assert!((1..=16).contains(&count), "{size}: {count}");
        assert_eq!(layout.slot(0).start, BASE);
        assert_eq!(layout.slot(count - 1).end, BASE + size);
        assert!(layout.slot_size() % SLOT == 0 && layout.is_sound());
    }
    let unsound = |change: fn(&mut Layout)| {
        let mut layout = Layout::new(BASE, 4 * SLOT);
        change(&mut layout);
        !layout.is_sound()
    };
    assert!(unsound(|l| l.size = 0));
    assert!(unsound(|l| l.size += 1));
    assert!(unsound(|l| l.base += 4096));
    assert!(unsound(|l| l.base = u64::MAX - SLOT + 1));
    assert!(unsound(|l| l.mapped = vec![4]));
    assert!(unsound(|l| l.mapped = vec![1, 0]));
}
