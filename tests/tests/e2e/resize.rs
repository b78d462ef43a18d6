// SPDX-License-Identifier: Apache-2.0
//! Guests that get more processors and memory while they run, and give them
//! back: of the VMM by itself, and of a pod whose limits are changed.

use std::fs;

use anyhow::{bail, Context as _, Result};
use bulkhead_agent_protocol::agent;
use bulkhead_runtime::agent::Agent;
use bulkhead_tests::start::Start;
use bulkhead_tests::vmm::{Size, Vmm};
use bulkhead_vmm_api::{Call, MemoryTarget};
use serde_json::json;

use crate::cli::with_config;
use crate::context::{mentions, same, until, Context, LIMIT};
use crate::memory::held_by_vmm;
use crate::pod::Pod;
use crate::runner::{tests, Test};
use crate::vmm::{runtime, Host};

pub const TESTS: &[Test] = tests![
    a_pods_limits_change_its_machine;
    twice a_guest_and_its_clone_grow_and_shrink,
];

const EXTRA_MIB: u32 = 512;

/// Asks for memory, and waits until the guest has done it.
pub fn ask(vmm: &mut Vmm, mib: u32, console: impl Fn() -> String) -> Result<()> {
    vmm.call(Call::Memory(MemoryTarget { mib }), &[])?;
    until(LIMIT, &format!("{mib} MiB"), || {
        let memory = vmm.status()?.memory.context("no such device")?;
        Ok(memory.plugged_mib == mib)
    })
    .with_context(console)?;
    // What was emptied goes.
    vmm.call(Call::Memory(MemoryTarget { mib }), &[])?;
    let memory = vmm.status()?.memory.context("no such device")?;
    same(memory.slots, mib.div_ceil(128))?;
    same(memory.mapped_mib, memory.slots * 128)
}

fn use_cpus(runtime: &tokio::runtime::Runtime, agent: &Agent, count: u32) -> Result<()> {
    let request = agent::OnlineCpusRequest {
        count,
        ..Default::default()
    };
    let reply = runtime.block_on(agent.online_cpus(request))?;
    same((reply.online, reply.present), (count, 3))
}

fn a_guest_and_its_clone_grow_and_shrink(context: &Context, start: Start) -> Result<()> {
    context.only_bulkhead()?;
    let host = Host::new(context, "growing")?;
    let mut vmm = Vmm::start(&context.products, LIMIT)?;
    let size = Size {
        extra_vcpus: 2,
        extra_mib: EXTRA_MIB,
        ..Size::default()
    };
    let up = context.bring_up(start, &mut vmm, &host.dir, size);
    up.with_context(|| host.console())?;
    let exits = vmm.status()?.vcpus;
    same(exits.len(), 3)?;
    let runtime = runtime()?;
    let (agent, _) = host.set_up_with(&runtime, "")?;
    for count in [1, 3, 2] {
        use_cpus(&runtime, &agent, count).with_context(|| host.console())?;
    }
    for wrong in [0, 4] {
        if use_cpus(&runtime, &agent, wrong).is_ok() {
            bail!("{wrong} processors of 3");
        }
    }
    for mib in [EXTRA_MIB, 256, 0, 130] {
        ask(&mut vmm, mib, || host.console())?;
    }
    let dir = host.dir.clone();
    vmm.snapshot(&dir.join("state"), &dir.join("memory"))?;
    drop((agent, vmm));

    let host = Host::new(context, "grown-clone")?;
    let mut vmm = Vmm::start(&context.products, LIMIT)?;
    vmm.clone_with(
        &dir.join("state"),
        &dir.join("memory"),
        &context.products,
        &host.dir,
        |devices, _| {
            size.apply(devices);
        },
    )?;
    vmm.wait_clone().with_context(|| host.console())?;
    let (agent, _) = host.set_up_with(&runtime, "")?;
    let memory = vmm.status()?.memory.context("no such device")?;
    same((memory.plugged_mib, memory.slots), (130, 2))?;
    use_cpus(&runtime, &agent, 3).with_context(|| host.console())?;
    for mib in [EXTRA_MIB, 0] {
        ask(&mut vmm, mib, || host.console())?;
    }
    fs::remove_file(dir.join("memory"))?;
    Ok(())
}

/// Processors, and MiB of memory, as the container sees them.
fn seen(pod: &Pod<'_>, container: &str) -> Result<(u32, u64)> {
    let text = pod.sh(
        container,
        "nproc; awk '/MemTotal/ {print $2}' /proc/meminfo",
    )?;
    let mut lines = text.lines();
    let cpus = lines.next().unwrap_or_default().parse()?;
    let kib: u64 = lines.next().unwrap_or_default().parse()?;
    Ok((cpus, kib / 1024))
}

fn a_pods_limits_change_its_machine(context: &Context) -> Result<()> {
    context.only_bulkhead()?;
    // Without reports of free pages, what comes back does so by being unplugged.
    let more = format!(
        "[hypervisor]\nextra_vcpus = 2\nextra_memory_mib = {EXTRA_MIB}\nfree_page_reporting = false\n"
    );
    let config = context.config.toml().replacen("[hypervisor]\n", &more, 1);
    with_config(context, &config, || resized(context))
}

fn resized(context: &Context) -> Result<()> {
    let pod = Pod::run(context, "resized", json!({}))?;
    let limits = json!({"linux": {"resources": {
        "memory_limit_in_bytes": 100 << 20, "cpu_quota": 100_000, "cpu_period": 100_000,
    }}});
    let container = pod.start("work", "sleep 100000", limits)?;
    let (cpus, mib) = seen(&pod, &container)?;
    same(cpus, 1)?;
    let update = |memory: u64, quota: u64| {
        let (memory, quota) = ((memory << 20).to_string(), quota.to_string());
        let args = [
            "update",
            "--memory",
            &memory,
            "--cpu-quota",
            &quota,
            "--cpu-period",
            "100000",
            &container,
        ];
        pod.cri.crictl(&args)?.ok().map(drop)
    };

    let before = held_by_vmm()?;
    update(600, 250_000)?;
    let (cpus, grown) = seen(&pod, &container)?;
    same(cpus, 3)?;
    // 600 MiB and what the guest keeps are 664, of which there were 256.
    same(grown - mib, 408)?;
    // More than all that it booted with, at once.
    let touched = "dd if=/dev/zero of=/dev/null bs=400M count=1 2>&1";
    mentions(&pod.sh(&container, touched)?, &["1+0 records out"])?;
    let full = held_by_vmm()?;
    if full < before + 300 {
        bail!("{before} MiB, and {full} after 400 were used");
    }

    update(100, 50_000)?;
    same(seen(&pod, &container)?, (1, mib))?;
    let after = held_by_vmm()?;
    if after + 250 > full {
        bail!("{full} MiB in use, and {after} after they were to be given back");
    }
    println!("    {before} MiB idle, {full} used, {after} given back");
    // It has its old limit, and its guest is as it was.
    let done = pod.exec(&container, &["sh", "-c", touched])?;
    if done.code == 0 {
        bail!("400 MiB in a container of 100");
    }
    pod.remove()
}
