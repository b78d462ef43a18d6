// SPDX-License-Identifier: Apache-2.0
//! A configuration with its descriptors, checked: what the builder works from.

#[cfg(test)]
mod tests;

use std::{
    fs::File,
    os::fd::{AsRawFd, OwnedFd},
};

use bulkhead_vmm_api::{
    BalloonConfig, BlkConfig, ConsoleConfig, DeviceConfigs, FailureKind, FdIndex, FsConfig,
    MemConfig, NetConfig, Pages, PlugConfig, PmemConfig, RateLimits, RestoreConfig, SnapshotFiles,
    VmConfig, VsockConfig,
};
use nix::fcntl::{fcntl, FcntlArg, OFlag};

use crate::{
    arch::x86_64::layout,
    virtio::{console, mem::SLOT, net::Backend},
};

/// Most vCPUs.
pub const MAX_VCPUS: u8 = 64;
/// Largest DAX window in MiB. Each 2 MiB of it can be a mapping, of which a
/// process has some 65,000.
pub const MAX_DAX_MIB: u32 = 16 << 10;
/// Least and most memory in MiB.
pub const MEMORY_MIB: std::ops::RangeInclusive<u32> = 32..=1 << 20;
/// Most queues of a disk.
const MAX_BLK_QUEUES: u16 = 16;
/// Most pairs of queues of a network interface.
const MAX_NET_PAIRS: usize = 8;
/// Longest virtio-fs tag (virtio 1.2 §5.11.4).
const MAX_TAG: usize = 36;

/// Why a configuration is refused. Messages name the field.
#[derive(Debug, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct ConfigError {
    field: String,
    problem: String,
    /// For the reply.
    pub kind: FailureKind,
}

fn invalid(field: impl Into<String>, problem: impl Into<String>) -> ConfigError {
    ConfigError {
        field: field.into(),
        problem: problem.into(),
        kind: FailureKind::InvalidRequest,
    }
}

fn unusable(field: impl Into<String>, problem: impl Into<String>) -> ConfigError {
    ConfigError {
        kind: FailureKind::BadResource,
        ..invalid(field, problem)
    }
}

/// A checked configuration: every descriptor is where it belongs.
#[derive(Debug)]
pub struct Resources {
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Bytes of memory.
    pub memory_size: u64,
    /// What pages it is in.
    pub pages: Pages,
    /// What to hold while guest memory is mergeable; none: it is not.
    pub merge_group: Option<OwnedFd>,
    /// Kernel image.
    pub kernel: File,
    /// Its command line.
    pub cmdline: String,
    /// Initial ramdisk.
    pub initrd: Option<File>,
    /// Serial output, non-blocking.
    pub serial: Option<File>,
    /// All on the PCI bus.
    pub devices: Devices,
}

/// A checked request to restore a snapshot.
#[derive(Debug)]
pub struct RestoreResources {
    /// The state file.
    pub state: File,
    /// The memory file.
    pub memory: File,
    /// Serial output, non-blocking.
    pub serial: Option<File>,
    /// All on the PCI bus.
    pub devices: Devices,
}

/// The devices on the PCI bus, with their descriptors.
#[derive(Debug, Default)]
pub struct Devices {
    /// Persistent memory devices.
    pub pmem: Vec<(PmemConfig, File)>,
    /// Shared directories.
    pub fs: Vec<(FsConfig, OwnedFd)>,
    /// vsock, with its listener.
    pub vsock: Option<(VsockConfig, Option<OwnedFd>)>,
    /// Network interfaces.
    pub net: Vec<(NetConfig, Backend)>,
    /// Block devices.
    pub blk: Vec<(BlkConfig, File)>,
    /// Entropy device.
    pub rng: bool,
    /// The balloon.
    pub balloon: Option<BalloonConfig>,
    /// Memory that comes and goes.
    pub mem: Option<MemConfig>,
    /// What a console and a log are connected to.
    pub console: Option<console::Outputs>,
}

struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    fn new(fds: Vec<OwnedFd>) -> Self {
        Self(fds.into_iter().map(Some).collect())
    }

    /// Where the serial port writes; never blocks.
    fn serial(&mut self, index: Option<FdIndex>) -> Result<Option<File>, ConfigError> {
        self.nonblocking(index, "serial")
    }

    /// What never blocks.
    fn nonblocking(
        &mut self,
        index: Option<FdIndex>,
        field: &str,
    ) -> Result<Option<File>, ConfigError> {
        let file = index.map(|index| self.file(index, field)).transpose()?;
        if let Some(file) = &file {
            set_nonblocking(file).map_err(|error| unusable(field, error.to_string()))?;
        }
        Ok(file)
    }

    fn console(&mut self, wanted: ConsoleConfig) -> Result<console::Outputs, ConfigError> {
        let console = self.nonblocking(wanted.console, "console.console")?;
        if wanted.input {
            let kind = console.as_ref().and_then(|file| file.metadata().ok());
            if kind.is_none_or(|kind| kind.is_file() || kind.is_dir()) {
                return Err(invalid(
                    "console.input",
                    "console is not a descriptor from which input comes: pass a terminal or a socket",
                ));
            }
        }
        Ok(console::Outputs {
            console,
            input: wanted.input,
            log: self.nonblocking(wanted.log, "console.log")?,
        })
    }

    fn take(&mut self, index: FdIndex, field: &str) -> Result<OwnedFd, ConfigError> {
        let count = self.0.len();
        self.0
            .get_mut(index as usize)
            .ok_or_else(|| invalid(field, format!("descriptor {index} of {count} passed")))?
            .take()
            .ok_or_else(|| invalid(field, format!("descriptor {index} is used twice")))
    }

    fn file(&mut self, index: FdIndex, field: &str) -> Result<File, ConfigError> {
        self.take(index, field).map(File::from)
    }
}

impl Resources {
    /// Checks a configuration and hands its descriptors out.
    pub fn new(config: VmConfig, fds: Vec<OwnedFd>) -> Result<Self, ConfigError> {
        let mut fds = Descriptors::new(fds);
        if config.vcpus == 0 || config.vcpus > MAX_VCPUS {
            return Err(invalid(
                "vcpus",
                format!("{} is not 1 to {MAX_VCPUS}", config.vcpus),
            ));
        }
        if !MEMORY_MIB.contains(&config.memory_mib) {
            return Err(invalid(
                "memory_mib",
                format!(
                    "{} is not {} to {}",
                    config.memory_mib,
                    MEMORY_MIB.start(),
                    MEMORY_MIB.end()
                ),
            ));
        }
        if config.pages == Pages::Huge {
            check_huge(&config)?;
        }
        let cmdline = config.kernel.cmdline;
        if cmdline.len() >= layout::CMDLINE_SIZE || cmdline.contains(['\0', '\n']) {
            return Err(invalid(
                "kernel.cmdline",
                format!(
                    "{} bytes; at most {} without NUL and newline",
                    cmdline.len(),
                    layout::CMDLINE_SIZE - 1
                ),
            ));
        }
        let kernel = fds.file(config.kernel.image, "kernel.image")?;
        let initrd = config
            .kernel
            .initrd
            .map(|index| fds.file(index, "kernel.initrd"))
            .transpose()?;
        Ok(Self {
            vcpus: config.vcpus,
            memory_size: u64::from(config.memory_mib) << 20,
            pages: config.pages,
            merge_group: config
                .merge_group
                .map(|index| fds.take(index, "merge_group"))
                .transpose()?,
            kernel,
            cmdline,
            initrd,
            serial: fds.serial(config.serial)?,
            devices: Devices::new(config.devices, &mut fds)?,
        })
    }
}

