// SPDX-License-Identifier: Apache-2.0
//! How fast a program in a guest reads a disk: one request after another, so
//! that each waits for a notification, the VMM and an interrupt. `blk-4k` is
//! mostly these; `blk-1m` mostly copying. The disk is a file in memory: the
//! peer, the same program on the host, has no device at all below it, and so
//! the ratio is what a request to a virtual device costs, and not how it
//! compares with hardware. Neither has a target.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context, Result};
use bulkhead_agent_protocol::agent::DeviceNode;
use bulkhead_vmm_api::{BlkConfig, BlkEngine, PlugConfig};

use super::devices::{mib_per_second, per_second, with_guest, Loads, DISK};
use super::{Bench, Figure};

/// Bytes of the disk, a file in memory.
const SIZE: u64 = 32 << 20;
/// How many requests are made, of each size.
const SMALL: u64 = 2000;
const LARGE: u64 = SIZE >> 20;
const PEER: &str = "the file on the host";

/// `blk-4k` and `blk-1m`.
///
/// # Errors
/// When the guest does not come up, or a read fails.
pub fn figures(bench: &Bench) -> Result<Vec<Figure>> {
    let path = bench.dir.join("disk");
    let content: Vec<u8> = (0..SIZE / 4)
        .flat_map(|word| (word as u32).to_le_bytes())
        .collect();
    fs::write(&path, content).context("write a disk")?;
    with_guest(bench, "blk", |loads| take(loads, &path))
}

fn take(loads: &mut Loads, path: &Path) -> Result<Vec<Figure>> {
    let mut disks = Vec::new();
    for engine in [BlkEngine::Sync, BlkEngine::IoUring] {
        let config = BlkConfig {
            id: format!("disk{}", disks.len()),
            read_only: true,
            engine: Some(engine),
            ..BlkConfig::default()
        };
        let file: OwnedFd = File::open(path)?.into();
        disks.push(loads.guest.plug(PlugConfig::Blk(config), file)?);
    }
    let path = path.to_string_lossy().into_owned();
    let four = Reads::new("random", 4 << 10, SMALL);
    let mib = Reads::new("sequential", 1 << 20, LARGE);
    let [small, large] = [
        four.take(loads, &disks, &path),
        mib.take(loads, &disks, &path),
    ];
    let (small, large) = (small?, large?);
    let speed = |taken: [u64; 3]| taken.map(|took| per_second(SMALL, took));
    let [own, ring, host] = speed(small.took);
    let rate = |taken: [u64; 3]| taken.map(|took| mib_per_second(SIZE, took));
    let [own_mib, ring_mib, host_mib] = rate(large.took);
    Ok(vec![
        Figure::new(
            "blk-4k",
            own,
            "requests/s",
            &format!(
                "random unbuffered reads of 4 KiB one after another, {SMALL} from a disk of {} MiB in memory, synchronous engine, {}; io_uring {ring:.0}; beside the same program reading the disk's file on the host; no target",
                SIZE >> 20, small.told()
            ),
        )
        .beside(PEER, host),
        Figure::new(
            "blk-1m",
            own_mib,
            "MiB/s",
            &format!(
                "the same in order, {LARGE} of 1 MiB, {}; io_uring {ring_mib:.0}; no target",
                large.told()
            ),
        )
        .beside(PEER, host_mib),
    ])
}

/// Reads of a kind.
struct Reads {
    order: &'static str,
    block: String,
    count: u64,
}

/// What they took: nanoseconds by the synchronous engine, by io_uring and on the
/// host; notifications and interrupts of the first.
struct Taken {
    took: [u64; 3],
    count: u64,
    notifications: u64,
    interrupts: u64,
}

impl Reads {
    fn new(order: &'static str, block: u64, count: u64) -> Self {
        Self {
            order,
            block: block.to_string(),
            count,
        }
    }

    fn take(&self, loads: &mut Loads, disks: &[(u8, DeviceNode)], path: &str) -> Result<Taken> {
        let count = self.count.to_string();
        let load = |disk| ["read", disk, self.order, &self.block, &count];
        let [(slot, own), (_, ring)] = disks else {
            anyhow::bail!("not two disks");
        };
        let one = |took: Vec<u64>| took.first().copied().context("the program told no time");
        let before = loads.guest.metrics(*slot)?;
        let first = one(loads.in_guest(Some(own), &load(DISK))?)?;
        let after = loads.guest.metrics(*slot)?;
        let second = one(loads.in_guest(Some(ring), &load(DISK))?)?;
        let host = one(loads.on_host(&load(path))?)?;
        Ok(Taken {
            took: [first, second, host],
            count: self.count,
            notifications: after.notifications - before.notifications,
            interrupts: after.interrupts - before.interrupts,
        })
    }
}

impl Taken {
    fn told(&self) -> String {
        let each = |all: u64| all as f64 / self.count as f64;
        format!(
            "each with {:.2} notifications and {:.2} interrupts",
            each(self.notifications),
            each(self.interrupts)
        )
    }
}
