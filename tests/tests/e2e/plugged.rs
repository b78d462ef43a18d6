// SPDX-License-Identifier: Apache-2.0
//! A guest of the tests whose devices come and go, and scripts in it.

use std::fs::{self, File};
use std::os::fd::OwnedFd;

use anyhow::{bail, Context as _, Result};
use bulkhead_agent_protocol::{agent, oci, SHARED_MOUNT, SHARED_TAG};
use bulkhead_runtime::agent::Agent;
use bulkhead_tests::install::which;
use bulkhead_tests::start::Start;
use bulkhead_tests::vmm::{Size, Vmm};
use bulkhead_vmm_api::{BlkConfig, BlkEngine, Event, ExitReason, PlugConfig, VmConfig};
use tokio::runtime::Runtime;

use crate::context::{same, until, Context, LIMIT};
use crate::vmm::{runtime, Host};

/// A guest with its agent.
pub struct Guest {
    pub host: Host,
    pub vmm: Vmm,
    pub runtime: Runtime,
    pub agent: Agent,
}

/// A device as the guest sees it.
#[derive(Debug)]
pub struct Seen {
    pub slot: u8,
    pub driver: String,
    pub node: agent::DeviceNode,
}

pub fn address(slot: u8) -> String {
    format!("0000:00:{slot:02x}.0")
}

impl Guest {
    /// One with its shared directory.
    pub fn up(context: &Context, start: Start, name: &str) -> Result<Self> {
        Self::up_with(context, start, name, SHARED_TAG)
    }

    /// As [`Self::up`], with what has that tag; none: it can be saved.
    pub fn up_with(context: &Context, start: Start, name: &str, tag: &str) -> Result<Self> {
        Self::up_sized(context, start, name, tag, Size::default())
    }

    /// As [`Self::up_with`], as large as that.
    pub fn up_sized(
        context: &Context,
        start: Start,
        name: &str,
        tag: &str,
        size: Size,
    ) -> Result<Self> {
        context.only_bulkhead()?;
        let host = Host::new(context, name)?;
        let mut vmm = Vmm::start(&context.products, LIMIT)?;
        context.bring_up(start, &mut vmm, &host.dir, size)?;
        Self::of(host, vmm, tag)
    }

    /// As [`Self::up_with`], of a machine that boots and that `change` makes
    /// another.
    pub fn boot_changed(
        context: &Context,
        name: &str,
        tag: &str,
        change: impl FnOnce(&mut VmConfig, &mut Vec<OwnedFd>),
    ) -> Result<Self> {
        context.only_bulkhead()?;
        let host = Host::new(context, name)?;
        let mut vmm = Vmm::start(&context.products, LIMIT)?;
        vmm.boot_changed(&context.products, &host.dir, change)?;
        vmm.wait_ready()?;
        Self::of(host, vmm, tag)
    }

    fn of(host: Host, vmm: Vmm, tag: &str) -> Result<Self> {
        let runtime = runtime()?;
        let (agent, _) = host.set_up_with(&runtime, tag)?;
        Ok(Self {
            host,
            vmm,
            runtime,
            agent,
        })
    }

