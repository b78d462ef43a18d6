// SPDX-License-Identifier: Apache-2.0
//! Limits, with the device at work by itself as in a VM. Time is measured from
//! below only: a machine may be slow.

use std::{
    os::unix::net::UnixDatagram,
    thread::sleep,
    time::{Duration, Instant},
};

use bulkhead_vmm_api::{NetConfig, Rate, RateLimits};

use super::{config, device};
use crate::virtio::{
    device::VirtioDevice,
    testing::{Driver, READ_ONLY, READ_WRITE},
};

use super::Net;

/// Far longer than anything here takes.
const LONG: Duration = Duration::from_secs(60);
const HEADER: usize = 12;

fn operations(per_second: u64, burst: u64) -> RateLimits {
    RateLimits {
        operations: Some(Rate { per_second, burst }),
        bytes: None,
    }
}

fn bytes(per_second: u64, burst: u64) -> RateLimits {
    RateLimits {
        bytes: Some(Rate { per_second, burst }),
        operations: None,
    }
}

fn live(config: &NetConfig) -> (Driver<Net>, UnixDatagram) {
    let (net, wire) = device(config);
    (Driver::live(net), wire)
}

/// Queues packets of so many bytes, and tells the device.
fn send(driver: &mut Driver<Net>, count: usize, length: usize) {
    for _ in 0..count {
        let packet = driver.buffer((HEADER + length) as u64);
        driver.queue(1, &[(packet, (HEADER + length) as u32, READ_ONLY)]);
    }
    driver.notify(1);
}

fn offer_buffers(driver: &mut Driver<Net>, count: usize) {
    for _ in 0..count {
        let buffer = driver.buffer(2048);
        driver.queue(0, &[(buffer, 2048, READ_WRITE)]);
    }
    driver.notify(0);
}

fn wait(driver: &mut Driver<Net>, queue: usize, count: usize) {
    let begin = Instant::now();
    let mut seen = 0;
    while seen < count {
        seen += driver.used(queue).len();
        assert!(begin.elapsed() < LONG, "{seen} of {count} packets");
        sleep(Duration::from_millis(1));
    }
    assert_eq!(seen, count);
}

#[test]
fn packets_beyond_the_limit_wait_and_are_sent() {
    for limits in [operations(50, 2), bytes(50_000, 2000)] {
        let (mut driver, wire) = live(&NetConfig {
            transmit_rate: Some(limits),
            ..config()
        });
        let begin = Instant::now();
        send(&mut driver, 12, 1000);
        wait(&mut driver, 1, 12);
        // Two at once, and ten at 50 a second; of bytes one is needed to begin.
        assert!(begin.elapsed() >= Duration::from_millis(179));
        for _ in 0..12 {
            assert_eq!(wire.recv(&mut [0; 2048]).unwrap(), HEADER + 1000);
        }
        let metrics = driver.metrics();
        assert_eq!((metrics.requests, metrics.errors), (12, 0));
        // A packet that waits is counted once: one or several go when it has.
        assert!((5..=10).contains(&metrics.throttled), "{metrics:?}");
        assert!(!driver.broken());
    }
}

#[test]
fn packets_beyond_the_limit_wait_and_are_received() {
    for limits in [operations(50, 2), bytes(50_000, 2000)] {
        let (mut driver, wire) = live(&NetConfig {
            receive_rate: Some(limits),
            ..config()
        });
        // As many at a time as a socket keeps.
        let begin = Instant::now();
        offer_buffers(&mut driver, 12);
        wire.set_nonblocking(false).unwrap();
        for _ in 0..12 {
            wire.send(&[0; HEADER + 1000]).unwrap();
        }
        wait(&mut driver, 0, 12);
        assert!(begin.elapsed() >= Duration::from_millis(179));
        let metrics = driver.metrics();
        assert_eq!((metrics.requests, metrics.errors), (12, 0));
        assert!((5..=10).contains(&metrics.throttled), "{metrics:?}");
        // What does not wait is not counted as if it did.
        offer_buffers(&mut driver, 1);
        sleep(Duration::from_millis(50));
        assert_eq!(driver.metrics().throttled, metrics.throttled);
        assert!(!driver.broken());
    }
}

#[test]
fn a_direction_waits_by_itself() {
    let (mut driver, wire) = live(&NetConfig {
        transmit_rate: Some(operations(1, 1)),
        receive_rate: Some(operations(1 << 30, 1 << 30)),
        ..config()
    });
    send(&mut driver, 8, 100);
    wait(&mut driver, 1, 1);
    offer_buffers(&mut driver, 20);
    wire.set_nonblocking(false).unwrap();
    let begin = Instant::now();
    for _ in 0..20 {
        wire.send(&[0; HEADER + 100]).unwrap();
    }
    wait(&mut driver, 0, 20);
    // Of the others one comes each second.
    let sent = driver.used(1).len();
    assert!(sent as u64 <= begin.elapsed().as_secs() + 1, "{sent} sent");
    assert_eq!(
        driver.device().receive_limit.as_ref().map(|l| l.waits()),
        Some(false)
    );
}

#[test]
fn a_driver_that_starts_anew_does_not_evade_the_limit() {
    let (net, wire) = device(&NetConfig {
        transmit_rate: Some(operations(1, 2)),
        ..config()
    });
    let mut driver = Driver::new(net);
    let begin = Instant::now();
    let mut sent = 0;
    for _ in 0..4 {
        let packet = driver.buffer(64);
        for _ in 0..4 {
            driver.queue(1, &[(packet, 64, READ_ONLY)]);
        }
        driver.kick(1);
        sent += driver.used(1).len();
        driver.restart();
    }
    assert!(sent >= 2);
    let allowed = 2 + begin.elapsed().as_secs() as usize + 1;
    assert!(sent <= allowed, "{sent} sent");
    for _ in 0..sent {
        wire.recv(&mut [0; 100]).unwrap();
    }
    wire.recv(&mut [0; 100]).unwrap_err();
}

#[test]
fn what_waits_is_still_there_after_a_restore() {
    let (net, _wire) = device(&NetConfig {
        transmit_rate: Some(operations(1, 1)),
        ..config()
    });
    let mut driver = Driver::new(net);
    let packet = driver.buffer(64);
    for _ in 0..3 {
        driver.queue(1, &[(packet, 64, READ_ONLY)]);
    }
    driver.kick(1);
    let sent = driver.used(1).len() as u16;
    driver.device().save().unwrap();
    let device = driver.device();
    let mut positions = device.queues().unwrap().positions();
    // Nothing was taken that is not sent.
    assert_eq!(positions.nth(1), Some((1, sent, sent)));
}

#[test]
fn nobody_waits_for_a_device_that_has_stopped() {
    let (mut driver, _wire) = live(&NetConfig {
        transmit_rate: Some(operations(20, 1)),
        ..config()
    });
    send(&mut driver, 2, 100);
    wait(&mut driver, 1, 1);
    // One waits for 50 ms.
    let buffer = driver.buffer(8);
    driver.queue(2, &[(buffer, 8, READ_ONLY)]);
    driver.notify(2);
    let begin = Instant::now();
    while !driver.broken() {
        assert!(begin.elapsed() < LONG);
        sleep(Duration::from_millis(1));
    }
    sleep(Duration::from_millis(100));
    let limit = |driver: &mut Driver<Net>| {
        let device = driver.device();
        device.transmit_limit.as_ref().map(|limit| limit.waits())
    };
    assert_eq!(limit(&mut driver), Some(false));
    assert!(driver.used(1).is_empty());
}