/// What cannot be of a machine in pages that are its own for good.
fn check_huge(config: &VmConfig) -> Result<(), ConfigError> {
    if config.memory_mib % 2 != 0 {
        let problem = format!("{} is not a multiple of 2 (pages: huge)", config.memory_mib);
        return Err(invalid("memory_mib", problem));
    }
    if config.merge_group.is_some() {
        return Err(invalid(
            "merge_group",
            "memory in reserved huge pages is never merged: choose other pages, or no group",
        ));
    }
    let balloon = config.devices.balloon.as_ref();
    if balloon.is_some_and(|balloon| balloon.free_page_reporting) {
        return Err(invalid(
            "balloon.free_page_reporting",
            "nothing of reserved huge pages is given back: choose other pages, or false",
        ));
    }
    Ok(())
}

impl RestoreResources {
    /// Checks a request and hands its descriptors out.
    pub fn new(config: RestoreConfig, fds: Vec<OwnedFd>) -> Result<Self, ConfigError> {
        let mut fds = Descriptors::new(fds);
        Ok(Self {
            state: fds.file(config.snapshot.state, "snapshot.state")?,
            memory: fds.file(config.snapshot.memory, "snapshot.memory")?,
            serial: fds.serial(config.serial)?,
            devices: Devices::new(config.devices, &mut fds)?,
        })
    }
}

/// The two files to write a snapshot to: state and memory.
pub fn snapshot_files(
    files: &SnapshotFiles,
    fds: Vec<OwnedFd>,
) -> Result<(File, File), ConfigError> {
    let mut fds = Descriptors::new(fds);
    Ok((
        fds.file(files.state, "state")?,
        fds.file(files.memory, "memory")?,
    ))
}

impl Devices {
    /// The one device of a request to plug.
    ///
    /// # Errors
    /// As for those of a configuration.
    pub fn plugged(config: PlugConfig, fds: Vec<OwnedFd>) -> Result<Self, ConfigError> {
        let mut wanted = DeviceConfigs {
            rng: false,
            ..DeviceConfigs::default()
        };
        match config {
            PlugConfig::Pmem(device) => wanted.pmem.push(device),
            PlugConfig::Fs(device) => wanted.fs.push(device),
            PlugConfig::Net(device) => wanted.net.push(device),
            PlugConfig::Blk(device) => wanted.blk.push(device),
        }
        Self::new(wanted, &mut Descriptors::new(fds))
    }

