// SPDX-License-Identifier: Apache-2.0
//! Devices that every guest has, or that the runtime gives it, without the
//! runtime: random numbers, the console, an interface, and the window that a
//! shared directory's files are seen through.

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use anyhow::{bail, ensure, Context as _, Result};
use bulkhead_agent_protocol::agent::{self, SetupSandboxRequest};
use bulkhead_agent_protocol::{oci, SHARED_TAG};
use bulkhead_tests::guest::{specification, Guest};
use bulkhead_tests::proc;
use bulkhead_tests::start::Start;
use bulkhead_tests::sys::open_tap;
use bulkhead_tests::vmm::Size;
use bulkhead_vmm_api::{DeviceKind, NetConfig, PlugConfig};
use serde_json::json;

use crate::context::{same, until, Context, LIMIT};
use crate::disks::metrics;
use crate::guest::{fill, guest, ROOT};
use crate::hotplug::pattern;
use crate::runner::{tests, Test};
use crate::vsock::{add_perl, both_ways, guest_with_perl};

pub const TESTS: &[Test] = tests![
    twice random_numbers_come_and_the_console_is_written_to,
    an_interface_carries_bytes_both_ways_at_once,
    a_saved_interface_carries_bytes_both_ways_at_once,
    a_window_shows_the_hosts_files
];

