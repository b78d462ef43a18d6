// SPDX-License-Identifier: Apache-2.0
//! What a machine and its devices are to be.

use serde::{Deserialize, Serialize};

use crate::FdIndex;

/// The whole VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Virtual CPUs, 1 to 64.
    pub vcpus: u8,
    /// Guest memory in MiB, 32 to 1,048,576.
    pub memory_mib: u32,
    /// Which of the host's pages guest memory is in.
    #[serde(default)]
    pub pages: Pages,
    /// Marks guest memory as mergeable (KSM). The descriptor is whatever makes
    /// sure that nobody else's memory is merged with it, a lock say: it stays
    /// open for as long as the memory is there. Then no part is in huge pages
    /// unless `pages` says so; reserved ones are never merged, and refused. None: not
    /// mergeable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merge_group: Option<FdIndex>,
    /// What to boot.
    pub kernel: KernelConfig,
    /// Where the first serial port writes; none: nowhere. Never blocks the
    /// guest: what cannot be written at once is dropped and counted. A file gets
    /// 16 MiB, and then a line that says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<FdIndex>,
    /// What is on the PCI bus.
    #[serde(default)]
    pub devices: DeviceConfigs,
}

/// Which of the host's pages guest memory is in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pages {
    /// Of 4 KiB. What the guest's boot fills, the kernel's image and the end of
    /// memory, may be in huge ones as by `Transparent`, unless memory is mergeable.
    #[default]
    Small,
    /// Huge ones where the host has some (transparent huge pages): a little faster,
    /// and a page that the guest touches costs 2 MiB. Needs `madvise` or `always` in
    /// `/sys/kernel/mm/transparent_hugepage/enabled`.
    Transparent,
    /// Huge ones of 2 MiB that the host keeps for this (hugetlb pages,
    /// `/proc/sys/vm/nr_hugepages`): all of them are the VM's from its start on, or
    /// it does not start. Memory is a multiple of 2 MiB. None of it goes back to
    /// the host while the VM is there: free page reporting is refused, and so are
    /// a balloon's targets. The [`MemConfig`] device's parts are in such pages, too,
    /// and go back as a whole.
    Huge,
}

impl Pages {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Small, Self::Transparent, Self::Huge];

    /// Its name in a configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Small => "small",
            Self::Transparent => "transparent",
            Self::Huge => "huge",
        }
    }
}

/// The devices on the PCI bus, in this order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceConfigs {
    /// Persistent memory devices, in PCI order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pmem: Vec<PmemConfig>,
    /// Shared directories.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fs: Vec<FsConfig>,
    /// The vsock device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// Network interfaces.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub net: Vec<NetConfig>,
    /// Block devices.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub blk: Vec<BlkConfig>,
    /// Whether the guest gets an entropy device.
    #[serde(default = "yes")]
    pub rng: bool,
    /// The memory balloon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// Memory that comes and goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem: Option<MemConfig>,
    /// A console and a log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<ConsoleConfig>,
}

impl Default for DeviceConfigs {
    /// An entropy device, as where nothing is said.
    fn default() -> Self {
        Self {
            pmem: Vec::new(),
            fs: Vec::new(),
            vsock: None,
            net: Vec::new(),
            blk: Vec::new(),
            rng: yes(),
            balloon: None,
            mem: None,
            console: None,
        }
    }
}

fn yes() -> bool {
    true
}

/// Where a snapshot lies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotFiles {
    /// vCPUs, interrupt controllers, clocks and devices. Emptied before it is
    /// written.
    pub state: FdIndex,
    /// Guest memory, one file of its size with holes where pages were never
    /// touched or are zero. Emptied before it is written. A restored VM maps
    /// it privately: it must not change as long as one runs.
    pub memory: FdIndex,
}

