// SPDX-License-Identifier: Apache-2.0
//! Devices that come and go while a guest runs: the VMM plugs them, the agent
//! looks for them and lets go of them, and the guest's kernel works with them.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};

use anyhow::{bail, Context as _, Result};
use bulkhead_agent_protocol::agent;
use bulkhead_tests::install::which;
use bulkhead_tests::start::Start;
use bulkhead_tests::vmm::Vmm;
use bulkhead_vmm_api::{
    BlkConfig, BlkEngine, FsCache, FsConfig, NetConfig, PlugConfig, PmemConfig, Rate, RateLimits,
};

use crate::context::{mentions, same, Context, LIMIT};
use crate::plugged::{address, Guest};
use crate::runner::{tests, Test};
use crate::vmm::{runtime, Host};

pub const TESTS: &[Test] = tests![
    twice disks_come_and_go_while_a_guest_runs,
    disks_by_io_uring_come_and_go_while_a_guest_runs,
    a_disk_does_what_it_offers,
    a_disk_by_io_uring_does_what_it_offers,
    all_kinds_of_devices_come_and_go,
    the_bus_is_filled_and_emptied,
    a_clone_has_what_was_plugged
];

/// Content that tells its place: a sector's number, and then the words' in it.
/// Few steps a sector, for nobody optimises this.
pub fn pattern(size: usize) -> Vec<u8> {
    const SECTOR: usize = 512;
    let words: Vec<u8> = (0..SECTOR as u32 / 4).flat_map(u32::to_le_bytes).collect();
    let mut bytes = Vec::with_capacity(size);
    for sector in 0..size / SECTOR {
        bytes.extend_from_slice(&sector.to_le_bytes());
        bytes.extend_from_slice(&words[size_of::<usize>()..]);
    }
    bytes
}

/// It was not done, and one of `words` says why.
pub fn refused(result: Result<()>, words: &[&str]) -> Result<()> {
    match result {
        Err(error) => mentions(&format!("{error:#}"), words),
        Ok(()) => bail!("not refused: {words:?}"),
    }
}

fn disks_come_and_go_while_a_guest_runs(context: &Context, start: Start) -> Result<()> {
    disks_come_and_go(context, start, "hotplug-disks", BlkEngine::Sync)
}

fn disks_by_io_uring_come_and_go_while_a_guest_runs(context: &Context, start: Start) -> Result<()> {
    disks_come_and_go(context, start, "hotplug-rings", BlkEngine::IoUring)
}

fn disks_come_and_go(context: &Context, start: Start, name: &str, engine: BlkEngine) -> Result<()> {
    let mut guest = Guest::up(context, start, name)?;
    let file = guest.file("disk", 4 << 20)?;
    file.write_all_at(&pattern(4 << 20), 0)?;
    let slot = guest.plug_disk_by(engine, "volume", &file)?;
    let node = guest.look_at(slot, "virtio_blk")?;
    fs::create_dir_all(guest.host.dir.join("shared/io"))?;
    guest.run(
        "io",
        Some(&node),
        "busybox dd if=/dev/disk of=/copy bs=64k; \
         busybox printf written | busybox dd of=/dev/disk bs=512 seek=3 conv=sync,fsync",
    )?;
    let copy = fs::read(guest.host.dir.join("shared/io/copy"))?;
    if copy != pattern(4 << 20) {
        bail!("the guest read something else");
    }
    let mut written = [0; 7];
    file.read_exact_at(&mut written, 3 * 512)?;
    same(&written, b"written")?;

    let metrics = guest.vmm.status()?.devices;
    let disk = metrics.iter().find(|device| device.slot == slot);
    let metrics = disk.context("no figures")?.metrics;
    if metrics.bytes_to_guest < 4 << 20 || metrics.bytes_from_guest < 512 || metrics.requests < 2 {
        bail!("{metrics:?}");
    }

    // The guest first.
    refused(guest.vmm.unplug(slot), &["volume", "the guest uses it"])?;
    guest.look_at(slot, "virtio_blk")?;
    guest.take_out(slot)?;
    refused(guest.let_go(slot), &[&address(slot), "not found"])?;

    // A file system on it is in use as long as it is mounted.
    let file = guest.file("mounted", 16 << 20)?;
    let made = Command::new(which("busybox").context("busybox is missing")?)
        .args(["mke2fs", "-F"])
        .arg(guest.host.dir.join("mounted"))
        .stdout(Stdio::null())
        .status()?;
    same(made.success(), true)?;
    let again = guest.plug_disk_by(engine, "volume", &file)?;
    same(again, slot)?;
    let node = guest.look_at(slot, "virtio_blk")?;
    guest.start(
        "mounts",
        Some(&node),
        "set -e; exec 2>/errors; busybox mount -t ext2 /dev/disk /mnt; busybox touch /mounted; \
         while ! busybox test -e /let-go; do busybox dd if=/dev/zero of=/mnt/file bs=64k count=16; done; \
         busybox umount /mnt",
    )?;
    guest.wait_for("mounts", "mounted")?;
    refused(guest.let_go(slot), &[&address(slot), "in use"])?;
    refused(guest.vmm.unplug(slot), &["the guest uses it"])?;
    fs::write(guest.host.dir.join("shared/mounts/let-go"), "")?;
    same(guest.end("mounts")?, 0).with_context(|| guest.left("mounts", "errors"))?;
    guest.take_out(slot)?;

    // One that is worked with, by whom it is not promised to.
    let file = guest.file("busy", 16 << 20)?;
    let slot = guest.plug_disk_by(engine, "busy", &file)?;
    let node = guest.look_at(slot, "virtio_blk")?;
    guest.start(
        "works",
        Some(&node),
        "exec 2>/errors; busybox touch /begun; \
         while busybox dd if=/dev/zero of=/dev/disk bs=256k count=64 conv=fsync; do :; done; exit 7",
    )?;
    guest.wait_for("works", "begun")?;
    guest.take_out(slot)?;
    same(guest.end("works")?, 7)?;
    guest.stop()
}

