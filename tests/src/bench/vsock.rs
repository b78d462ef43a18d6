// SPDX-License-Identifier: Apache-2.0
//! How fast a program in a guest talks with one on the host. `vsock-rtt` is a
//! message and its answer, as most of what the agent and the runtime say;
//! `vsock-both-ways` how far the directions are apart when much is said, as by a
//! container's output: a VMM is easily much worse at one of them.

use anyhow::{bail, Context, Result};
use bulkhead_vmm_api::DeviceKind;

use super::devices::{mib_per_second, serve, with_guest, Loads};
use super::{Bench, Figure};

/// A message that comes back, and how often.
const MESSAGE: u32 = 64;
const ROUNDS: u32 = 1000;
/// What goes each way in bulk.
const BYTES: u64 = 32 << 20;
const PORT: u32 = 7000;
/// Connections of the guest: once to warm up, and those that are measured.
const CONNECTIONS: usize = 5;

/// `vsock-rtt` and `vsock-both-ways`.
///
/// # Errors
/// When the guest does not come up, or a connection fails.
pub fn figures(bench: &Bench) -> Result<Vec<Figure>> {
    with_guest(bench, "vsock", take)
}

fn take(loads: &mut Loads) -> Result<Vec<Figure>> {
    let (listener, path) = loads.listen(PORT)?;
    let own = format!("vsock:{PORT}");
    let host = format!("unix:{path}");
    // The guest's, and then the host's own.
    let server = serve(listener, 2 * CONNECTIONS);
    let (message, rounds, bytes) = (MESSAGE.to_string(), ROUNDS.to_string(), BYTES.to_string());
    let loads_of = |address| {
        [
            vec!["echo", address, &message, "50"],
            vec!["echo", address, &message, &rounds],
            vec!["send", address, &bytes],
            vec!["receive", address, &bytes],
            vec!["echo", address, "4096", &rounds],
        ]
    };
    let mut guest = Vec::new();
    let mut told = Vec::new();
    for load in loads_of(own.as_str()) {
        let before = metrics(loads)?;
        guest.push(one(loads.in_guest(None, &load)?)?);
        let after = metrics(loads)?;
        told.push([0, 1].map(|at| after[at] - before[at]));
    }
    let mut peer = Vec::new();
    for load in loads_of(host.as_str()) {
        peer.push(one(loads.on_host(&load)?)?);
    }
    match server.join() {
        Ok(served) => served.context("the host's end")?,
        Err(_) => bail!("the host's end has panicked"),
    }
    let each = |took: u64| took as f64 / 1000.0 / f64::from(ROUNDS);
    let rates = [guest[2], guest[3]].map(|took| mib_per_second(BYTES, took));
    let peers = [peer[2], peer[3]].map(|took| mib_per_second(BYTES, took));
    Ok(vec![
        Figure::new(
            "vsock-rtt",
            each(guest[1]),
            "us",
            &format!(
                "{MESSAGE} bytes from the guest to the host and back, mean of {ROUNDS}; of 4096 bytes {:.1}; beside the same program on the host, at the same socket; no target",
                each(guest[4])
            ),
        )
        .beside("Unix socket", each(peer[1])),
        Figure::new(
            "vsock-both-ways",
            rates[0].min(rates[1]) / rates[0].max(rates[1]),
            "of faster",
            &format!(
                "the slower direction of {} MiB in writes of 64 KiB; {:.0} MiB/s to the host with {:.1} notifications and {:.1} interrupts a MiB, {:.0} to the guest with {:.1} and {:.1}; the same program at the same socket on the host: {:.0} and {:.0}; target: at least 0.7",
                BYTES >> 20,
                rates[0],
                per_mib(told[2][0]),
                per_mib(told[2][1]),
                rates[1],
                per_mib(told[3][0]),
                per_mib(told[3][1]),
                peers[0],
                peers[1]
            ),
        ),
    ])
}

fn per_mib(count: u64) -> f64 {
    count as f64 / (BYTES >> 20) as f64
}

/// Notifications and interrupts of the vsock device.
fn metrics(loads: &mut Loads) -> Result<[u64; 2]> {
    let devices = loads.guest.vmm().status()?.devices;
    let vsock = devices
        .iter()
        .find(|device| device.kind == DeviceKind::Vsock);
    let metrics = vsock.context("no vsock device")?.metrics;
    Ok([metrics.notifications, metrics.interrupts])
}

fn one(took: Vec<u64>) -> Result<u64> {
    match took[..] {
        [took] => Ok(took),
        ref other => bail!("not one time: {other:?}"),
    }
}