/// What a restored VM gets in place of what the snapshot's VM had. Devices
/// must be as many of each kind, those plugged later included, and those of a
/// kind in the order of their slots; names, paths, taps, files and directories
/// may be others.
///
/// Its memory is a private mapping of the snapshot's memory file, whatever pages
/// the snapshot's VM had: of the file's pages (huge ones only where the file lies
/// on a file system that has them, a tmpfs with `huge=`), and of small ones where
/// the guest has written, of which the host's kernel makes no huge ones. Hence no
/// [`Pages`] can be chosen here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreConfig {
    /// The snapshot; both files are only read.
    pub snapshot: SnapshotFiles,
    /// As [`VmConfig::serial`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<FdIndex>,
    /// Each pmem file must have the size it had. The guest's vsock connections
    /// are reset, and its context id may be another. It keeps the hardware
    /// address and MTU of its net devices. It is told when a disk has another
    /// size.
    #[serde(default)]
    pub devices: DeviceConfigs,
}

/// What to boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelConfig {
    /// An ELF kernel with a PVH note, or a bzImage.
    pub image: FdIndex,
    /// Command line, at most 2,047 bytes, no NUL and no newline.
    pub cmdline: String,
    /// An initial ramdisk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<FdIndex>,
}

/// virtio-pmem (virtio 1.2 §5.19): the file is the device's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemConfig {
    /// Name in logs and status.
    pub id: String,
    /// The file; its size must be a multiple of 2 MiB.
    pub file: FdIndex,
    /// Guest writes never reach the file.
    pub read_only: bool,
}

/// virtio-fs (virtio 1.2 §5.11), served inside the VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    /// Mount tag, 1 to 36 bytes.
    pub tag: String,
    /// The directory (an `O_PATH` or `O_DIRECTORY` descriptor).
    pub directory: FdIndex,
    /// Attribute and page cache policy.
    #[serde(default)]
    pub cache: FsCache,
    /// MiB of guest-physical memory where the guest can have the host's page
    /// cache of files instead of a copy of its own (the DAX window, virtio 1.2
    /// §5.11.6.2), a multiple of 2; none: 0. Linux takes it if the directory is
    /// mounted with `dax=always`.
    #[serde(default)]
    pub dax_mib: u32,
    /// Whether what the guest's processes lock (`fcntl` and `flock`) is locked on the
    /// host: others that have the directory, guests or the host's programs, are
    /// kept out, and keep out. False: locks hold within the guest, and cost no
    /// request.
    ///
    /// Locks that wait are tried again up to 160 ms after others of the host let go;
    /// nobody looks for deadlocks. A process of Linux that waits for a lock cannot be
    /// killed before it has it: its driver tells nobody of signals.
    #[serde(default)]
    pub host_locks: bool,
}

/// virtio-fs cache policy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FsCache {
    /// Nothing cached: the host's changes show at once.
    Never,
    /// Metadata for a second, data until the file is opened again.
    #[default]
    Auto,
    /// Only the guest changes the directory.
    Always,
}

/// virtio-vsock (virtio 1.2 §5.10) behind Unix stream sockets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id, 3 or higher.
    pub cid: u32,
    /// Listening Unix stream socket for connections to the guest; the client
    /// writes `CONNECT <port>\n` and reads `OK <host port>\n`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listener: Option<FdIndex>,
    /// Connections of the guest to host port P go to the Unix socket at
    /// `<uds_path>_<P>`; refused where there is none.
    pub uds_path: String,
    /// The guest's first connection to this host port is reported as
    /// [`Event::GuestReady`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_port: Option<u32>,
}

/// virtio-net (virtio 1.2 §5.1) on a tap.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Name in logs and status.
    pub id: String,
    /// Tap opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
    pub tap: FdIndex,
    /// Further queues of the same tap, all of which were opened with
    /// `IFF_MULTI_QUEUE`, too; 7 at most. For each the guest gets another pair of
    /// queues. A restored VM has as many as it had.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub more_queues: Vec<FdIndex>,
    /// The guest's hardware address.
    pub mac: [u8; 6],
    /// MTU told to the guest; none: not told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// How much the guest may send; none: as much as the host takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transmit_rate: Option<RateLimits>,
    /// How much it may get; none: as much as it takes. What has to wait does so
    /// in the tap, which drops what it has no room for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receive_rate: Option<RateLimits>,
    /// An open /dev/vhost-net of its own: the host's kernel moves the packets, and
    /// does not count them. Not with limits, nor with several queues. Where the
    /// kernel cannot (it takes 64 parts of guest memory), the VMM says so in its
    /// log and does it itself. Who passes it should close it: guest memory is there
    /// for as long as it is open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost: Option<FdIndex>,
}