/// Discards, zeroes, several queues, its name and its limits, as a real kernel
/// uses them.
fn a_disk_does_what_it_offers(context: &Context, start: Start) -> Result<()> {
    does_what_it_offers(context, start, "disk-features", BlkEngine::Sync)
}

fn a_disk_by_io_uring_does_what_it_offers(context: &Context, start: Start) -> Result<()> {
    does_what_it_offers(context, start, "ring-features", BlkEngine::IoUring)
}

fn does_what_it_offers(
    context: &Context,
    start: Start,
    name: &str,
    engine: BlkEngine,
) -> Result<()> {
    const SIZE: u64 = 64 << 20;
    let mut guest = Guest::up(context, start, name)?;
    let file = guest.file("disk", SIZE)?;
    file.write_all_at(&pattern(32 << 20), 0)?;
    file.sync_all()?;
    let before = file.metadata()?.blocks();
    let limits = RateLimits {
        operations: Some(Rate {
            per_second: 2,
            burst: 1,
        }),
        ..RateLimits::default()
    };
    let config = BlkConfig {
        id: "bulkhead-disk-0123".into(),
        queues: Some(4),
        rate: Some(limits),
        engine: Some(engine),
        ..BlkConfig::default()
    };
    let fd: OwnedFd = file.try_clone()?.into();
    let slot = guest.vmm.plug(PlugConfig::Blk(config), fd)?;
    let node = guest.look_at(slot, "virtio_blk")?;
    let script = format!(
        "cd /sys/block/{0}; busybox cat serial > /serial; busybox ls mq | busybox wc -l > /queues; \
         busybox cat queue/discard_max_bytes queue/write_zeroes_max_bytes > /limits; \
         busybox blkdiscard -o 0 -l {1} /dev/disk; \
         busybox dd if=/dev/disk of=/first bs=4096 count=1; \
         busybox dd if=/dev/disk of=/kept bs=4096 count=1 skip={2}; \
         busybox dd if=/dev/disk of=/dev/null bs=8M count=1 iflag=direct",
        node.name,
        16 << 20,
        (16 << 20) / 4096,
    );
    let throttled = |guest: &mut Guest| -> Result<u64> {
        let devices = guest.vmm.status()?.devices;
        let device = devices.iter().find(|device| device.slot == slot);
        Ok(device.context("it is gone")?.metrics.throttled)
    };
    guest.run("features", Some(&node), &script)?;
    same(
        guest.left("features", "serial").trim_end(),
        "bulkhead-disk-0123",
    )?;
    // One for each processor at most: the guest has one.
    same(guest.left("features", "queues").trim(), "1")?;
    let text = guest.left("features", "limits");
    let mut limits = text.lines().map(str::parse::<u64>);
    let (discard, zeroes) = (limits.next(), limits.next());
    if !matches!((discard, zeroes), (Some(Ok(1..)), Some(Ok(1..)))) {
        bail!("limits of discards and zeroes: {text:?}");
    }
    let dir = guest.host.dir.join("shared/features");
    same(fs::read(dir.join("first"))? == vec![0; 4096], true)?;
    let all = pattern(32 << 20);
    same(fs::read(dir.join("kept"))? == all[16 << 20..][..4096], true)?;
    // What was discarded takes no space on the host.
    let mut head = vec![1; 16 << 20];
    file.read_exact_at(&mut head, 0)?;
    same(head == vec![0; 16 << 20], true)?;
    let after = file.metadata()?.blocks();
    if after + (15 << 20) / 512 > before {
        bail!("{before} blocks, and {after} after 16 MiB were discarded");
    }
    // More than a request can be, so that several come at once.
    if throttled(&mut guest)? == 0 {
        bail!("the limit was never reached");
    }
    guest.take_out(slot)?;
    guest.stop()
}

