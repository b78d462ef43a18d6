// SPDX-License-Identifier: Apache-2.0
//! What it costs to move data through a guest's interface: how often the guest
//! is left for a MiB of it, for whatever reason. The figure is of a guest that
//! has done the same before, so that it touches no new memory, which costs an
//! exit a page and has nothing to do with interfaces; that of the first time is
//! told beside it.

use std::net::TcpListener;
use std::thread;

use anyhow::{bail, Context, Result};
use bulkhead_agent_protocol::agent;
use bulkhead_vmm_api::{NetConfig, PlugConfig};

use super::devices::{mib_per_second, with_guest, Loads};
use super::{kvm, Bench, Figure, LIMIT};
use crate::{load, proc, sys};

/// What goes each way.
const BYTES: u64 = 64 << 20;
const TAP: &str = "bench0";
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
/// The host's end, and the guest's.
const HOST: &str = "10.9.9.1";
const GUEST: [u8; 4] = [10, 9, 9, 2];
const PREFIX: u32 = 24;
/// What KVM counts: exits of all kinds, to the VMM, idle, for the host's
/// interrupts, for memory that was not touched before.
const EXITS: [&str; 5] = ["exits", "mmio_exits", "halt_exits", "irq_exits", "pf_fixed"];

/// `net-exits-per-mib`.
///
/// # Errors
/// When the guest does not come up, or a connection fails.
pub fn figures(bench: &Bench) -> Result<Vec<Figure>> {
    with_guest(bench, "net", take)
}

fn take(loads: &mut Loads) -> Result<Vec<Figure>> {
    let slot = plug(loads)?;
    let first = Way::take(loads, slot, "send")?;
    let send = Way::take(loads, slot, "send")?;
    Way::take(loads, slot, "receive")?;
    let receive = Way::take(loads, slot, "receive")?;
    let how = format!(
        "exits of all kinds while {} MiB go by TCP from the guest to the host, through a tap, and the guest has done so once before; {}; the first time {:.2}, {:.2} of them for memory that was not touched before; the other way {:.2}, {}; target: at most 8",
        BYTES >> 20,
        send.told(),
        per_mib(first.exits[0]),
        per_mib(first.exits[4]),
        per_mib(receive.exits[0]),
        receive.told()
    );
    let figure = Figure::new("net-exits-per-mib", per_mib(send.exits[0]), "exits", &how);
    Ok(vec![figure])
}

/// Gives the guest an interface with the host at the other end; its slot.
fn plug(loads: &mut Loads) -> Result<u8> {
    let tap = sys::open_tap(TAP).context("open a tap")?;
    proc::set_up_interface(TAP, &format!("{HOST}/{PREFIX}"), LIMIT)?;
    let config = NetConfig {
        id: TAP.into(),
        tap: 0,
        mac: MAC,
        ..NetConfig::default()
    };
    let slot = loads.guest.vmm().plug(PlugConfig::Net(config), tap)?;
    let network = agent::Network {
        interfaces: vec![agent::Interface {
            mac: MAC.to_vec(),
            name: "eth0".into(),
            mtu: 1500,
            addresses: vec![agent::IpAddress {
                address: GUEST.to_vec(),
                prefix_len: PREFIX,
                ..Default::default()
            }],
            ..Default::default()
        }],
        ..Default::default()
    };
    let added = loads.guest.agent().add_network(network);
    loads.guest.wait_for(added)?;
    Ok(slot)
}

/// What moving it in one direction took.
struct Way {
    exits: [u64; EXITS.len()],
    notifications: u64,
    interrupts: u64,
    guest: u64,
    host: u64,
}

impl Way {
    fn take(loads: &mut Loads, slot: u8, what: &str) -> Result<Self> {
        let bytes = BYTES.to_string();
        let before = loads.guest.metrics(slot)?;
        let (guest, exits) = meet(HOST, |address| {
            loads.in_guest(None, &[what, address, &bytes])
        })?;
        let after = loads.guest.metrics(slot)?;
        let (host, _) = meet("127.0.0.1", |address| {
            loads.on_host(&[what, address, &bytes])
        })?;
        Ok(Self {
            exits,
            notifications: after.notifications - before.notifications,
            interrupts: after.interrupts - before.interrupts,
            guest,
            host,
        })
    }

    fn told(&self) -> String {
        let [_, vmm, idle, interrupted, memory] = self.exits.map(per_mib);
        format!(
            "{:.2} of them to the VMM, {idle:.2} idle, {interrupted:.2} for interrupts of the host, {memory:.2} for new memory; {:.2} notifications and {:.2} interrupts of the device; {:.0} MiB/s, the same program through the host's loopback {:.0}",
            vmm,
            per_mib(self.notifications),
            per_mib(self.interrupts),
            mib_per_second(BYTES, self.guest),
            mib_per_second(BYTES, self.host),
        )
    }
}

fn per_mib(count: u64) -> f64 {
    count as f64 / (BYTES >> 20) as f64
}

/// Has a program connect to an address where this one is at the other end; what
/// it took, and what KVM counted from its request to the end of the data.
fn meet(
    host: &str,
    program: impl FnOnce(&str) -> Result<Vec<u64>>,
) -> Result<(u64, [u64; EXITS.len()])> {
    let listener = TcpListener::bind((host, 0)).with_context(|| format!("listen at {host}"))?;
    let port = listener.local_addr()?.port();
    let server = thread::spawn(move || {
        let mut counted = Vec::new();
        load::serve(&mut listener.accept()?.0, || {
            let mut now = [0; EXITS.len()];
            for (count, name) in now.iter_mut().zip(EXITS) {
                *count = kvm::counter(name)?;
            }
            counted.push(now);
            Ok(())
        })?;
        anyhow::Ok(counted)
    });
    let took = program(&format!("tcp:{host}:{port}"))?;
    let Ok(counted) = server.join() else {
        bail!("the host's end has panicked");
    };
    match (&took[..], &counted?[..]) {
        ([took], [begin, end]) => {
            let mut exits = *end;
            for (end, begin) in exits.iter_mut().zip(begin) {
                *end -= begin;
            }
            Ok((*took, exits))
        }
        other => bail!("not one time between two counts: {other:?}"),
    }
}