/// virtio-blk (virtio 1.2 §5.2) on a raw file or block device. What the guest
/// discards is punched out of the file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlkConfig {
    /// Name in logs and status, and the serial number the guest reads (20
    /// bytes at most).
    pub id: String,
    /// The file; its size must be a multiple of 512.
    pub file: FdIndex,
    /// The guest cannot write.
    pub read_only: bool,
    /// Request queues, 1 to 16; none: 1. A restored VM has as many as it had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// How fast the guest may be; none: as fast as the host is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<RateLimits>,
    /// Who serves requests; none: the synchronous engine, which takes nothing to
    /// start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<BlkEngine>,
}

/// What serves a disk's requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BlkEngine {
    /// The VMM itself, one request after another.
    #[default]
    Sync,
    /// The host's kernel, many at once. Where it does not let the VMM have a
    /// ring (`kernel.io_uring_disabled`), the VMM says so in its log and serves
    /// the disk itself.
    IoUring,
}

/// Limits of a device. Requests, or packets, beyond them wait.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimits {
    /// Bytes of data; a disk's both ways together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<Rate>,
    /// Requests, or packets, of which one that is cut into segments later counts
    /// once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operations: Option<Rate>,
}

/// One limit: a bucket of tokens that fills steadily.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Tokens that come in a second, at least 1.
    pub per_second: u64,
    /// Tokens that it holds, at least 1: what may be used at once after a rest.
    /// A request is let through whole while there is one left.
    pub burst: u64,
}

/// virtio-balloon (virtio 1.2 §5.5).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonConfig {
    /// The guest takes pages of the balloon rather than kill a process.
    #[serde(default = "yes")]
    pub deflate_on_oom: bool,
    /// The guest reports free memory by itself, and the host has it back.
    #[serde(default = "yes")]
    pub free_page_reporting: bool,
}

impl Default for BalloonConfig {
    fn default() -> Self {
        Self {
            deflate_on_oom: yes(),
            free_page_reporting: yes(),
        }
    }
}

/// virtio-mem (virtio 1.2 §5.15): memory beyond [`VmConfig::memory_mib`], none
/// at first. See [`Call::Memory`](crate::Call::Memory).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemConfig {
    /// MiB that it can become, a multiple of 128. A restored VM has what it had.
    pub max_mib: u32,
}

/// virtio-console (virtio 1.2 §5.3) with two ports: a console (`hvc0` of Linux) and
/// one named `log` (`/dev/vport*p1`), by which the guest only writes. What it
/// writes to one without a descriptor is nobody's.
///
/// The descriptors are made non-blocking. How much the guest writes to them is
/// not limited.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleConfig {
    /// Where the console's output goes: a file, pipe, terminal or socket. What it
    /// does not take at once is dropped and counted ([`DeviceMetrics::errors`](crate::DeviceMetrics::errors)), as of
    /// [`VmConfig::serial`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<FdIndex>,
    /// Whether what can be read there is the console's input: of a terminal or
    /// socket. It waits there for as long as the guest takes none.
    #[serde(default)]
    pub input: bool,
    /// Where the log goes. What it does not take at once waits in the guest, as do
    /// those who write more; it is dropped and counted once nobody can read it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log: Option<FdIndex>,
}

/// A device to plug, with the descriptors of its configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum PlugConfig {
    /// Persistent memory.
    Pmem(PmemConfig),
    /// A shared directory. Only for a VM that was started with one, whose
    /// thread serves the others, too. The directory is used as it is passed:
    /// its mount should be a copy that is attached nowhere (`open_tree` with
    /// `OPEN_TREE_CLONE`), so that nothing above it can be reached by it.
    Fs(FsConfig),
    /// A network interface.
    Net(NetConfig),
    /// A disk.
    Blk(BlkConfig),
}