    fn new(wanted: DeviceConfigs, fds: &mut Descriptors) -> Result<Self, ConfigError> {
        let mut pmem = Vec::new();
        for device in wanted.pmem {
            let field = format!("pmem {:?}", device.id);
            let file = fds.file(device.file, &field)?;
            let size = size_of(&file).map_err(|error| unusable(&field, error.to_string()))?;
            if size == 0 || size % layout::WINDOW_ALIGN != 0 {
                return Err(unusable(
                    field,
                    format!("{size} bytes is not a multiple of 2 MiB"),
                ));
            }
            pmem.push((device, file));
        }
        let mut fs = Vec::new();
        for device in wanted.fs {
            let field = format!("fs {:?}", device.tag);
            if device.tag.is_empty() || device.tag.len() > MAX_TAG {
                return Err(invalid(field, format!("a tag has 1 to {MAX_TAG} bytes")));
            }
            let directory = File::from(fds.take(device.directory, &field)?);
            let kind = directory.metadata();
            if !kind.is_ok_and(|kind| kind.is_dir()) {
                return Err(unusable(field, "not a directory"));
            }
            if device.dax_mib > MAX_DAX_MIB || device.dax_mib % 2 != 0 {
                return Err(invalid(
                    format!("{field}.dax_mib"),
                    format!(
                        "{} is not a multiple of 2 up to {MAX_DAX_MIB}",
                        device.dax_mib
                    ),
                ));
            }
            fs.push((device, directory.into()));
        }
        let vsock = match wanted.vsock {
            Some(device) => {
                if device.cid < 3 {
                    return Err(invalid("vsock.cid", format!("{} is reserved", device.cid)));
                }
                let listener = device
                    .listener
                    .map(|index| fds.take(index, "vsock.listener"))
                    .transpose()?;
                Some((device, listener))
            }
            None => None,
        };
        let mut net = Vec::new();
        for device in wanted.net {
            let field = format!("net {:?}", device.id);
            if device.mac[0] & 1 != 0 {
                return Err(invalid(field, "mac is a multicast address"));
            }
            check_rate(&field, "transmit_rate", device.transmit_rate)?;
            check_rate(&field, "receive_rate", device.receive_rate)?;
            if device.more_queues.len() >= MAX_NET_PAIRS {
                return Err(invalid(
                    field,
                    format!("more_queues: {MAX_NET_PAIRS} in all at most"),
                ));
            }
            let mut taps = Vec::new();
            for index in [&device.tap].into_iter().chain(&device.more_queues) {
                let tap = fds.file(*index, &field)?;
                set_nonblocking(&tap).map_err(|error| unusable(&field, error.to_string()))?;
                taps.push(tap);
            }
            let limited = device.transmit_rate.is_some() || device.receive_rate.is_some();
            if device.vhost.is_some() && (limited || taps.len() > 1) {
                return Err(invalid(
                    field,
                    "vhost: not with limits, nor with several queues",
                ));
            }
            let vhost = device
                .vhost
                .map(|index| fds.file(index, &field))
                .transpose()?;
            net.push((device, Backend { taps, vhost }));
        }
        let mut blk = Vec::new();
        for device in wanted.blk {
            let field = format!("blk {:?}", device.id);
            let file = fds.file(device.file, &field)?;
            let size = size_of(&file).map_err(|error| unusable(&field, error.to_string()))?;
            if size % 512 != 0 {
                return Err(unusable(
                    field,
                    format!("{size} bytes is not a multiple of 512"),
                ));
            }
            if !(1..=MAX_BLK_QUEUES).contains(&device.queues.unwrap_or(1)) {
                return Err(invalid(
                    field,
                    format!(
                        "queues: {} is not 1 to {MAX_BLK_QUEUES}",
                        device.queues.unwrap_or(0)
                    ),
                ));
            }
            check_rate(&field, "rate", device.rate)?;
            blk.push((device, file));
        }
        let part = (SLOT >> 20) as u32;
        if let Some(MemConfig { max_mib }) = wanted.mem {
            if max_mib == 0 || max_mib % part != 0 || !MEMORY_MIB.contains(&max_mib) {
                return Err(invalid(
                    "mem.max_mib",
                    format!(
                        "{max_mib} is not a multiple of {part}, {} at most",
                        MEMORY_MIB.end()
                    ),
                ));
            }
        }
        Ok(Self {
            pmem,
            fs,
            vsock,
            net,
            blk,
            rng: wanted.rng,
            balloon: wanted.balloon,
            mem: wanted.mem,
            console: wanted
                .console
                .map(|console| fds.console(console))
                .transpose()?,
        })
    }
}

/// Limits that let something through.
fn check_rate(field: &str, name: &str, limits: Option<RateLimits>) -> Result<(), ConfigError> {
    let limits = limits.unwrap_or_default();
    for (part, rate) in [("bytes", limits.bytes), ("operations", limits.operations)] {
        if rate.is_some_and(|rate| rate.per_second == 0 || rate.burst == 0) {
            return Err(invalid(
                field,
                format!("{name}.{part}: per_second and burst are at least 1"),
            ));
        }
    }
    Ok(())
}

fn set_nonblocking(file: &File) -> nix::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    if flags.contains(OFlag::O_NONBLOCK) {
        return Ok(());
    }
    fcntl(file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map(|_| ())
}

/// Size of a file or block device in bytes.
fn size_of(file: &File) -> std::io::Result<u64> {
    use std::io::{Seek, SeekFrom};
    let mut file = file;
    let size = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(0))?;
    tracing::trace!(fd = file.as_raw_fd(), size, "file");
    Ok(size)
}
