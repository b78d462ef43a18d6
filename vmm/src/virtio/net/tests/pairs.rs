// SPDX-License-Identifier: Apache-2.0
//! Several pairs of queues.

use std::os::unix::net::UnixDatagram;

use bulkhead_vmm_api::{NetConfig, Rate, RateLimits};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MQ;

use super::{command, config, device, with_pairs, Net};
use crate::virtio::{
    device::VirtioDevice,
    testing::{Driver, READ_ONLY, READ_WRITE},
};

const PAIRS: usize = 3;
const CONTROL: usize = 2 * PAIRS;
/// Tokens of the first queue of the tap, and of the timer to transmit.
const TAPS: u32 = 2 * PAIRS as u32 + 1;
const TRANSMIT_TIMER: u32 = TAPS + PAIRS as u32 + 1;

fn interface() -> (Driver<Net>, Vec<UnixDatagram>) {
    let (net, wires) = with_pairs(&config(), PAIRS);
    (Driver::new(net), wires)
}

/// Has the driver use so many; the answer.
fn use_pairs(driver: &mut Driver<Net>, count: u16) -> u8 {
    let [low, high] = count.to_le_bytes();
    let answer = command(driver, CONTROL, &[4, 0, low, high]);
    // As the loop does, which is told.
    for queue in 0..CONTROL {
        driver.kick(queue);
    }
    answer
}

fn offer(driver: &mut Driver<Net>, queue: usize) -> u64 {
    let buffer = driver.buffer(64);
    driver.queue(queue, &[(buffer, 64, READ_WRITE)]);
    driver.kick(queue);
    buffer
}

fn send(driver: &mut Driver<Net>, queue: usize, byte: u8) {
    let packet = driver.buffer(64);
    driver.write(packet, &[byte; 64]);
    driver.queue(queue, &[(packet, 64, READ_ONLY)]);
    driver.kick(queue);
}

/// The packets at that end, by their first byte.
fn packets(wire: &UnixDatagram) -> Vec<u8> {
    let mut bytes = [0; 100];
    std::iter::from_fn(|| wire.recv(&mut bytes).ok().map(|_| bytes[0])).collect()
}

#[test]
fn how_many_there_are_is_told() {
    let (mut driver, _wires) = interface();
    let mut data = [0; 12];
    driver.device().read_config(0, &mut data);
    assert_eq!(data[8..10], [PAIRS as u8, 0]);
    assert_eq!(driver.device().queue_sizes().len(), CONTROL + 1);
    assert_ne!(driver.device().features() & (1 << VIRTIO_NET_F_MQ), 0);
    let (one, _) = device(&config());
    assert_eq!(one.features() & (1 << VIRTIO_NET_F_MQ), 0);
}

#[test]
fn each_pair_has_its_queue_of_the_tap() {
    let (mut driver, wires) = interface();
    assert_eq!(use_pairs(&mut driver, PAIRS as u16), 0);
    for (pair, wire) in wires.iter().enumerate() {
        send(&mut driver, 2 * pair + 1, pair as u8);
        assert_eq!(packets(wire), [pair as u8]);
        assert_eq!(driver.used(2 * pair + 1), [0]);
        let buffer = offer(&mut driver, 2 * pair);
        wire.send(&[7 + pair as u8; 50]).unwrap();
        driver.event(TAPS + pair as u32);
        assert_eq!(driver.used(2 * pair), [50]);
        assert_eq!(driver.read(buffer + 12, 1), [7 + pair as u8]);
    }
    assert!(!driver.broken());
}

#[test]
fn what_comes_for_a_pair_that_is_not_used_goes_to_one_that_is() {
    let (mut driver, wires) = interface();
    for wire in &wires {
        wire.send(&[1; 50]).unwrap();
    }
    // Only the first, until the driver says otherwise.
    for pair in 0..PAIRS {
        offer(&mut driver, 2 * pair);
        offer(&mut driver, 2 * pair);
        offer(&mut driver, 2 * pair);
        send(&mut driver, 2 * pair + 1, 1);
    }
    assert_eq!(driver.used(0), [50; 3]);
    assert!(driver.used(2).is_empty() && driver.used(4).is_empty());
    assert_eq!(
        wires.iter().map(packets).collect::<Vec<_>>(),
        [vec![1], vec![], vec![]]
    );
    // What was queued for another pair goes when that is used.
    assert_eq!(use_pairs(&mut driver, 2), 0);
    assert_eq!(
        wires.iter().map(packets).collect::<Vec<_>>(),
        [vec![], vec![1], vec![]]
    );
    assert!(driver.used(5).is_empty());
    for (tap, wire) in (TAPS..).zip(&wires) {
        offer(&mut driver, 0);
        wire.send(&[2; 40]).unwrap();
        driver.event(tap);
    }
    assert_eq!([0, 2, 4].map(|queue| driver.used(queue).len()), [2, 1, 0]);
    // Nor is a buffer of a pair that was in use kept from its queue.
    assert_eq!(use_pairs(&mut driver, 1), 0);
    wires[1].send(&[3; 30]).unwrap();
    driver.event(TAPS + 1);
    assert_eq!([0, 2].map(|queue| driver.used(queue).len()), [1, 0]);
    let positions: Vec<_> = driver.device().queues().unwrap().positions().collect();
    assert_eq!(positions[2], (2, 1, 1));
    assert!(!driver.broken());
}

