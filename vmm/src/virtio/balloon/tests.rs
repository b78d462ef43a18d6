// SPDX-License-Identifier: Apache-2.0

use bulkhead_vmm_api::BalloonConfig;

use super::Balloon;
use crate::virtio::{
    device::VirtioDevice,
    testing::{Driver, READ_ONLY, READ_WRITE},
};

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const REPORTING: usize = 3;

fn driver() -> Driver<Balloon> {
    Driver::new(Balloon::new(&BalloonConfig::default()))
}

/// Page-aligned memory of that many pages, filled with sevens.
fn pages(driver: &mut Driver<Balloon>, count: u64) -> u64 {
    let at = driver.buffer((count + 1) * 4096).next_multiple_of(4096);
    driver.write(at, &vec![7; (count * 4096) as usize]);
    at
}

fn give(driver: &mut Driver<Balloon>, queue: usize, numbers: &[u32]) {
    let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    let at = driver.buffer(bytes.len() as u64);
    driver.write(at, &bytes);
    driver.queue(queue, &[(at, bytes.len() as u32, READ_ONLY)]);
    driver.kick(queue);
}

#[test]
fn pages_of_the_balloon_are_given_back() {
    let mut driver = driver();
    let at = pages(&mut driver, 4);
    let first = (at / 4096) as u32;
    // One is not of the balloon; one is far outside of memory.
    give(
        &mut driver,
        INFLATE,
        &[first + 1, first, first + 3, u32::MAX],
    );
    assert_eq!(driver.used(INFLATE), [0]);
    let seen: Vec<u8> = (0..4)
        .map(|page| driver.read(at + page * 4096, 1)[0])
        .collect();
    assert_eq!(seen, [0, 0, 7, 0]);
    assert_eq!(driver.device().status().returned, 3 * 4096);
    // Taken again, it is memory like any other.
    give(&mut driver, DEFLATE, &[first]);
    assert_eq!(driver.used(DEFLATE), [0]);
    driver.write(at, &[5]);
    assert_eq!(driver.read(at, 1), [5]);
}

#[test]
fn a_driver_with_too_many_page_numbers_is_stopped() {
    let mut driver = driver();
    give(&mut driver, INFLATE, &[0; 4097]);
    assert!(driver.broken());
}

#[test]
fn reported_ranges_are_given_back_whatever_they_are() {
    let mut driver = driver();
    let at = pages(&mut driver, 8);
    driver.queue(
        REPORTING,
        &[
            (at, 2 * 4096, READ_WRITE),
            (at + 4 * 4096, 4096, READ_WRITE),
            (u64::MAX - 4095, u32::MAX, READ_WRITE),
        ],
    );
    driver.kick(REPORTING);
    assert_eq!(driver.used(REPORTING), [0]);
    assert!(!driver.broken());
    let seen: Vec<u8> = (0..6)
        .map(|page| driver.read(at + page * 4096, 1)[0])
        .collect();
    assert_eq!(seen, [0, 0, 7, 7, 0, 7]);
    assert_eq!(driver.interrupts(REPORTING), 1);
}

#[test]
fn a_guest_that_poisons_free_pages_keeps_them() {
    let mut driver = driver();
    let at = pages(&mut driver, 1);
    driver.device().write_config(12, &0xaa_u32.to_le_bytes());
    driver.queue(REPORTING, &[(at, 4096, READ_WRITE)]);
    driver.kick(REPORTING);
    assert_eq!(driver.used(REPORTING), [0]);
    assert_eq!(driver.read(at, 1), [7]);
}

#[test]
fn the_target_is_in_the_configuration_and_the_driver_says_how_far_it_is() {
    let mut driver = driver();
    driver.device().set_target(3);
    let mut target = [0; 4];
    driver.device().read_config(0, &mut target);
    assert_eq!(u32::from_le_bytes(target), 768);
    driver.device().write_config(4, &512_u32.to_le_bytes());
    // Only whole fields count.
    driver.device().write_config(4, &[1, 1]);
    let status = driver.device().status();
    assert_eq!((status.target_mib, status.actual_mib), (3, 2));
    driver.restart();
    assert_eq!(driver.device().status().actual_mib, 0);
}

#[test]
fn statistics_are_told_and_asked_for_again() {
    let mut driver = driver();
    let told = |driver: &mut Driver<Balloon>, free: u64| {
        let mut entries = Vec::new();
        for (tag, value) in [(4_u16, free), (5, 99), (777, 1)] {
            entries.extend_from_slice(&tag.to_le_bytes());
            entries.extend_from_slice(&value.to_le_bytes());
        }
        let at = driver.buffer(entries.len() as u64);
        driver.write(at, &entries);
        driver.queue(STATS, &[(at, entries.len() as u32, READ_ONLY)]);
        driver.kick(STATS);
    };
    assert_eq!(driver.device().status().statistics, None);
    told(&mut driver, 10);
    // The device has the buffer until somebody asks.
    assert_eq!(driver.used(STATS), [0; 0]);
    let first = driver.device().status().statistics.unwrap();
    assert_eq!((first.free, first.total), (Some(10), Some(99)));
    assert_eq!(first.available, None);
    assert_eq!(driver.used(STATS), [0]);
    assert_eq!(driver.interrupts(STATS), 1);
    told(&mut driver, 20);
    // One too many: the older is given back.
    told(&mut driver, 30);
    assert_eq!(driver.used(STATS), [0]);
    let next = driver.device().status().statistics.unwrap();
    assert_eq!(next.free, Some(30));
}

#[test]
fn a_saved_balloon_goes_on_and_gives_its_buffer_back() {
    let mut driver = driver();
    driver.device().set_target(5);
    let at = driver.buffer(10);
    driver.queue(STATS, &[(at, 10, READ_ONLY)]);
    driver.kick(STATS);
    let state = driver.device().save().unwrap();
    let mut other = self::driver();
    other.device().restore(&state).unwrap();
    assert_eq!(other.device().status().target_mib, 5);
    assert_eq!(other.used(STATS), [0]);
    assert!(other.device().restore(&state[..state.len() - 1]).is_err());
    let mut wrong = Balloon::new(&BalloonConfig::default());
    assert!(wrong.restore(&[]).is_err());
}

#[test]
fn what_is_switched_off_is_not_offered() {
    let features = |deflate_on_oom, free_page_reporting| {
        Balloon::new(&BalloonConfig {
            deflate_on_oom,
            free_page_reporting,
        })
        .features()
    };
    assert_eq!(features(true, true) & 0x24, 0x24);
    assert_eq!(features(false, true) & 0x24, 0x20);
    assert_eq!(features(true, false) & 0x24, 0x04);
}