    /// A file of this guest's on the host.
    pub fn file(&self, name: &str, size: u64) -> Result<File> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(self.host.dir.join(name))?;
        file.set_len(size)?;
        Ok(file)
    }

    pub fn plug_disk(&mut self, id: &str, file: &File) -> Result<u8> {
        self.plug_disk_by(BlkEngine::Sync, id, file)
    }

    pub fn plug_disk_by(&mut self, engine: BlkEngine, id: &str, file: &File) -> Result<u8> {
        let config = BlkConfig {
            id: id.into(),
            file: 0,
            read_only: false,
            engine: Some(engine),
            ..BlkConfig::default()
        };
        let fd: OwnedFd = file.try_clone()?.into();
        self.vmm.plug(PlugConfig::Blk(config), fd)
    }

    /// Has the guest look at the bus; what it finds in these slots.
    pub fn look(&self, slots: &[u8]) -> Result<Vec<Seen>> {
        let request = agent::Empty::new();
        let reply = self
            .runtime
            .block_on(self.agent.rescan_devices(request))
            .with_context(|| self.host.console())?;
        let mut seen = Vec::new();
        for slot in slots {
            let mut all = reply.devices.iter();
            let device = all.find(|device| device.address == address(*slot));
            let Some(device) = device else { continue };
            seen.push(Seen {
                slot: *slot,
                driver: device.driver.clone(),
                node: device.nodes.first().cloned().unwrap_or_default(),
            });
        }
        Ok(seen)
    }

    /// What the guest finds in one slot, where something must be.
    pub fn look_at(&self, slot: u8, driver: &str) -> Result<agent::DeviceNode> {
        let mut found = None;
        // What the device is for may come a little later than its driver: the
        // kernel adds persistent memory in a thread of its own.
        until(LIMIT, "the guest's driver", || {
            let seen = self.look(&[slot])?.pop();
            let seen =
                seen.with_context(|| format!("nothing in slot {slot}: {}", self.host.console()))?;
            same(seen.driver.as_str(), driver).with_context(|| self.host.console())?;
            let complete = driver == "virtiofs" || !seen.node.name.is_empty();
            found = complete.then_some(seen.node);
            Ok(complete)
        })?;
        found.context("a device")
    }

    /// Has the guest let go of a device.
    pub fn let_go(&self, slot: u8) -> Result<()> {
        let request = agent::RemoveDeviceRequest {
            address: address(slot),
            ..Default::default()
        };
        self.runtime
            .block_on(self.agent.remove_device(request))
            .map(drop)
            .map_err(anyhow::Error::from)
    }

    pub fn take_out(&mut self, slot: u8) -> Result<()> {
        self.let_go(slot)?;
        self.vmm.unplug(slot)?;
        same(self.look(&[slot])?.len(), 0)
    }

    /// Starts a script in the guest, which finds the disk at /dev/disk and may
    /// mount.
    pub fn start(&self, id: &str, disk: Option<&agent::DeviceNode>, script: &str) -> Result<()> {
        let rootfs = self.host.dir.join("shared").join(id);
        for dir in ["bin", "dev", "proc", "sys", "mnt"] {
            fs::create_dir_all(rootfs.join(dir))?;
        }
        let busybox = which("busybox").context("busybox is missing (package busybox-static)")?;
        fs::copy(busybox, rootfs.join("bin/busybox"))?;
        let spec = specification(id, disk, script);
        let create = agent::CreateContainerRequest {
            container_id: id.into(),
            spec: Some(spec).into(),
            stdio: Some(agent::Stdio::default()).into(),
            ..Default::default()
        };
        let start = agent::StartContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.runtime.block_on(async {
            self.agent.create_container(create).await?;
            self.agent.start_container(start).await?;
            Ok(())
        })
    }

    /// Waits for its end, and removes it; its exit code.
    pub fn end(&self, id: &str) -> Result<u32> {
        let wait = agent::WaitProcessRequest {
            container_id: id.into(),
            ..Default::default()
        };
        let delete = agent::ContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.runtime.block_on(async {
            let ended = tokio::time::timeout(LIMIT, self.agent.wait_process(wait)).await;
            let ended = ended.with_context(|| format!("{id} does not end"))??;
            self.agent.delete_container(delete).await?;
            Ok(ended.exit_status)
        })
    }

    /// What a script has left in a file of its root directory.
    pub fn left(&self, id: &str, name: &str) -> String {
        fs::read_to_string(self.host.dir.join("shared").join(id).join(name)).unwrap_or_default()
    }

    /// Runs a script to its good end.
    pub fn run(&self, id: &str, disk: Option<&agent::DeviceNode>, script: &str) -> Result<()> {
        self.start(id, disk, &format!("set -e; exec 2>/errors; {script}"))?;
        match self.end(id)? {
            0 => Ok(()),
            code => bail!("{script}: {code}: {}", self.left(id, "errors")),
        }
    }

    /// Waits until a script has made a file in its root directory.
    pub fn wait_for(&self, id: &str, name: &str) -> Result<()> {
        until(LIMIT, name, || {
            Ok(self.host.dir.join("shared").join(id).join(name).exists())
        })
        .with_context(|| self.left(id, "errors"))
    }

    pub fn stop(mut self) -> Result<()> {
        let limit = std::time::Duration::from_secs(10);
        // The answer may be lost; what counts is the end.
        drop(self.runtime.block_on(self.agent.shutdown(limit)));
        let console = self.host.console();
        same(self.vmm.event()?, Event::Ended(ExitReason::PowerOff)).context(console)
    }
}

fn specification(id: &str, disk: Option<&agent::DeviceNode>, script: &str) -> oci::Spec {
    let mount = |destination: &str, kind: &str| oci::Mount {
        destination: destination.into(),
        type_: kind.into(),
        source: kind.into(),
        ..Default::default()
    };
    let names = [
        "CAP_SYS_ADMIN",
        "CAP_DAC_OVERRIDE",
        "CAP_NET_ADMIN",
        "CAP_MKNOD",
    ];
    let capabilities = names.map(String::from).to_vec();
    let devices = disk.map(|node| oci::Device {
        path: "/dev/disk".into(),
        type_: "b".into(),
        major: node.major.into(),
        minor: node.minor.into(),
        file_mode: Some(0o600),
        ..Default::default()
    });
    let namespaces = ["pid", "mount"].map(|kind| oci::Namespace {
        type_: kind.into(),
        ..Default::default()
    });
    oci::Spec {
        version: "1.2.0".into(),
        process: Some(oci::Process {
            args: ["busybox", "sh", "-c", script].map(String::from).to_vec(),
            env: vec!["PATH=/bin".into()],
            cwd: "/".into(),
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
            path: format!("{SHARED_MOUNT}/{id}"),
            ..Default::default()
        })
        .into(),
        mounts: vec![
            mount("/proc", "proc"),
            mount("/dev", "tmpfs"),
            mount("/sys", "sysfs"),
        ],
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
    }
}
