// SPDX-License-Identifier: Apache-2.0
//! `bulkhead-vmm` driven over its control socket, without the runtime.

use std::fs::{File, Permissions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{bail, Context, Result};
use bulkhead_agent_protocol::{AGENT_PORT, SHARED_TAG, STREAM_PORT};
use bulkhead_runtime::hypervisor::cmdline::{self, Later};
use bulkhead_vmm_api::{
    BalloonConfig, Call, Channel, DeviceConfigs, Event, FromVmm, FsCache, FsConfig, KernelConfig,
    MemConfig, Outcome, Pages, PlugConfig, PmemConfig, Request, RestoreConfig, SnapshotFiles,
    Status, UnplugTarget, VmConfig, VsockConfig,
};
use nix::fcntl::{fcntl, FcntlArg, FdFlag};
use nix::sys::socket::{setsockopt, sockopt::ReceiveTimeout};
use nix::sys::time::TimeVal;

use crate::install::Products;

/// A VMM's process; killed when dropped.
pub struct Vmm {
    child: Child,
    channel: Channel,
    next: u64,
    /// Came while a reply was waited for.
    early: Vec<Event>,
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Vmm {
    /// Starts one; no answer may take longer than `limit`.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn start(products: &Products, limit: Duration) -> Result<Self> {
        let (channel, theirs) = Channel::pair()?;
        let patience = TimeVal::new(limit.as_secs().try_into()?, 0);
        setsockopt(&channel, ReceiveTimeout, &patience)?;
        // For the child to inherit.
        fcntl(theirs.as_fd(), FcntlArg::F_SETFD(FdFlag::empty()))?;
        let child = Command::new(products.program("bulkhead-vmm"))
            .args(["--control-fd", &theirs.as_raw_fd().to_string()])
            .stdin(Stdio::null())
            .spawn()
            .context("run the VMM")?;
        Ok(Self {
            child,
            channel,
            next: 1,
            early: Vec::new(),
        })
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Calls it.
    ///
    /// # Errors
    /// When it refuses or does not answer.
    pub fn call(&mut self, call: Call, fds: &[OwnedFd]) -> Result<Outcome> {
        let id = self.next;
        self.next += 1;
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        self.channel.send(&Request { id, call }, &fds)?;
        loop {
            match self.channel.receive::<FromVmm>()?.0 {
                FromVmm::Event(event) => self.early.push(event),
                FromVmm::Reply(reply) if reply.id == id => match reply.outcome {
                    Outcome::Failed(failure) => bail!("the VMM refused: {}", failure.message),
                    outcome => return Ok(outcome),
                },
                FromVmm::Reply(reply) => bail!("an answer to nothing: {reply:?}"),
            }
        }
    }

    /// The next thing it tells.
    ///
    /// # Errors
    /// When it tells nothing.
    pub fn event(&mut self) -> Result<Event> {
        if !self.early.is_empty() {
            return Ok(self.early.remove(0));
        }
        match self.channel.receive::<FromVmm>()?.0 {
            FromVmm::Event(event) => Ok(event),
            FromVmm::Reply(reply) => bail!("an answer to nothing: {reply:?}"),
        }
    }

    /// Waits for the agent's call.
    ///
    /// # Errors
    /// When the guest does not come up.
    pub fn wait_ready(&mut self) -> Result<()> {
        match self.event()? {
            Event::GuestReady(_) => Ok(()),
            other => bail!("the guest did not come up: {other:?}"),
        }
    }

    /// Waits until a clone has its own generation id and its agent has called.
    ///
    /// # Errors
    /// When one of them does not happen.
    pub fn wait_clone(&mut self) -> Result<()> {
        let mut ready = false;
        let mut own = false;
        while !(ready && own) {
            match self.event()? {
                Event::GuestReady(_) => ready = true,
                Event::GenerationRead => own = true,
                other => bail!("the clone did not come up: {other:?}"),
            }
        }
        Ok(())
    }

    /// How it is.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn status(&mut self) -> Result<Status> {
        match self.call(Call::Status, &[])? {
            Outcome::Status(status) => Ok(*status),
            other => bail!("no status: {other:?}"),
        }
    }

    /// Boots a pod's machine as the runtime does, without a network. `dir`
    /// holds the sockets and the shared directory.
    ///
    /// # Errors
    /// When it does not.
    pub fn boot(&mut self, products: &Products, dir: &Path) -> Result<()> {
        self.boot_as(products, dir, None)
    }

    /// As [`Self::boot`], of another size.
    ///
    /// # Errors
    /// When it does not.
    pub fn boot_sized(&mut self, products: &Products, dir: &Path, size: Size) -> Result<()> {
        self.boot_with(products, dir, size, None)
    }

    /// As [`Self::boot`], with mergeable memory when there is something to hold
    /// meanwhile.
    ///
    /// # Errors
    /// When it does not.
    pub fn boot_as(
        &mut self,
        products: &Products,
        dir: &Path,
        merge_group: Option<OwnedFd>,
    ) -> Result<()> {
        self.boot_with(products, dir, Size::default(), merge_group)
    }

    /// As [`Self::boot`], of a machine that `change` makes another, with its
    /// descriptors.
    ///
    /// # Errors
    /// When it does not.
    pub fn boot_changed(
        &mut self,
        products: &Products,
        dir: &Path,
        change: impl FnOnce(&mut VmConfig, &mut Vec<OwnedFd>),
    ) -> Result<()> {
        self.boot_all(products, dir, Size::default(), None, change)
    }

    fn boot_with(
        &mut self,
        products: &Products,
        dir: &Path,
        size: Size,
        merge_group: Option<OwnedFd>,
    ) -> Result<()> {
        self.boot_all(products, dir, size, merge_group, |_, _| {})
    }

    fn boot_all(
        &mut self,
        products: &Products,
        dir: &Path,
        size: Size,
        merge_group: Option<OwnedFd>,
        change: impl FnOnce(&mut VmConfig, &mut Vec<OwnedFd>),
    ) -> Result<()> {
        let mut devices = Devices::new(products, dir)?;
        let later = Later {
            vcpus: (size.extra_vcpus > 0).then_some(1),
            memory: size.extra_mib > 0,
            debug: false,
        };
        size.apply(&mut devices.config);
        let mut fds = devices.fds;
        fds.push(File::open(products.kernel())?.into());
        let kernel = fds.len() as u32 - 1;
        let merge_group = merge_group.map(|held| {
            fds.push(held);
            kernel + 1
        });
        let mut config = VmConfig {
            vcpus: 1 + size.extra_vcpus,
            memory_mib: size.memory_mib,
            pages: Pages::Small,
            merge_group,
            kernel: KernelConfig {
                image: kernel,
                cmdline: cmdline::build_for(later, ""),
                initrd: None,
            },
            serial: Some(0),
            devices: devices.config,
        };
        change(&mut config, &mut fds);
        self.call(Call::Configure(Box::new(config)), &fds)?;
        self.call(Call::Boot, &[])?;
        Ok(())
    }

    /// Plugs a device; its slot.
    ///
    /// # Errors
    /// When it cannot be.
    pub fn plug(&mut self, config: PlugConfig, fd: OwnedFd) -> Result<u8> {
        match self.call(Call::Plug(Box::new(config)), &[fd])? {
            Outcome::Plugged(device) => Ok(device.slot),
            other => bail!("no slot: {other:?}"),
        }
    }

    /// Unplugs one.
    ///
    /// # Errors
    /// When it cannot be.
    pub fn unplug(&mut self, slot: u8) -> Result<()> {
        self.call(Call::Unplug(UnplugTarget { slot }), &[])
            .map(drop)
    }

    /// Writes the machine, which is then paused, to two files.
    ///
    /// # Errors
    /// When it cannot.
    pub fn snapshot(&mut self, state: &Path, memory: &Path) -> Result<()> {
        self.call(Call::Pause, &[])?;
        let fds = [File::create(state)?.into(), File::create(memory)?.into()];
        let files = SnapshotFiles {
            state: 0,
            memory: 1,
        };
        self.call(Call::Snapshot(files), &fds)?;
        Ok(())
    }

    /// Makes a machine of what [`Self::boot`] booted and [`Self::snapshot`]
    /// wrote, with `dir` of its own, and lets it run.
    ///
    /// # Errors
    /// When it cannot.
    pub fn clone_of(
        &mut self,
        state: &Path,
        memory: &Path,
        products: &Products,
        dir: &Path,
    ) -> Result<()> {
        self.clone_with(state, memory, products, dir, |_, _| {})
    }

    /// As [`Self::clone_of`], of a machine that had more devices: `more` adds
    /// them, with their descriptors.
    ///
    /// # Errors
    /// When it cannot.
    pub fn clone_with(
        &mut self,
        state: &Path,
        memory: &Path,
        products: &Products,
        dir: &Path,
        more: impl FnOnce(&mut DeviceConfigs, &mut Vec<OwnedFd>),
    ) -> Result<()> {
        let mut devices = Devices::new(products, dir)?;
        more(&mut devices.config, &mut devices.fds);
        let mut fds = devices.fds;
        let first = fds.len() as u32;
        fds.push(File::open(state)?.into());
        fds.push(File::open(memory)?.into());
        let config = RestoreConfig {
            snapshot: SnapshotFiles {
                state: first,
                memory: first + 1,
            },
            serial: Some(0),
            devices: devices.config,
        };
        self.call(Call::Restore(Box::new(config)), &fds)?;
        self.call(Call::Resume, &[])?;
        Ok(())
    }
}

/// How large a guest is, and what it may get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Its memory.
    pub memory_mib: u32,
    /// Processors that it does not use at first.
    pub extra_vcpus: u8,
    /// Memory that it has not got at first.
    pub extra_mib: u32,
    /// The window that its shared directory's files are seen through; 0: none.
    pub window_mib: u32,
}

