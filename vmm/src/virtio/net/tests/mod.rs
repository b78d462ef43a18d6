// SPDX-License-Identifier: Apache-2.0
//! A datagram socket stands for the tap: it keeps packets apart as a tap does.

use std::{
    fs::File,
    os::{fd::OwnedFd, unix::net::UnixDatagram},
};

use bulkhead_vmm_api::NetConfig;

mod limits;
mod pairs;

use super::{Backend, Net};
use crate::virtio::{
    device::VirtioDevice,
    testing::{Driver, READ_ONLY, READ_WRITE},
};

/// Token of the tap of an interface with one pair of queues.
const TAP: u32 = 3;

fn config() -> NetConfig {
    NetConfig {
        id: "eth0".into(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: Some(1400),
        ..NetConfig::default()
    }
}

fn device(config: &NetConfig) -> (Net, UnixDatagram) {
    let (net, wires) = with_pairs(config, 1);
    let [wire] = wires.try_into().unwrap();
    (net, wire)
}

/// With one socket for each queue of the tap.
fn with_pairs(config: &NetConfig, count: usize) -> (Net, Vec<UnixDatagram>) {
    let sockets = (0..count).map(|_| {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        ours.set_nonblocking(true).unwrap();
        (ours, File::from(OwnedFd::from(theirs)))
    });
    let (wires, taps) = sockets.unzip();
    (
        Net::new(config, Backend { taps, vhost: None }).unwrap(),
        wires,
    )
}

fn interface() -> (Driver<Net>, UnixDatagram) {
    let (net, wire) = device(&config());
    (Driver::new(net), wire)
}

#[test]
fn packets_go_both_ways() {
    let (mut driver, wire) = interface();
    let packet = driver.buffer(100);
    driver.write(packet, &[7; 100]);
    driver.queue(1, &[(packet, 12, READ_ONLY), (packet + 12, 88, READ_ONLY)]);
    driver.kick(1);
    let mut received = [0; 200];
    assert_eq!(wire.recv(&mut received).unwrap(), 100);
    assert_eq!(received[..100], [7; 100]);
    assert_eq!(driver.used(1), [0]);

    let first = driver.buffer(64);
    let second = driver.buffer(64);
    driver.queue(0, &[(first, 64, READ_WRITE)]);
    driver.queue(0, &[(second, 64, READ_WRITE)]);
    wire.send(&[9; 100]).unwrap();
    driver.event(TAP);
    // Merged: two buffers, and the header says so.
    assert_eq!(driver.used(0), [64, 36]);
    assert_eq!(driver.read(first + 10, 2), [2, 0]);
    assert_eq!(driver.read(second, 36), [9; 36]);
}

#[test]
fn a_small_packet_leaves_the_other_buffers_to_the_next() {
    let (mut driver, wire) = interface();
    let buffers: Vec<u64> = (0..4).map(|_| driver.buffer(64)).collect();
    for buffer in &buffers {
        driver.queue(0, &[(*buffer, 64, READ_WRITE)]);
    }
    for (number, buffer) in (1..).zip(&buffers[..2]) {
        wire.send(&[number; 50]).unwrap();
        driver.event(TAP);
        assert_eq!(driver.used(0), [50]);
        assert_eq!(driver.read(buffer + 12, 38), [number; 38]);
    }
    // Whoever continues takes them off the queue again.
    let position = |driver: &mut Driver<Net>| {
        let device = driver.device();
        let queues = device.queues().unwrap();
        let (_, available, used) = queues.positions().next().unwrap();
        (available, used)
    };
    assert_eq!(position(&mut driver), (4, 2));
    driver.device().save().unwrap();
    assert_eq!(position(&mut driver), (2, 2));
    // One packet in what is left, and none in what was given before.
    wire.send(&[3; 128]).unwrap();
    driver.event(TAP);
    assert_eq!(driver.used(0), [64, 64]);
    assert_eq!(driver.read(buffers[2] + 10, 2), [2, 0]);
    assert_eq!(driver.read(buffers[3], 64), [3; 64]);
    assert!(!driver.broken());
    // A driver that starts anew gets nothing into its old buffers.
    let buffer = driver.buffer(64);
    driver.queue(0, &[(buffer, 64, READ_WRITE)]);
    driver.event(TAP);
    driver.restart();
    wire.send(&[4; 50]).unwrap();
    driver.event(TAP);
    assert_eq!(driver.read(buffer, 64), [0; 64]);
}

#[test]
fn a_buffer_without_room_for_a_header_stops_the_device() {
    let (mut driver, _wire) = interface();
    for length in [64, 11] {
        let buffer = driver.buffer(length);
        driver.queue(0, &[(buffer, length as u32, READ_WRITE)]);
    }
    driver.event(TAP);
    assert!(driver.broken());
}

#[test]
fn an_answer_that_is_there_comes_with_what_was_sent() {
    let (mut driver, wire) = interface();
    let buffer = driver.buffer(64);
    driver.queue(0, &[(buffer, 64, READ_WRITE)]);
    for _ in 0..3 {
        let packet = driver.buffer(60);
        driver.queue(1, &[(packet, 60, READ_ONLY)]);
    }
    wire.send(&[5; 40]).unwrap();
    driver.kick(1);
    assert_eq!(driver.used(1), [0, 0, 0]);
    assert_eq!(driver.used(0), [40]);
    assert_eq!([0, 1].map(|index| driver.interrupts(index)), [1, 1]);
}

#[test]
fn without_buffers_the_tap_is_not_watched() {
    let (mut driver, wire) = interface();
    wire.send(&[1; 50]).unwrap();
    driver.event(TAP);
    assert!(!driver.device().taps[0].watched);
    let buffer = driver.buffer(64);
    driver.queue(0, &[(buffer, 64, READ_WRITE)]);
    driver.kick(0);
    assert_eq!(driver.used(0), [50]);
}

#[test]
fn an_address_outside_memory_stops_the_device() {
    let (mut driver, wire) = interface();
    driver.queue(0, &[(0xffff_ffff_0000, 64, READ_WRITE)]);
    wire.send(&[1; 50]).unwrap();
    driver.event(TAP);
    assert!(driver.broken());
    let (mut driver, _wire) = interface();
    driver.queue(1, &[(0xffff_ffff_0000, 64, READ_ONLY)]);
    driver.kick(1);
    assert!(driver.broken());
}

#[test]
fn the_address_and_mtu_are_told() {
    let (mut driver, _wire) = interface();
    let mut data = [0; 12];
    driver.device().read_config(0, &mut data);
    assert_eq!(data, [2, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0x78, 5]);
}

/// A command in that queue, its last byte in a piece of its own, and the answer
/// to it.
fn command(driver: &mut Driver<Net>, queue: usize, bytes: &[u8]) -> u8 {
    let length = bytes.len() as u64;
    let at = driver.buffer(length);
    driver.write(at, bytes);
    let answer = driver.buffer(1);
    driver.write(answer, &[0xff]);
    let chain = [
        (at, length as u32 - 1, READ_ONLY),
        (at + length - 1, 1, READ_ONLY),
        (answer, 1, READ_WRITE),
    ];
    driver.queue(queue, &chain);
    driver.kick(queue);
    assert_eq!(driver.used(queue), [1]);
    driver.read(answer, 1)[0]
}

#[test]
fn a_restored_guest_is_asked_to_announce_itself_until_it_has() {
    let (mut driver, _wire) = interface();
    let status = |driver: &mut Driver<Net>| {
        let mut data = [0; 2];
        driver.device().read_config(6, &mut data);
        u16::from_le_bytes(data)
    };
    assert_eq!(status(&mut driver), 1);
    driver.device().announce();
    assert_eq!(status(&mut driver), 3);
    // It is asked still when it is restored once more.
    let state = driver.device().save().unwrap();
    // What there is no command for, and another than the acknowledgement.
    let others = [[0, 0, 0, 0], [3, 1, 0, 0], [4, 0, 1, 0], [255; 4]];
    for bytes in others.iter().flat_map(|all| [&all[..], &all[..2]]) {
        assert_eq!(command(&mut driver, 2, bytes), 1);
        assert_eq!(status(&mut driver), 3);
    }
    assert_eq!(command(&mut driver, 2, &[3, 0]), 0);
    assert_eq!(status(&mut driver), 1);
    driver.device().restore(&state).unwrap();
    assert_eq!(status(&mut driver), 3);
    assert!(!driver.broken());
}

#[test]
fn a_command_in_the_wrong_form_stops_the_device() {
    for chain in [
        vec![(0, 1, READ_ONLY), (8, 1, READ_WRITE)],
        vec![(0, 2, READ_ONLY)],
        vec![(8, 1, READ_WRITE)],
        vec![(0, 2, READ_ONLY), (8, 0, READ_WRITE)],
        vec![(0, 2, READ_ONLY), (1 << 40, 1, READ_WRITE)],
    ] {
        let (mut driver, _wire) = interface();
        let at = driver.buffer(64);
        let chain: Vec<_> = chain
            .into_iter()
            .map(|(offset, length, flags)| (at + offset, length, flags))
            .collect();
        driver.queue(2, &chain);
        driver.kick(2);
        assert!(driver.broken(), "{chain:?}");
    }
}
