// SPDX-License-Identifier: Apache-2.0
//! A guest's packets and commands: any descriptors, rings and data, of an
//! interface with one or two pairs of queues, with limits or without. Sockets,
//! which keep packets apart as well, stand for the tap.
#![no_main]

mod guest;

use std::{
    fs::File,
    os::{fd::OwnedFd, unix::net::UnixDatagram},
};

use bulkhead_vmm::virtio::net::{Backend, Net};
use bulkhead_vmm_api::{NetConfig, Rate, RateLimits};
use libfuzzer_sys::fuzz_target;

/// What there is to receive, by each queue of the tap: as large as the largest,
/// less than a header, and some that are usual.
const PACKETS: [usize; 5] = [4096, 5, 12, 90, 1526];

fuzz_target!(|data: &[u8]| {
    let Some((first, rest)) = data.split_first() else {
        return;
    };
    let rate = Rate {
        per_second: 1 << 20,
        burst: 64,
    };
    let limits = (first & 2 != 0).then_some(RateLimits {
        bytes: Some(rate),
        operations: Some(rate),
    });
    let config = NetConfig {
        id: "fuzz".into(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: Some(1500),
        transmit_rate: limits,
        receive_rate: limits,
        ..NetConfig::default()
    };
    let pair = |_| {
        let (ours, theirs) = UnixDatagram::pair().expect("sockets");
        ours.set_nonblocking(true).expect("a flag");
        theirs.set_nonblocking(true).expect("a flag");
        for length in PACKETS {
            ours.send(&vec![0xaa; length]).expect("a packet is sent");
        }
        (ours, File::from(OwnedFd::from(theirs)))
    };
    let (_wires, taps): (Vec<_>, Vec<_>) = (0..=first & 1).map(pair).unzip();
    let backend = Backend { taps, vhost: None };
    let mut device = Net::new(&config, backend).expect("an interface");
    guest::drive(&mut device, rest);
});