impl Size {
    /// Changes the devices that it says something of.
    pub fn apply(self, devices: &mut DeviceConfigs) {
        devices.mem = (self.extra_mib > 0).then_some(MemConfig {
            max_mib: self.extra_mib,
        });
        for shared in &mut devices.fs {
            shared.dax_mib = self.window_mib;
        }
    }
}

impl Default for Size {
    fn default() -> Self {
        Self {
            memory_mib: 256,
            extra_vcpus: 0,
            extra_mib: 0,
            window_mib: 0,
        }
    }
}

/// A pod's devices.
struct Devices {
    fds: Vec<OwnedFd>,
    config: DeviceConfigs,
}

impl Devices {
    fn new(products: &Products, dir: &Path) -> Result<Self> {
        let shared = dir.join("shared");
        std::fs::create_dir_all(&shared)?;
        open_sockets(dir)?;
        let console = File::options()
            .create(true)
            .append(true)
            .open(dir.join("console"))?;
        Ok(Self {
            fds: vec![
                console.into(),
                File::open(products.image())?.into(),
                File::open(shared)?.into(),
            ],
            config: DeviceConfigs {
                pmem: vec![PmemConfig {
                    id: "image".into(),
                    file: 1,
                    read_only: true,
                }],
                fs: vec![FsConfig {
                    tag: SHARED_TAG.into(),
                    directory: 2,
                    cache: FsCache::Auto,
                    dax_mib: 0,
                    host_locks: false,
                }],
                vsock: Some(VsockConfig {
                    cid: 3,
                    listener: None,
                    uds_path: vsock_path(dir),
                    ready_port: Some(AGENT_PORT),
                }),
                balloon: Some(BalloonConfig::default()),
                ..DeviceConfigs::default()
            },
        })
    }
}

/// Lets the VMM, which is a user of its own, connect to what listens there.
fn open_sockets(dir: &Path) -> Result<()> {
    std::fs::set_permissions(dir, Permissions::from_mode(0o711))?;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_socket() {
            std::fs::set_permissions(entry.path(), Permissions::from_mode(0o666))?;
        }
    }
    Ok(())
}

fn vsock_path(dir: &Path) -> String {
    dir.join("vsock").to_string_lossy().into_owned()
}

/// Where connections to a port of the host go that the machine with that
/// directory makes.
pub fn port_socket(dir: &Path, port: u32) -> String {
    format!("{}_{port}", vsock_path(dir))
}

/// Where that machine's agent opens streams.
pub fn stream_socket(dir: &Path) -> String {
    port_socket(dir, STREAM_PORT)
}

/// Where the agent of the machine with that directory calls.
pub fn agent_socket(dir: &Path) -> String {
    port_socket(dir, AGENT_PORT)
}