fn all_kinds_of_devices_come_and_go(context: &Context, start: Start) -> Result<()> {
    let mut guest = Guest::up(context, start, "hotplug-kinds")?;
    let file = guest.file("pmem", 16 << 20)?;
    file.write_all_at(&pattern(4096), 0)?;
    let shared = guest.host.dir.join("more");
    fs::create_dir_all(&shared)?;
    fs::write(shared.join("greeting"), "hello\n")?;
    let (ours, theirs) = UnixDatagram::pair()?;
    theirs.set_nonblocking(true)?;
    ours.set_read_timeout(Some(LIMIT))?;
    for round in 0..2 {
        let pmem = PmemConfig {
            id: "memory".into(),
            file: 0,
            read_only: false,
        };
        let pmem = guest
            .vmm
            .plug(PlugConfig::Pmem(pmem), file.try_clone()?.into())?;
        let fs_config = FsConfig {
            tag: "more".into(),
            directory: 0,
            cache: FsCache::Never,
            dax_mib: 0,
            host_locks: false,
        };
        let fs_slot = guest
            .vmm
            .plug(PlugConfig::Fs(fs_config), File::open(&shared)?.into())?;
        let net = NetConfig {
            id: "eth7".into(),
            tap: 0,
            mac: [2, 0, 0, 0, 0, 7],
            mtu: Some(1400),
            ..NetConfig::default()
        };
        let net = guest
            .vmm
            .plug(PlugConfig::Net(net), theirs.try_clone()?.into())?;

        let node = guest.look_at(pmem, "virtio_pmem")?;
        guest.look_at(fs_slot, "virtiofs")?;
        let interface = guest.look_at(net, "virtio_net")?;
        same(interface.class.as_str(), "net")?;
        let id = format!("kinds{round}");
        let script = format!(
            "busybox dd if=/dev/disk of=/copy bs=4096 count=1; \
             busybox printf round{round} | busybox dd of=/dev/disk bs=4096 seek=1 conv=sync,fsync; \
             busybox mount -t virtiofs more /mnt; busybox cp /mnt/greeting /greeting; \
             busybox printf {round} > /mnt/answer; busybox umount /mnt; \
             busybox cat /sys/class/net/{0}/mtu > /mtu; busybox ip link set {0} up; \
             busybox ip addr add 10.9.9.1/24 dev {0}; busybox wget -T 1 http://10.9.9.2/ || :",
            interface.name
        );
        guest
            .run(&id, Some(&node), &script)
            .with_context(|| guest.host.console())?;
        let copy = fs::read(guest.host.dir.join("shared").join(&id).join("copy"))?;
        same(copy == pattern(4096), true)?;
        let mut written = [0; 6];
        file.read_exact_at(&mut written, 4096)?;
        same(written.as_slice(), format!("round{round}").as_bytes())?;
        same(guest.left(&id, "greeting").as_str(), "hello\n")?;
        same(
            fs::read_to_string(shared.join("answer"))?,
            round.to_string(),
        )?;
        same(guest.left(&id, "mtu").as_str(), "1400\n")?;
        // An interface that is up says so to its neighbours.
        let mut packet = [0; 2048];
        let length = ours
            .recv(&mut packet)
            .context("nothing from the interface")?;
        // After the header of virtio: to, from.
        same(&packet[..length][12 + 6..12 + 12], &[2, 0, 0, 0, 0, 7][..])?;

        for slot in [net, fs_slot, pmem] {
            guest.take_out(slot).with_context(|| guest.host.console())?;
        }
    }
    guest.stop()
}