#[test]
fn a_number_that_cannot_be_is_refused() {
    let (mut driver, wires) = interface();
    for count in [0, PAIRS as u16 + 1, 0x8000, 0xffff] {
        assert_eq!(use_pairs(&mut driver, count), 1, "{count}");
    }
    // Of no number, half a number, and another command with one.
    for bytes in [&[4, 0][..], &[4, 0, 1], &[4, 1, 1, 0]] {
        assert_eq!(command(&mut driver, CONTROL, bytes), 1, "{bytes:?}");
    }
    assert_eq!(driver.device().in_use, 1);
    assert!(!driver.broken());
    // Of one pair none can be chosen.
    let (net, _wire) = device(&config());
    let mut driver = Driver::new(net);
    assert_eq!(command(&mut driver, 2, &[4, 0, 1, 0]), 1);
    drop(wires);
}

#[test]
fn a_driver_that_knows_of_one_finds_commands_after_it() {
    let (net, wires) = with_pairs(&config(), PAIRS);
    let mut driver = Driver::refusing(net, 1 << VIRTIO_NET_F_MQ);
    driver.device().announce();
    assert_eq!(command(&mut driver, 2, &[3, 0]), 0);
    assert_eq!(command(&mut driver, 2, &[4, 0, 2, 0]), 1);
    // There is nothing behind that.
    for queue in 3..=CONTROL {
        offer(&mut driver, queue);
        send(&mut driver, queue, 1);
        assert!(driver.used(queue).is_empty());
    }
    offer(&mut driver, 0);
    wires[2].send(&[1; 20]).unwrap();
    driver.event(TAPS + 2);
    assert_eq!(driver.used(0), [20]);
    assert!(!driver.broken());
}

#[test]
fn how_many_are_used_is_saved_and_ends_with_a_reset() {
    let (mut driver, wires) = interface();
    assert_eq!(use_pairs(&mut driver, 2), 0);
    let state = driver.device().save().unwrap();
    driver.restart();
    assert_eq!(driver.device().in_use, 1);
    driver.device().restore(&state).unwrap();
    assert_eq!(driver.device().in_use, 2);
    // Of as many only.
    for count in [1, 2, 4] {
        let (mut other, _wires) = with_pairs(&config(), count);
        other.restore(&state).unwrap_err();
    }
    let (mut one, _wire) = device(&config());
    let single = one.save().unwrap();
    // As it has always been.
    assert_eq!(single.len(), 13);
    driver.device().restore(&single).unwrap_err();
    for count in [0, 4, u16::MAX] {
        let mut changed = state.clone();
        changed[13..].copy_from_slice(&count.to_le_bytes());
        driver.device().restore(&changed).unwrap_err();
    }
    for length in 0..state.len() {
        driver.device().restore(&state[..length]).unwrap_err();
    }
    drop(wires);
}

#[test]
fn when_a_wait_ends_each_has_its_turn() {
    let operations = Some(Rate {
        per_second: 1000,
        burst: 1,
    });
    let (net, wires) = with_pairs(
        &NetConfig {
            transmit_rate: Some(RateLimits {
                operations,
                bytes: None,
            }),
            ..config()
        },
        PAIRS,
    );
    let mut driver = Driver::new(net);
    assert_eq!(use_pairs(&mut driver, PAIRS as u16), 0);
    for _ in 0..20 {
        for pair in 0..PAIRS {
            send(&mut driver, 2 * pair + 1, pair as u8);
        }
    }
    let mut sent = [0; PAIRS];
    while sent.iter().sum::<usize>() < 30 {
        std::thread::sleep(std::time::Duration::from_micros(1500));
        driver.event(TRANSMIT_TIMER);
        for (sent, wire) in sent.iter_mut().zip(&wires) {
            *sent += packets(wire).len();
        }
    }
    assert!(sent.iter().all(|count| *count > 0), "{sent:?}");
}
