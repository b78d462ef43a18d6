// SPDX-License-Identifier: Apache-2.0

use super::Rng;
use crate::virtio::testing::{Driver, READ_WRITE};

#[test]
fn buffers_are_filled_with_different_bytes() {
    let mut driver = Driver::new(Rng::new());
    let first = driver.buffer(32);
    let second = driver.buffer(32);
    driver.queue(0, &[(first, 32, READ_WRITE)]);
    driver.queue(0, &[(second, 32, READ_WRITE)]);
    driver.kick(0);
    assert_eq!(driver.used(0), [32, 32]);
    let (first, second) = (driver.read(first, 32), driver.read(second, 32));
    assert_ne!(first, second);
    assert_ne!(first, vec![0; 32]);
    assert_eq!(driver.interrupts(0), 1);
}

#[test]
fn a_huge_request_is_cut_and_a_wild_address_stops_the_device() {
    let mut driver = Driver::new(Rng::new());
    let buffer = driver.buffer(0x20000);
    driver.queue(0, &[(buffer, 0x20000, READ_WRITE)]);
    driver.kick(0);
    assert_eq!(driver.used(0), [0x10000]);
    driver.queue(0, &[(0xffff_0000_0000, 32, READ_WRITE)]);
    driver.kick(0);
    assert!(driver.broken());
}
