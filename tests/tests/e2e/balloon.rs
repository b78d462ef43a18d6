// SPDX-License-Identifier: Apache-2.0
//! What the balloon does to the host's memory, and to a guest that wants its
//! own back.

use std::fs;

use anyhow::{bail, ensure, Context as _, Result};
use bulkhead_agent_protocol::agent::ContainerRequest;
use bulkhead_tests::start::Start;
use bulkhead_vmm_api::{BalloonStatus, BalloonTarget, Call};

use crate::context::{same, until, Context, LIMIT};
use crate::plugged::Guest;
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![
    twice what_a_balloon_holds_is_the_hosts,
    a_balloon_yields_before_a_process_is_killed
];

/// What the guests of these tests have.
const GUEST_MIB: u64 = 256;

/// MiB of a guest's memory that are its VMM's alone: of the longest row of
/// mappings without a gap, for one that gives pages back becomes several.
fn private(guest: &Guest) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{}/smaps", guest.vmm.pid()))?;
    // Where it begins and ends, and KiB.
    let mut rows: Vec<(u64, u64, u64)> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (first, second) = (words.next().unwrap_or_default(), words.next());
        if let Some((start, end)) = first.split_once('-') {
            let (start, end) = (
                u64::from_str_radix(start, 16)?,
                u64::from_str_radix(end, 16)?,
            );
            let usable = second.is_some_and(|rights| rights.starts_with("rw"));
            match rows.last_mut() {
                Some(row) if row.1 == start && usable => row.1 = end,
                _ => rows.push((start, if usable { end } else { start }, 0)),
            }
        } else if first.starts_with("Private_") {
            let kib: u64 = second.context("no number")?.parse()?;
            rows.last_mut().context("no mapping")?.2 += kib;
        }
    }
    let longest = rows.iter().max_by_key(|row| row.1 - row.0);
    let (start, end, kib) = longest.context("no mappings")?;
    ensure!(end - start >= GUEST_MIB << 20, "no mapping of a guest");
    Ok(kib / 1024)
}

/// Asks the guest for memory, and waits until it has given it.
fn inflate(guest: &mut Guest, mib: u32) -> Result<()> {
    guest.vmm.call(Call::Balloon(BalloonTarget { mib }), &[])?;
    let mut actual = 0;
    until(LIMIT, "the balloon has its size", || {
        actual = balloon(guest)?.actual_mib;
        Ok(actual == mib)
    })
    .with_context(|| format!("it has {actual} MiB of {mib}"))
}

fn balloon(guest: &mut Guest) -> Result<BalloonStatus> {
    guest.vmm.status()?.balloon.context("no balloon")
}

fn what_a_balloon_holds_is_the_hosts(context: &Context, start: Start) -> Result<()> {
    const TAKEN: u32 = 180;
    let mut guest = Guest::up(context, start, "balloon-returns")?;
    let file = guest.file("disk", 112 << 20)?;
    let slot = guest.plug_disk("disk", &file)?;
    let node = guest.look_at(slot, "virtio_blk")?;
    let before = private(&guest)?;
    // A cache is nothing that the guest gives back by itself; it lasts as long
    // as the disk is open.
    guest.start(
        "reads",
        Some(&node),
        "exec 2>/errors 3</dev/disk; busybox dd bs=1M count=100 <&3 >/dev/null && busybox touch /read; \
         while ! busybox test -e /let-go; do busybox sleep 0.2; done; exit 7",
    )?;
    guest.wait_for("reads", "read")?;
    let full = private(&guest)?;
    ensure!(
        full >= before + 80,
        "{before} MiB, and {full} with 100 more in the cache"
    );
    inflate(&mut guest, TAKEN)?;
    let after = private(&guest)?;
    println!("    {before} MiB idle, {full} with a cache, {after} beside a balloon of {TAKEN}");
    ensure!(
        after <= GUEST_MIB - u64::from(TAKEN),
        "{after} MiB beside the balloon"
    );
    ensure!(
        after + 30 <= full,
        "{full} MiB, and {after} beside the balloon"
    );
    inflate(&mut guest, 0)?;
    fs::write(guest.host.dir.join("shared/reads/let-go"), "")?;
    same(guest.end("reads")?, 7)?;
    guest.take_out(slot)?;
    guest.stop()
}

fn a_balloon_yields_before_a_process_is_killed(context: &Context, start: Start) -> Result<()> {
    /// What the balloon leaves, and what is then taken.
    const LEFT: u64 = 32;
    const TAKEN: u64 = 64;
    let mut guest = Guest::up(context, start, "balloon-yields")?;
    let script = format!(
        "exec 2>/errors; busybox touch /ready; \
         while ! busybox test -e /go; do busybox sleep 0.2; done; \
         busybox dd if=/dev/zero of=/dev/null bs={TAKEN}M count=1; busybox echo $? >/taken; \
         while ! busybox test -e /let-go; do busybox sleep 0.2; done; exit 7"
    );
    guest.start("takes", None, &script)?;
    guest.wait_for("takes", "ready")?;
    let mut available = None;
    until(LIMIT, "the guest's statistics", || {
        let told = balloon(&mut guest)?.statistics;
        available = told.and_then(|told| told.available);
        Ok(available.is_some())
    })?;
    let available = available.context("none")? >> 20;
    let Some(target @ 1..) = available.checked_sub(LEFT) else {
        bail!("the guest has only {available} MiB");
    };
    let target = u32::try_from(target)?;
    inflate(&mut guest, target)?;
    let dir = guest.host.dir.join("shared/takes");
    fs::write(dir.join("go"), "")?;
    guest.wait_for("takes", "taken")?;
    until(LIMIT, "a status", || {
        Ok(guest.left("takes", "taken").ends_with('\n'))
    })?;
    let now = balloon(&mut guest)?;
    println!(
        "    {available} MiB available, balloon of {target}, then {}",
        now.actual_mib
    );
    same(guest.left("takes", "taken").as_str(), "0\n").with_context(|| guest.host.console())?;
    ensure!(now.actual_mib < target, "the balloon is as it was: {now:?}");
    same(now.target_mib, target)?;
    let request = ContainerRequest {
        container_id: "takes".into(),
        ..Default::default()
    };
    let stats = guest
        .runtime
        .block_on(guest.agent.stats_container(request))?;
    same(stats.memory_events.oom_kill, 0)?;
    let console = guest.host.console();
    ensure!(!console.contains("Out of memory"), "{console}");
    fs::write(dir.join("let-go"), "")?;
    same(guest.end("takes")?, 7)?;
    guest.stop()
}