/// A script that has the devices of the first test.
fn script(id: &str, script: &str) -> Result<oci::Spec> {
    let device = |path: &str, major: u32, minor: u32| json!({"path": path, "type": "c", "major": major, "minor": minor, "fileMode": 0o666});
    let mount =
        |kind: &str, place: &str| json!({"type": kind, "source": kind, "destination": place});
    let config = json!({
        "ociVersion": "1.1.0",
        "process": {"args": ["sh", "-c", script], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs"},
        "mounts": [mount("proc", "/proc"), mount("tmpfs", "/dev")],
        "linux": {
            "namespaces": [{"type": "mount"}],
            "devices": [device("/dev/hwrng", 10, 183), device("/dev/ttyS0", 4, 64)],
            "resources": {"devices": [{"allow": true, "access": "rwm"}]},
        },
    });
    specification(&config, id, ROOT)
}

fn run(guest: &Guest, id: &str, text: &str) -> Result<Vec<u8>> {
    let done = guest.run(id, script(id, text)?)?.1.ok()?;
    guest.delete(id)?;
    Ok(done)
}

fn random_numbers_come_and_the_console_is_written_to(
    context: &Context,
    start: Start,
) -> Result<()> {
    const BYTES: usize = 4096;
    let mut guest = guest(context, start, "random", 256)?;
    let devices = guest.vmm().status()?.devices;
    let rng = devices.iter().find(|device| device.kind == DeviceKind::Rng);
    let slot = rng.context("no such device")?.slot;
    let before = metrics(&mut guest, slot)?;
    let read = format!("dd if=/dev/hwrng bs=64 count={} 2>/dev/null", BYTES / 64);
    let (first, second) = (run(&guest, "first", &read)?, run(&guest, "second", &read)?);
    same((first.len(), second.len()), (BYTES, BYTES))?;
    for numbers in [&first, &second] {
        let different: std::collections::BTreeSet<u8> = numbers.iter().copied().collect();
        // All, but for one time in thousands.
        ensure!(different.len() > 200, "{} kinds of bytes", different.len());
    }
    ensure!(first != second, "the same numbers again");
    let after = metrics(&mut guest, slot)?;
    ensure!(
        after.notifications > before.notifications,
        "the device was not asked: {after:?}"
    );

    run(&guest, "speaks", "echo a word to the host >/dev/ttyS0")?;
    until(LIMIT, "the word", || {
        Ok(guest.console().contains("a word to the host"))
    })
}

const TAP: &str = "bh-e2e-tap";
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
/// The host's end, and the guest's.
const HOST: Ipv4Addr = Ipv4Addr::new(10, 199, 10, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 199, 10, 2);
const PREFIX: u32 = 24;
/// How perl reaches a port of the host.
const CONNECT: &str = "sub dial { socket(S, 2, 1, 0) or die qq(socket: $!); \
    connect(S, pack('SnCCCCx8', 2, $_[0], 10, 199, 10, 1)) or die qq(connect: $!) } ";

/// An interface of the host's; gone when what has opened it is.
fn interface() -> Result<(NetConfig, OwnedFd)> {
    let tap = open_tap(TAP).context("open a tap")?;
    proc::set_up_interface(TAP, &format!("{HOST}/{PREFIX}"), LIMIT)?;
    let config = NetConfig {
        id: TAP.into(),
        tap: 0,
        mac: MAC,
        ..NetConfig::default()
    };
    Ok((config, tap))
}

/// Gives the guest an interface; its slot.
fn attach(guest: &mut Guest) -> Result<u8> {
    let (config, tap) = interface()?;
    let slot = guest.vmm().plug(PlugConfig::Net(config), tap)?;
    let network = agent::Network {
        interfaces: vec![agent::Interface {
            mac: MAC.to_vec(),
            name: "eth0".into(),
            mtu: 1500,
            addresses: vec![agent::IpAddress {
                address: GUEST.octets().to_vec(),
                prefix_len: PREFIX,
                ..Default::default()
            }],
            ..Default::default()
        }],
        ..Default::default()
    };
    guest.wait_for(guest.agent().add_network(network))?;
    Ok(slot)
}

/// Sends through it both ways.
fn exchange(guest: &mut Guest, slot: u8) -> Result<()> {
    let listener = TcpListener::bind((HOST, 0)).context("listen at the tap")?;
    let port = listener.local_addr()?.port().into();
    both_ways(guest, CONNECT, port, move || {
        Ok(listener.accept()?.0.into())
    })?;
    same(metrics(guest, slot)?.errors, 0)
}

fn an_interface_carries_bytes_both_ways_at_once(context: &Context, start: Start) -> Result<()> {
    let mut guest = guest_with_perl(context, start, "interface")?;
    let slot = attach(&mut guest)?;
    exchange(&mut guest, slot)
}

fn a_saved_interface_carries_bytes_both_ways_at_once(
    context: &Context,
    start: Start,
) -> Result<()> {
    let mut guest = context.guest_to_save(start, "saved-interface", Size::default())?;
    guest.set_up("")?;
    let slot = attach(&mut guest)?;
    let (state, memory) = (guest.dir().join("state"), guest.dir().join("memory"));
    guest.vmm().snapshot(&state, &memory)?;
    drop(guest);

    let (config, tap) = interface()?;
    let dir = context.dir.join(context.id("clones-interface"));
    let mut clone = Guest::up(&context.products, &dir, LIMIT, |vmm| {
        let products = &context.products;
        vmm.clone_with(&state, &memory, products, &dir, |devices, fds| {
            fds.push(tap);
            let tap = fds.len() as u32 - 1;
            devices.net.push(NetConfig { tap, ..config });
        })?;
        vmm.wait_clone()
    })?;
    clone.set_up(SHARED_TAG)?;
    fill(&clone.shared().join(ROOT))?;
    add_perl(&clone)?;
    exchange(&mut clone, slot)
}

/// Copies a file, writes to it, runs a program, and waits for the host. Tells
/// how it is mounted and what the page cache grew by in KiB.
const LOOK: &str = r#"
    cached() { busybox awk '/^Cached/ { print $2 }' /proc/meminfo; }
    busybox awk '$2 == "/" { print $3, $4 }' /proc/mounts
    before=$(cached)
    cat /large >/copy
    echo $(($(cached) - before))
    busybox cp /bin/busybox /busybox && /busybox echo ran
    printf guest | dd of=/large bs=1 seek=5000000 conv=notrunc 2>/dev/null
    exec 3</large
    dd bs=1 skip=5000000 count=5 <&3 2>/dev/null; echo
    echo >/looked
    until [ -e /go ]; do sleep 0.2; done
    dd bs=1 skip=995 count=4 <&3 2>/dev/null; echo
"#;

fn a_window_shows_the_hosts_files(context: &Context, start: Start) -> Result<()> {
    let size = Size {
        window_mib: 64,
        ..Size::default()
    };
    let guest = context.guest_to_save(start, "window", size)?;
    guest.set_up_with(SetupSandboxRequest {
        shared_tag: SHARED_TAG.into(),
        shared_dax: true,
        ..Default::default()
    })?;
    let root = guest.shared().join(ROOT);
    fill(&root)?;
    let large = pattern(16 << 20);
    fs::write(root.join("large"), &large)?;
    let (_, running) = guest.begin("looks", script("looks", LOOK)?, Vec::new())?;
    until(LIMIT, "the guest to look", || {
        Ok(root.join("looked").exists())
    })?;
    let mut seen = [0; 5];
    let file = File::options()
        .read(true)
        .write(true)
        .open(root.join("large"))?;
    file.read_exact_at(&mut seen, 5_000_000)?;
    same(&seen, b"guest")?;
    file.write_all_at(b"host", 5_001_000)?;
    fs::write(root.join("go"), "")?;
    let out = String::from_utf8(guest.end(running)?.ok()?)?;
    let lines: Vec<&str> = out.lines().collect();
    let [options, grown, ran, written, host] = lines[..] else {
        bail!("{out}");
    };
    ensure!(options.contains("dax=always"), "{options}");
    same(fs::read(root.join("copy"))? == large, true)?;
    let grown: i64 = grown.parse()?;
    ensure!(grown < 4 << 10, "the page cache grew by {grown} KiB");
    same((ran, written, host), ("ran", "guest", "host"))
}
