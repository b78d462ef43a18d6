// SPDX-License-Identifier: Apache-2.0
//! Disks that come and go, and containers that work with them. The containers'
//! programs are on a disk, too, that `tests/io/build` makes: so the guest can be
//! saved, which it cannot be with a shared directory.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use bulkhead_agent_protocol::agent::{DeviceNode, Empty, Mirror, MirrorEntry, RemoveDeviceRequest};
use bulkhead_agent_protocol::{oci, CAPABILITIES, MIRRORS, SHARED_MOUNT};
use bulkhead_tests::guest::{Guest, Outcome, Running};
use bulkhead_vmm_api::{BlkConfig, BlkEngine, DeviceMetrics, PlugConfig};

use crate::context::{until, Skip, LIMIT};

/// Environment variable with the directory that has `root` and `root.erofs`.
const PROGRAMS: &str = "BULKHEAD_IO";

/// What was built.
pub fn programs() -> Result<PathBuf> {
    let built = std::env::var(PROGRAMS).ok().filter(|dir| !dir.is_empty());
    let why = || Skip(format!("it needs {PROGRAMS} (make test-io)"));
    Ok(built.ok_or_else(why)?.into())
}

/// A disk of a guest.
pub struct Disk {
    /// Where it is on the bus.
    pub slot: u8,
    /// What it is in the guest.
    pub node: DeviceNode,
}

fn address(slot: u8) -> String {
    format!("0000:00:{slot:02x}.0")
}

/// Plugs a disk, and waits for what the guest makes of it.
pub fn plug(guest: &mut Guest, config: BlkConfig, file: &File) -> Result<Disk> {
    let fd: OwnedFd = file.try_clone()?.into();
    let slot = guest.vmm().plug(PlugConfig::Blk(config), fd)?;
    let mut found = None;
    until(LIMIT, "the disk", || {
        let seen = guest.wait_for(guest.agent().rescan_devices(Empty::new()))?;
        let mut all = seen.devices.into_iter();
        let device = all.find(|device| device.address == address(slot));
        found = device.and_then(|device| device.nodes.into_iter().next());
        Ok(found.is_some())
    })?;
    let node = found.context("no disk")?;
    Ok(Disk { slot, node })
}

/// What a disk is to be that is served so.
pub fn named(id: &str, engine: BlkEngine) -> BlkConfig {
    BlkConfig {
        id: id.into(),
        engine: Some(engine),
        ..BlkConfig::default()
    }
}

/// The programs, on a disk.
pub fn plug_programs(guest: &mut Guest) -> Result<Disk> {
    let image = File::open(programs()?.join("root.erofs"))?;
    let config = BlkConfig {
        read_only: true,
        ..named("programs", BlkEngine::Sync)
    };
    plug(guest, config, &image)
}

/// A file of this size, all zeroes.
pub fn sized(path: &Path, size: u64) -> Result<File> {
    let mut options = File::options();
    let file = options.read(true).write(true).create(true).truncate(true);
    let file = file
        .open(path)
        .with_context(|| path.display().to_string())?;
    file.set_len(size)?;
    Ok(file)
}

