// SPDX-License-Identifier: Apache-2.0
//! Disks with several queues, and disks that are block devices of the host.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use anyhow::{bail, ensure, Context as _, Result};
use bulkhead_agent_protocol::agent::OnlineCpusRequest;
use bulkhead_agent_protocol::SHARED_TAG;
use bulkhead_tests::proc;
use bulkhead_tests::start::Start;
use bulkhead_tests::vmm::Size;
use bulkhead_vmm_api::{BlkConfig, BlkEngine, PlugConfig};

use crate::context::{same, Context, LIMIT};
use crate::hotplug::pattern;
use crate::plugged::Guest;
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![
    twice two_processors_use_two_queues_of_a_disk,
    a_block_device_of_the_host_is_a_disk
];

/// How many interrupts of a disk's queue a guest's /proc/interrupts tells of.
fn interrupts(text: &str, name: &str) -> Result<u64> {
    let line = text.lines().find(|line| line.ends_with(name));
    let line = line.with_context(|| format!("no {name}: {text}"))?;
    let counts = line.split_whitespace().skip(1);
    Ok(counts.map_while(|word| word.parse::<u64>().ok()).sum())
}

fn two_processors_use_two_queues_of_a_disk(context: &Context, start: Start) -> Result<()> {
    const READS: u64 = 32;
    let size = Size {
        extra_vcpus: 1,
        ..Size::default()
    };
    let mut guest = Guest::up_sized(context, start, "blk-queues", SHARED_TAG, size)?;
    let both = OnlineCpusRequest {
        count: 2,
        ..Default::default()
    };
    let online = guest.runtime.block_on(guest.agent.online_cpus(both))?;
    same(online.online, 2)?;
    for engine in [BlkEngine::Sync, BlkEngine::IoUring] {
        let id = format!("queues-{engine:?}");
        let file = guest.file(&id, 4 << 20)?;
        let config = BlkConfig {
            id: id.clone(),
            queues: Some(4),
            engine: Some(engine),
            ..BlkConfig::default()
        };
        let slot = guest.vmm.plug(PlugConfig::Blk(config), file.into())?;
        let node = guest.look_at(slot, "virtio_blk")?;
        // Each processor in turn, past the cache.
        let script = format!(
            "cd /sys/block/{}; busybox ls mq | busybox wc -l >/queues; \
             busybox cat mq/0/cpu_list mq/1/cpu_list >/cpus; \
             busybox basename $(busybox readlink device) >/name; \
             busybox cat /proc/interrupts >/told0; \
             for cpu in 1 2; do \
                 busybox taskset $cpu busybox dd if=/dev/disk of=/dev/null bs=4k count={READS} iflag=direct; \
                 busybox cat /proc/interrupts >/told$cpu; \
             done",
            node.name
        );
        guest.run(&id, Some(&node), &script)?;
        same(guest.left(&id, "queues").trim(), "2")?;
        let cpus = guest.left(&id, "cpus");
        let of = |cpu: &str| {
            let queue = cpus.lines().position(|list| list == cpu);
            queue.with_context(|| format!("no queue of processor {cpu} alone: {cpus:?}"))
        };
        let name = guest.left(&id, "name");
        let told = ["told0", "told1", "told2"].map(|name| guest.left(&id, name));
        for (turn, cpu) in ["0", "1"].into_iter().enumerate() {
            let mut more = [0; 2];
            for (queue, more) in more.iter_mut().enumerate() {
                let line = format!("{}-req.{queue}", name.trim());
                *more = interrupts(&told[turn + 1], &line)? - interrupts(&told[turn], &line)?;
            }
            let own = of(cpu)?;
            println!("    {engine:?}: processor {cpu} has queue {own}, interrupts: {more:?}");
            // A request at a time, of which two may be told together.
            ensure!(
                more[own] >= READS / 2 && more[1 - own] < READS / 2,
                "processor {cpu} has queue {own}: {more:?}"
            );
        }
        guest.take_out(slot)?;
    }
    guest.stop()
}

/// A file as a block device; gone when dropped.
struct Loop(String);

impl Loop {
    fn attach(file: &Path) -> Result<Self> {
        let free = proc::run(Command::new("busybox").args(["losetup", "-f"]), LIMIT)?;
        let device = free.ok().context("no loop device")?.out();
        let mut command = Command::new("busybox");
        command.args(["losetup", &device]).arg(file);
        proc::run(&mut command, LIMIT)?.ok().context("losetup")?;
        Ok(Self(device))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // The box is about to end where this fails.
        let _ = Command::new("busybox")
            .args(["losetup", "-d", &self.0])
            .status();
    }
}

fn a_block_device_of_the_host_is_a_disk(context: &Context, start: Start) -> Result<()> {
    const SIZE: usize = 16 << 20;
    const HALF: usize = SIZE / 2;
    let mut guest = Guest::up(context, start, "blk-device")?;
    for engine in [BlkEngine::Sync, BlkEngine::IoUring] {
        let id = format!("device-{engine:?}");
        let file = guest.file(&id, SIZE as u64)?;
        file.write_all_at(&pattern(SIZE), 0)?;
        file.sync_all()?;
        let before = file.metadata()?.blocks();
        let device = Loop::attach(&guest.host.dir.join(&id))?;
        let disk = File::options().read(true).write(true).open(&device.0)?;
        let slot = guest.plug_disk_by(engine, &id, &disk)?;
        let node = guest.look_at(slot, "virtio_blk")?;
        let script = format!(
            "busybox cat /sys/class/block/{}/size >/size; busybox dd if=/dev/disk of=/copy bs=64k; \
             busybox printf written | busybox dd of=/dev/disk bs=512 seek=3 conv=sync,fsync; \
             busybox blkdiscard -o {HALF} -l {HALF} /dev/disk",
            node.name
        );
        guest.run(&id, Some(&node), &script)?;
        same(guest.left(&id, "size").trim(), (SIZE / 512).to_string())?;
        let copy = fs::read(guest.host.dir.join("shared").join(&id).join("copy"))?;
        if copy != pattern(SIZE) {
            bail!("{engine:?}: the guest read something else");
        }
        // What it has flushed is in the device, and in what that is made of.
        for what in [&disk, &file] {
            let mut written = [0; 7];
            what.read_exact_at(&mut written, 3 * 512)?;
            same(&written, b"written")?;
            let mut discarded = vec![1; HALF];
            what.read_exact_at(&mut discarded, HALF as u64)?;
            same(discarded == vec![0; HALF], true)?;
        }
        let after = file.metadata()?.blocks();
        ensure!(
            after + (HALF as u64 - (1 << 20)) / 512 <= before,
            "{engine:?}: {before} blocks, and {after} after half was discarded"
        );
        guest.take_out(slot)?;
        drop((disk, device));
    }
    guest.stop()
}
