// SPDX-License-Identifier: Apache-2.0
//! How much memory a guest has, and what it gives back.

use std::fs;

use anyhow::{bail, Context as _, Result};
use bulkhead_tests::guest::specification;
use bulkhead_tests::listing::by_program;
use bulkhead_tests::start::Start;
use serde_json::json;

use crate::context::{same, until, Context, LIMIT};
use crate::guest::{guest, process, ROOT};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![
    guest_of_128_mib,
    guest_of_2_gib,
    freed_memory_is_the_hosts_again;
    twice a_guest_gives_back_what_it_frees
];

/// A pod of `mib` sees nearly that much, and can use `use_mib` of it.
fn pod(context: &Context, mib: u64, use_mib: u64) -> Result<()> {
    context.only_bulkhead()?;
    let annotation = format!("io.bulkhead.hypervisor.memory_mib={mib}");
    let script = format!(
        "awk '/MemTotal/ {{print $2}}' /proc/meminfo; mount -t tmpfs -o size=100% x /mem 2>/dev/null; \
         dd if=/dev/zero of=/dev/shm/held bs=1M count={use_mib} 2>/dev/null; stat -c %s /dev/shm/held"
    );
    let shm = "type=tmpfs,src=shm,dst=/dev/shm,options=size=100%";
    let done = context.run(
        &["--annotation", &annotation, "--mount", shm],
        &["sh", "-c", &script],
    )?;
    let out = done.ok()?.out();
    let mut lines = out.lines();
    let total: u64 = lines.next().unwrap_or_default().parse::<u64>()? / 1024;
    // The kernel keeps something for itself.
    if total > mib || total < mib * 80 / 100 {
        bail!("{total} MiB in a guest of {mib}");
    }
    same(
        lines.next().unwrap_or_default(),
        (use_mib << 20).to_string(),
    )
}

fn guest_of_128_mib(context: &Context) -> Result<()> {
    pod(context, 128, 40)
}

fn guest_of_2_gib(context: &Context) -> Result<()> {
    pod(context, 2048, 400)
}

/// MiB of the only VMM's own.
pub fn held_by_vmm() -> Result<u64> {
    let vmms = by_program("bulkhead-vmm");
    let [vmm] = &vmms[..] else {
        bail!("{} VMMs", vmms.len());
    };
    held_by(vmm.pid)
}

/// MiB of a process's own.
fn held_by(pid: u32) -> Result<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let private = rollup.lines().filter(|l| l.starts_with("Private_"));
    let kib = private.map(|l| {
        let kib = l.split_whitespace().nth(1).context("no number")?;
        Ok(kib.parse::<u64>()?)
    });
    Ok(kib.sum::<Result<u64>>()? / 1024)
}

fn freed_memory_is_the_hosts_again(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    let shm = "type=tmpfs,src=shm,dst=/dev/shm,options=size=100%";
    let container = context.detached(&["--mount", shm], &["sleep", "600"])?;
    let before = held_by_vmm()?;
    let fill = "dd if=/dev/zero of=/dev/shm/held bs=1M count=100 2>/dev/null";
    container.exec(&["sh", "-c", fill])?.ok()?;
    let full = held_by_vmm()?;
    if full < before + 90 {
        bail!("{before} MiB, and {full} with 100 more in use");
    }
    container.exec(&["rm", "/dev/shm/held"])?.ok()?;
    // What is reported is in blocks of 2 MiB, so some of it may stay.
    until(LIMIT, "the memory is given back", || {
        Ok(held_by_vmm()? + 70 < full)
    })?;
    println!(
        "    {before} MiB idle, {full} in use, {} freed",
        held_by_vmm()?
    );
    container.remove()
}

/// The same of a guest without the runtime.
fn a_guest_gives_back_what_it_frees(context: &Context, start: Start) -> Result<()> {
    let guest = guest(context, start, "frees", 256)?;
    let config = json!({
        "ociVersion": "1.1.0",
        "process": {"args": ["sleep", "9999"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs"},
        "mounts": [{"type": "tmpfs", "source": "tmpfs", "destination": "/run", "options": ["size=100%"]}],
        "linux": {"namespaces": [{"type": "mount"}]},
    });
    guest.create("frees", specification(&config, "frees", ROOT)?)?;
    guest.start("frees")?;
    let held = || held_by(guest.vmm_pid());
    let before = held()?;
    // What was given back can be taken again.
    for round in ["first", "second"] {
        let fill = ["dd", "if=/dev/zero", "of=/run/held", "bs=1M", "count=100"];
        let fill = guest.exec("frees", &format!("{round}-fill"), process(&fill)?)?;
        fill.1.ok()?;
        let full = held()?;
        if full < before + 90 {
            bail!("{before} MiB, and {full} with 100 more in use, the {round} time");
        }
        let free = process(&["busybox", "rm", "/run/held"])?;
        let free = guest.exec("frees", &format!("{round}-free"), free)?;
        free.1.ok()?;
        until(
            LIMIT,
            "the memory is given back",
            || Ok(held()? + 70 < full),
        )?;
        println!("    {before} MiB idle, {full} in use, {} freed", held()?);
    }
    Ok(())
}