/// Starts a script in a container whose root is in the guest's memory, with the
/// programs and, where there is one, a disk at /dev/disk; /data is the shared
/// directory's, where there is none.
pub fn begin(
    guest: &Guest,
    id: &str,
    programs: &Disk,
    disk: Option<&Disk>,
    script: &str,
) -> Result<Running> {
    let entry = |path: &str, mode: u32, data: &str| MirrorEntry {
        path: path.into(),
        mode,
        data: data.as_bytes().to_vec(),
        ..Default::default()
    };
    let directories = ["", "data", "dev", "proc", "programs", "sys", "tmp"];
    let links = ["bin", "lib", "lib64", "usr"];
    let entries = directories
        .map(|path| entry(path, libc::S_IFDIR | 0o755, ""))
        .into_iter()
        .chain(links.map(|path| entry(path, libc::S_IFLNK | 0o777, &format!("programs/{path}"))));
    let mirror = Mirror {
        name: "root".into(),
        entries: entries.collect(),
        ..Default::default()
    };
    let mount = |destination: &str, type_: &str, source: &str, options: &[&str]| oci::Mount {
        destination: destination.into(),
        type_: type_.into(),
        source: source.into(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
        ..Default::default()
    };
    let source = format!("/dev/{}", programs.node.name);
    let mut mounts = vec![
        mount("/proc", "proc", "proc", &[]),
        mount("/dev", "tmpfs", "tmpfs", &[]),
        mount("/sys", "sysfs", "sysfs", &[]),
        mount("/programs", "erofs", &source, &["ro"]),
    ];
    if disk.is_none() {
        let source = format!("{SHARED_MOUNT}/data");
        mounts.push(mount("/data", "bind", &source, &["bind", "rw"]));
    }
    let capabilities = CAPABILITIES.map(|name| format!("CAP_{name}")).to_vec();
    let devices = disk.map(|disk| oci::Device {
        path: "/dev/disk".into(),
        type_: "b".into(),
        major: disk.node.major.into(),
        minor: disk.node.minor.into(),
        file_mode: Some(0o600),
        ..Default::default()
    });
    let namespaces = ["pid", "mount"].map(|kind| oci::Namespace {
        type_: kind.into(),
        ..Default::default()
    });
    let spec = oci::Spec {
        version: "1.2.0".into(),
        process: Some(oci::Process {
            args: ["sh", "-c", script].map(String::from).to_vec(),
            env: vec!["PATH=/bin:/usr/bin".into()],
            cwd: "/tmp".into(),
            capabilities: Some(oci::Capabilities {
                bounding: capabilities.clone(),
                effective: capabilities.clone(),
                permitted: capabilities,
                ..Default::default()
            })
            .into(),
            ..Default::default()
        })
        .into(),
        root: Some(oci::Root {
            path: format!("{MIRRORS}/{id}/root"),
            ..Default::default()
        })
        .into(),
        mounts,
        linux: Some(oci::Linux {
            namespaces: namespaces.to_vec(),
            devices: devices.into_iter().collect(),
            resources: Some(oci::Resources {
                devices: vec![oci::DeviceRule {
                    allow: true,
                    access: "rwm".into(),
                    ..Default::default()
                }],
                ..Default::default()
            })
            .into(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    Ok(guest.begin(id, spec, vec![mirror])?.1)
}

/// A further process in a container, to its end.
pub fn exec(guest: &Guest, id: &str, process: oci::Process) -> Result<Outcome> {
    const NAME: &str = "beside";
    let done = guest.exec(id, NAME, process)?.1;
    guest.forget(id, NAME)?;
    Ok(done)
}

/// What a device has done.
pub fn metrics(guest: &mut Guest, slot: u8) -> Result<DeviceMetrics> {
    let devices = guest.vmm().status()?.devices;
    let device = devices.iter().find(|device| device.slot == slot);
    Ok(device.context("no such device")?.metrics)
}

/// Bytes both ways.
pub fn moved(guest: &mut Guest, slot: u8) -> Result<u64> {
    let metrics = metrics(guest, slot)?;
    Ok(metrics.bytes_from_guest + metrics.bytes_to_guest)
}

/// Waits until so many bytes more have been moved.
pub fn wait_for_bytes(guest: &mut Guest, slot: u8, more: u64) -> Result<()> {
    let begin = moved(guest, slot)?;
    until(LIMIT, "bytes to be moved", || {
        Ok(moved(guest, slot)? >= begin + more)
    })
}

fn let_go(guest: &Guest, slot: u8) -> Result<()> {
    let request = RemoveDeviceRequest {
        address: address(slot),
        ..Default::default()
    };
    guest
        .wait_for(guest.agent().remove_device(request))
        .map(drop)
}

/// Unplugs a disk, once the guest has let go of it.
pub fn take_out(guest: &mut Guest, slot: u8) -> Result<()> {
    let_go(guest, slot)?;
    guest.vmm().unplug(slot)
}
