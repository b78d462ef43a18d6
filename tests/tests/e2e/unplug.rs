// SPDX-License-Identifier: Apache-2.0
//! Devices that are to go while they are used: what is mounted stays, and what
//! is only worked with goes without taking the guest along.

use std::fs::{self, File};
use std::io::Read;
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::thread;

use anyhow::{Context as _, Result};
use bulkhead_agent_protocol::agent::DeviceNode;
use bulkhead_tests::install::which;
use bulkhead_tests::proc;
use bulkhead_tests::start::Start;
use bulkhead_tests::sys::open_tap;
use bulkhead_vmm_api::{FsCache, FsConfig, NetConfig, PlugConfig, PmemConfig};

use crate::context::{same, until, Context, LIMIT};
use crate::hotplug::refused;
use crate::plugged::{address, Guest};
use crate::runner::{tests, Test};

pub const TESTS: &[Test] = tests![
    twice mounted_directories_and_memory_refuse_to_go,
    persistent_memory_goes_while_it_is_written,
    an_interface_goes_while_bytes_pass
];

fn plug_memory(guest: &mut Guest, file: &File) -> Result<(u8, DeviceNode)> {
    let config = PmemConfig {
        id: "memory".into(),
        file: 0,
        read_only: false,
    };
    let passed = file.try_clone()?.into();
    let slot = guest.vmm.plug(PlugConfig::Pmem(config), passed)?;
    Ok((slot, guest.look_at(slot, "virtio_pmem")?))
}

fn mounted_directories_and_memory_refuse_to_go(context: &Context, start: Start) -> Result<()> {
    let mut guest = Guest::up(context, start, "unplug-mounted")?;
    let shared = guest.host.dir.join("more");
    fs::create_dir_all(&shared)?;
    let config = FsConfig {
        tag: "more".into(),
        directory: 0,
        cache: FsCache::Auto,
        dax_mib: 0,
        host_locks: false,
    };
    let passed = File::open(&shared)?.into();
    let slot = guest.vmm.plug(PlugConfig::Fs(config), passed)?;
    guest.look_at(slot, "virtiofs")?;
    stays_while_mounted(&mut guest, slot, None, "-t virtiofs more", "\"more\"")?;
    same(fs::read(shared.join("late"))?, b"x\n")?;

    let file = guest.file("memory", 16 << 20)?;
    let made = Command::new(which("busybox").context("busybox is missing")?)
        .args(["mke2fs", "-F"])
        .arg(guest.host.dir.join("memory"))
        .stdout(Stdio::null())
        .status()?;
    same(made.success(), true)?;
    let (slot, node) = plug_memory(&mut guest, &file)?;
    let what = format!("/dev/{}", node.name);
    stays_while_mounted(&mut guest, slot, Some(&node), "-t ext2 /dev/disk", &what)?;
    guest.stop()
}

/// Mounts it as `how` says; both the guest and the VMM refuse to let go of it,
/// the guest with `what`, it can be written to all the same, and once it is
/// mounted no longer it goes.
fn stays_while_mounted(
    guest: &mut Guest,
    slot: u8,
    node: Option<&DeviceNode>,
    how: &str,
    what: &str,
) -> Result<()> {
    let id = format!("mounts{slot}{}", node.is_some());
    let script = format!(
        "set -e; exec 2>/errors; busybox mount {how} /mnt; busybox touch /mounted; \
         while ! busybox test -e /let-go; do busybox sleep 0.2; done; \
         busybox echo x >/mnt/late; busybox cat /mnt/late; busybox umount /mnt"
    );
    guest.start(&id, node, &script)?;
    guest.wait_for(&id, "mounted")?;
    for words in [&address(slot), "in use", what, "mounted"] {
        refused(guest.let_go(slot), &[words])?;
    }
    refused(guest.vmm.unplug(slot), &["the guest uses it"])?;
    let there = guest.look(&[slot])?;
    same(there.len(), 1)?;
    fs::write(guest.host.dir.join("shared").join(&id).join("let-go"), "")?;
    same(guest.end(&id)?, 0).with_context(|| guest.left(&id, "errors"))?;
    guest.take_out(slot)
}

fn persistent_memory_goes_while_it_is_written(context: &Context, start: Start) -> Result<()> {
    let mut guest = Guest::up(context, start, "unplug-memory")?;
    let file = guest.file("memory", 16 << 20)?;
    let (slot, node) = plug_memory(&mut guest, &file)?;
    guest.start(
        "writes",
        Some(&node),
        "exec 2>/errors; while busybox dd if=/dev/zero of=/dev/disk bs=256k count=32 conv=fsync; \
         do busybox touch /begun; done; exit 7",
    )?;
    guest.wait_for("writes", "begun")?;
    guest.take_out(slot).with_context(|| guest.host.console())?;
    same(guest.end("writes")?, 7)?;
    guest.run("after", None, "busybox true")?;
    guest.stop()
}

fn an_interface_goes_while_bytes_pass(context: &Context, start: Start) -> Result<()> {
    const TAP: &str = "bhunplug";
    let mut guest = Guest::up(context, start, "unplug-net")?;
    // It goes with the VMM's descriptor.
    let tap = open_tap(TAP)?;
    proc::set_up_interface(TAP, "10.199.11.1/24", LIMIT)?;
    let listener = TcpListener::bind("10.199.11.1:0")?;
    let port = listener.local_addr()?.port();
    let received = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&received);
    thread::spawn(move || {
        let Ok((mut stream, _)) = listener.accept() else {
            return;
        };
        let mut bytes = vec![0; 64 << 10];
        while let Ok(count @ 1..) = stream.read(&mut bytes) {
            counted.fetch_add(count as u64, Ordering::Relaxed);
        }
    });
    let config = NetConfig {
        id: "eth8".into(),
        tap: 0,
        mac: [2, 0, 0, 0, 0, 8],
        ..NetConfig::default()
    };
    let slot = guest.vmm.plug(PlugConfig::Net(config), tap)?;
    let interface = guest.look_at(slot, "virtio_net")?.name;
    let script = format!(
        "exec 2>/errors; busybox ip link set {interface} up; \
         busybox ip addr add 10.199.11.2/24 dev {interface}; \
         busybox nc 10.199.11.1 {port} </dev/zero & \
         while ! busybox test -e /let-go; do busybox sleep 0.2; done; kill $!; exit 7"
    );
    guest.start("sends", None, &script)?;
    let more_than = |bytes: u64| {
        until(LIMIT, "bytes of the guest", || {
            Ok(received.load(Ordering::Relaxed) > bytes)
        })
        .with_context(|| guest.left("sends", "errors"))
    };
    more_than(1 << 20)?;
    // They still come.
    more_than(received.load(Ordering::Relaxed))?;
    guest.take_out(slot).with_context(|| guest.host.console())?;
    guest.run(
        "after",
        None,
        &format!("! busybox test -e /sys/class/net/{interface}"),
    )?;
    fs::write(guest.host.dir.join("shared/sends/let-go"), "")?;
    same(guest.end("sends")?, 7)?;
    guest.stop()
}