fn the_bus_is_filled_and_emptied(context: &Context, start: Start) -> Result<()> {
    let mut guest = Guest::up(context, start, "hotplug-many")?;
    let there = guest.vmm.status()?.devices.len();
    let file = guest.file("disk", 1 << 20)?;
    for _ in 0..2 {
        let mut slots = Vec::new();
        while there + slots.len() < 31 {
            slots.push(guest.plug_disk(&format!("disk{}", slots.len()), &file)?);
        }
        refused(
            guest.plug_disk("one more", &file).map(drop),
            &["PCI bus is full", "31"],
        )?;
        // Twice at once; the kernel does one after the other.
        let (first, second) = guest.runtime.block_on(async {
            tokio::join!(
                guest.agent.rescan_devices(agent::Empty::new()),
                guest.agent.rescan_devices(agent::Empty::new())
            )
        });
        same(first?.devices.len(), 32)?;
        same(second?.devices.len(), 32)?;
        let seen = guest.look(&slots)?;
        same(seen.len(), slots.len())?;
        let mut names = std::collections::BTreeSet::new();
        for device in &seen {
            same(device.driver.as_str(), "virtio_blk")
                .with_context(|| format!("slot {}: {}", device.slot, guest.host.console()))?;
            names.insert(device.node.name.clone());
        }
        same(names.len(), slots.len())?;
        for slot in &slots {
            guest.let_go(*slot)?;
            guest.vmm.unplug(*slot)?;
        }
        same(guest.look(&slots)?.len(), 0)?;
    }
    same(guest.vmm.status()?.devices.len(), there)?;
    guest.stop()
}

fn a_clone_has_what_was_plugged(context: &Context, start: Start) -> Result<()> {
    let mut guest = Guest::up_with(context, start, "hotplug-template", "")?;
    let file = guest.file("disk", 4 << 20)?;
    // A gap before the one that stays.
    let gap = guest.plug_disk("gap", &file)?;
    let slot = guest.plug_disk("volume", &file)?;
    guest.look_at(slot, "virtio_blk")?;
    let ring = guest.plug_disk_by(BlkEngine::IoUring, "ring", &file)?;
    guest.look_at(ring, "virtio_blk")?;
    guest.take_out(gap)?;
    let dir = guest.host.dir.clone();
    guest
        .vmm
        .snapshot(&dir.join("state"), &dir.join("memory"))?;
    drop(guest);

    let host = Host::new(context, "hotplug-clone")?;
    let own = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(host.dir.join("disk"))?;
    own.set_len(8 << 20)?;
    own.write_all_at(&pattern(4096), 0)?;
    let mut vmm = Vmm::start(&context.products, LIMIT)?;
    let passed: [OwnedFd; 2] = [own.try_clone()?.into(), own.try_clone()?.into()];
    vmm.clone_with(
        &dir.join("state"),
        &dir.join("memory"),
        &context.products,
        &host.dir,
        |devices, fds| {
            let engines = [BlkEngine::Sync, BlkEngine::IoUring];
            for (passed, engine) in passed.into_iter().zip(engines) {
                fds.push(passed);
                devices.blk.push(BlkConfig {
                    id: format!("own-{engine:?}"),
                    file: fds.len() as u32 - 1,
                    engine: Some(engine),
                    ..BlkConfig::default()
                });
            }
        },
    )?;
    vmm.wait_clone().with_context(|| host.console())?;
    let runtime = runtime()?;
    let (agent, _) = host.set_up(&runtime)?;
    let mut clone = Guest {
        host,
        vmm,
        runtime,
        agent,
    };
    for (id, slot) in [("sync", slot), ("ring", ring)] {
        let node = clone.look_at(slot, "virtio_blk")?;
        let script = format!(
            "busybox dd if=/dev/disk of=/copy bs=4096 count=1; \
             busybox printf {id} | busybox dd of=/dev/disk bs=4096 seek=1 conv=sync,fsync; \
             busybox cat /sys/class/block/{}/size > /size",
            node.name
        );
        clone.run(id, Some(&node), &script)?;
        let copy = fs::read(clone.host.dir.join("shared").join(id).join("copy"))?;
        same(copy == pattern(4096), true)?;
        let mut written = [0; 4];
        own.read_exact_at(&mut written, 4096)?;
        same(written, id.as_bytes())?;
        // The clone's disk is larger, and its guest knows.
        same(clone.left(id, "size").as_str(), "16384\n")?;
        clone.take_out(slot)?;
    }
    same(clone.plug_disk("new", &own)?, gap)?;
    clone.look_at(gap, "virtio_blk")?;
    clone.take_out(gap)?;
    clone.stop()
}
