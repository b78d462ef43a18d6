// SPDX-License-Identifier: Apache-2.0
//! What a clone tells the network of itself.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::time::Instant;

use anyhow::{ensure, Context as _, Result};
use bulkhead_agent_protocol::agent;
use bulkhead_tests::start::Start;
use bulkhead_tests::vmm::Vmm;
use bulkhead_vmm_api::{NetConfig, PlugConfig};

use crate::context::{same, Context, LIMIT};
use crate::plugged::Guest;
use crate::runner::{tests, Test};
use crate::vmm::Host;

pub const TESTS: &[Test] = tests![twice a_clone_announces_itself];

/// An interface of the tests: what it is plugged with, and the wire's end.
fn interface() -> Result<(NetConfig, OwnedFd, UnixDatagram)> {
    let (ours, theirs) = UnixDatagram::pair()?;
    theirs.set_nonblocking(true)?;
    ours.set_read_timeout(Some(LIMIT))?;
    let config = NetConfig {
        id: "eth7".into(),
        tap: 0,
        mac: [2, 0, 0, 0, 0, 7],
        ..NetConfig::default()
    };
    Ok((config, theirs.into(), ours))
}

/// Waits for a frame that says unasked which hardware address has 10.9.9.1
/// (RFC 5227: sender and target are the same).
fn announcement(wire: &UnixDatagram) -> Result<()> {
    const HEADERS: usize = 12 + 14;
    let mut packet = [0; 2048];
    let begin = Instant::now();
    loop {
        let length = wire.recv(&mut packet).context("no announcement")?;
        // Others may come for ever.
        ensure!(begin.elapsed() < LIMIT, "only other frames");
        let frame = &packet[..length];
        if length < HEADERS + 28 || frame[12 + 12..HEADERS] != [8, 6] {
            continue;
        }
        let arp = &frame[HEADERS..];
        let (sender, address, target) = (&arp[8..14], &arp[14..18], &arp[24..28]);
        if address == target {
            same(sender, &[2, 0, 0, 0, 0, 7][..])?;
            return same(address, &[10, 9, 9, 1][..]);
        }
    }
}

fn a_clone_announces_itself(context: &Context, start: Start) -> Result<()> {
    let mut guest = Guest::up_with(context, start, "announce-template", "")?;
    let (config, tap, wire) = interface()?;
    guest.vmm.plug(PlugConfig::Net(config), tap)?;
    let network = agent::Network {
        interfaces: vec![agent::Interface {
            mac: vec![2, 0, 0, 0, 0, 7],
            name: "eth0".into(),
            mtu: 1500,
            addresses: vec![agent::IpAddress {
                address: vec![10, 9, 9, 1],
                prefix_len: 24,
                ..Default::default()
            }],
            ..Default::default()
        }],
        ..Default::default()
    };
    guest.runtime.block_on(guest.agent.add_network(network))?;
    // Before its link is up, which its first frames tell, a guest can announce
    // nothing.
    wire.recv(&mut [0; 2048]).context("no frame")?;
    drop(wire);
    let dir = guest.host.dir.clone();
    guest
        .vmm
        .snapshot(&dir.join("state"), &dir.join("memory"))?;
    drop(guest);

    let host = Host::new(context, "announce-clone")?;
    let (config, tap, wire) = interface()?;
    let mut vmm = Vmm::start(&context.products, LIMIT)?;
    vmm.clone_with(
        &dir.join("state"),
        &dir.join("memory"),
        &context.products,
        &host.dir,
        |devices, fds| {
            fds.push(tap);
            devices.net.push(NetConfig {
                tap: fds.len() as u32 - 1,
                ..config
            });
        },
    )?;
    if let Err(error) = announcement(&wire) {
        let status = vmm.status()?;
        return Err(error.context(format!("{status:?}\n{}", host.console())));
    }
    vmm.wait_clone().with_context(|| host.console())
}
