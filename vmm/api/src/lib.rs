// SPDX-License-Identifier: Apache-2.0
//! Control protocol of `bulkhead-vmm`.
//!
//! One Unix SEQPACKET socket, inherited by the VMM (`--control-fd N`). Every
//! packet is one JSON message; descriptors travel beside it as SCM_RIGHTS and
//! are named in the message by their index ([`FdIndex`]). The client sends
//! [`Request`]s and gets one [`Reply`] for each, in order; the VMM sends
//! [`Event`]s at any time. The end of the connection ends the VMM.
//!
//! `configure` and `boot` may be sent back to back: starting a VM costs one
//! wake-up of the client.

#![deny(unsafe_code)] // channel::sys alone takes descriptors over

mod channel;

pub use channel::{Channel, ChannelError};
use serde::{Deserialize, Serialize};

/// Largest message in bytes, either way.
pub const MAX_MESSAGE: usize = 64 * 1024;

/// Most descriptors beside one message (the kernel's SCM_MAX_FD is 253).
pub const MAX_FDS: usize = 64;

/// Index of a descriptor among those passed with the same message.
pub type FdIndex = u32;

/// A packet from client to VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Echoed in the reply.
    pub id: u64,
    /// What to do.
    pub call: Call,
}

/// What the client asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Call {
    /// Describes the VM; once, before `boot`.
    Configure(Box<VmConfig>),
    /// Builds the VM and lets it run.
    Boot,
    /// Asks for state, timeline and counters; at any time.
    Status,
    /// Asks the guest to give so much memory back, or to take it again; it
    /// takes its time, and may not give all. Needs a balloon.
    Balloon(BalloonTarget),
    /// Stops the vCPUs and the devices where they are. The reply comes when
    /// all of them rest; then nothing changes guest memory.
    Pause,
    /// Lets a paused VM, or one just restored, go on.
    Resume,
    /// Writes a paused VM to two files; it stays paused.
    Snapshot(SnapshotFiles),
    /// Builds a VM from a snapshot, instead of `configure` and `boot`. It is
    /// paused until `resume`.
    Restore(Box<RestoreConfig>),
    /// Puts a device on the PCI bus of a VM that runs or rests. The guest finds
    /// it when it looks at the bus again (`/sys/bus/pci/rescan` of Linux), for
    /// which the client is to see; several may be plugged before that. Answered
    /// by [`Outcome::Plugged`].
    Plug(Box<PlugConfig>),
    /// Takes a device off the bus that the guest has let go of (`remove` of
    /// Linux's device). One that it uses stays, and the call fails with
    /// [`FailureKind::WrongState`].
    Unplug(UnplugTarget),
    /// Stops the VM now, without the guest's help. The reply comes before
    /// the process ends with [`ExitReason::Stopped`].
    Shutdown,
}

/// A packet from VMM to client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum FromVmm {
    /// Answers the request of the same id.
    Reply(Reply),
    /// Something happened.
    Event(Event),
}

/// Answer to one [`Request`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reply {
    /// The request's id; 0 where the request could not be read.
    pub id: u64,
    /// What came of it.
    pub outcome: Outcome,
}

/// What came of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Outcome {
    /// Done; nothing to say.
    Done,
    /// Answer to `status`.
    Status(Box<Status>),
    /// Answer to `plug`.
    Plugged(PluggedDevice),
    /// Not done.
    Failed(Failure),
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Failure {
    /// For the program.
    pub kind: FailureKind,
    /// For the person: names the field or step, and the cause.
    pub message: String,
}

/// Kinds of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The message cannot be read or a value is out of range.
    InvalidRequest,
    /// Not in this state (boot before configure, second boot).
    WrongState,
    /// The kernel image, an image file or a descriptor is not usable.
    BadResource,
    /// KVM refused.
    Kvm,
    /// Any other system call failed.
    System,
    /// Known, and not built yet.
    Unsupported,
}

/// The whole VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Virtual CPUs, 1 to 64.
    pub vcpus: u8,
    /// Guest memory in MiB, 32 to 1,048,576.
    pub memory_mib: u32,
    /// Whether the host may back all of the guest's memory by huge pages
    /// (transparent ones): a little faster, and a page the guest touches costs
    /// 2 MiB. The kernel's image, which is used as a whole, may be in any case.
    #[serde(default)]
    pub huge_pages: bool,
    /// Marks guest memory as mergeable (KSM). The descriptor is whatever makes
    /// sure that nobody else's memory is merged with it, a lock say: it stays
    /// open for as long as the memory is there. Then no part is in huge pages
    /// unless `huge_pages` says so. None: not mergeable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merge_group: Option<FdIndex>,
    /// What to boot.
    pub kernel: KernelConfig,
    /// Where the first serial port writes; none: nowhere. Never blocks the
    /// guest: what cannot be written at once is dropped and counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<FdIndex>,
    /// What is on the PCI bus.
    #[serde(default)]
    pub devices: DeviceConfigs,
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
    /// An uncompressed ELF kernel with a PVH note.
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Name in logs and status.
    pub id: String,
    /// Tap opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
    pub tap: FdIndex,
    /// The guest's hardware address.
    pub mac: [u8; 6],
    /// MTU told to the guest; none: not told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
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
}

/// Limits of a device. Requests beyond them wait.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimits {
    /// Bytes of data, both ways together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<Rate>,
    /// Requests.
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

/// Where a device was plugged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PluggedDevice {
    /// Its number on the bus, 1 to 31: the guest's PCI address is
    /// `0000:00:<number, two hexadecimal digits>.0`.
    pub slot: u8,
}

/// What to unplug.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnplugTarget {
    /// Its number on the bus.
    pub slot: u8,
}

/// A device on the PCI bus.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceStatus {
    /// Its number on the bus.
    pub slot: u8,
    /// What it is.
    pub kind: DeviceKind,
    /// Its name or tag; empty where its kind has none.
    pub id: String,
    /// What it has done since it was plugged.
    #[serde(default)]
    pub metrics: DeviceMetrics,
}

/// What a device has done. A request is a chain of buffers or a packet, whatever
/// the device's queues carry.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceMetrics {
    /// Requests and packets, both ways.
    pub requests: u64,
    /// Bytes written to a disk, sent as packets or as file requests.
    pub bytes_from_guest: u64,
    /// Bytes read, received or answered.
    pub bytes_to_guest: u64,
    /// Requests that failed, and packets that were lost.
    pub errors: u64,
    /// How often a request had to wait for the device's limits.
    pub throttled: u64,
    /// How often the guest told of something.
    pub notifications: u64,
    /// How often it was told.
    pub interrupts: u64,
}

/// Kinds of devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    /// Persistent memory.
    Pmem,
    /// A shared directory.
    Fs,
    /// vsock.
    Vsock,
    /// A network interface.
    Net,
    /// A disk.
    Blk,
    /// Entropy.
    Rng,
    /// The balloon.
    Balloon,
}

impl DeviceKind {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Pmem,
        Self::Fs,
        Self::Vsock,
        Self::Net,
        Self::Blk,
        Self::Rng,
        Self::Balloon,
    ];

    /// Its field in a configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pmem => "pmem",
            Self::Fs => "fs",
            Self::Vsock => "vsock",
            Self::Net => "net",
            Self::Blk => "blk",
            Self::Rng => "rng",
            Self::Balloon => "balloon",
        }
    }

    /// Device id (virtio 1.2 §5).
    pub const fn virtio_id(self) -> u16 {
        match self {
            Self::Net => 1,
            Self::Blk => 2,
            Self::Rng => 4,
            Self::Balloon => 5,
            Self::Vsock => 19,
            Self::Fs => 26,
            Self::Pmem => 27,
        }
    }
}

/// How large the balloon is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonTarget {
    /// MiB that the guest gives, less than it has.
    pub mib: u32,
}

/// How the balloon stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonStatus {
    /// MiB that the guest was asked for.
    pub target_mib: u32,
    /// MiB that the guest says it gave.
    pub actual_mib: u32,
    /// Bytes given back to the host so far, by both ways; what the guest took
    /// again is not taken off.
    pub returned: u64,
    /// What the guest last told; each answer asks it for new ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub statistics: Option<BalloonStatistics>,
}

/// A guest's memory as its kernel counts it, in bytes where nothing else is
/// said; none: it does not tell. Told by the guest, and only as true as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonStatistics {
    /// Swapped in since boot.
    pub swapped_in: Option<u64>,
    /// Swapped out since boot.
    pub swapped_out: Option<u64>,
    /// Page faults with disk I/O since boot, in number.
    pub major_faults: Option<u64>,
    /// Page faults without, in number.
    pub minor_faults: Option<u64>,
    /// Not used for anything.
    pub free: Option<u64>,
    /// All that it has.
    pub total: Option<u64>,
    /// What programs could have without swapping.
    pub available: Option<u64>,
    /// Caches that can be dropped.
    pub caches: Option<u64>,
    /// Processes killed for want of memory, in number.
    pub oom_kills: Option<u64>,
}

/// Answer to `status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Status {
    /// Where the VM is in its life.
    pub state: VmState,
    /// When things happened.
    pub timeline: Timeline,
    /// vCPU exits handled in user space, all vCPUs together.
    pub exits: Exits,
    /// The same of each vCPU.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vcpus: Vec<Exits>,
    /// The balloon, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonStatus>,
    /// What is on the PCI bus, of a VM that has been built.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DeviceStatus>,
}

/// States of the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Nothing known yet.
    Unconfigured,
    /// Configured, not running.
    Configured,
    /// Running.
    Running,
    /// Paused, or restored and not yet resumed.
    Paused,
    /// Ended; the process is about to exit.
    Ended,
}

/// Stamps of CLOCK_MONOTONIC in microseconds; none: has not happened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Timeline {
    /// `main` was entered.
    pub vmm_start: Option<u64>,
    /// The configuration was accepted.
    pub configured: Option<u64>,
    /// Just before the first KVM_RUN: the kernel's entry.
    pub kernel_entry: Option<u64>,
    /// First connection to the ready port.
    pub guest_ready: Option<u64>,
    /// The guest's kernel read the VM generation id: of a clone, its random
    /// numbers are its own from here on.
    pub generation_read: Option<u64>,
}

/// vCPU exits handled in user space, by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exits {
    /// Port I/O.
    pub pio: u64,
    /// Memory-mapped I/O.
    pub mmio: u64,
    /// All others.
    pub other: u64,
}

/// Something the VMM tells unasked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Event {
    /// The guest connected to the ready port for the first time. Carries the
    /// timeline, so that nobody needs to ask for it.
    GuestReady(Timeline),
    /// The kernel of a restored guest has read its new VM generation id.
    GenerationRead,
    /// The guest's kernel panicked (pvpanic); the VM ends next.
    GuestPanicked,
    /// The VM has ended; the process exits with this reason's code.
    Ended(ExitReason),
}

/// Why a VM, and with it the process, ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// The guest powered itself off (ACPI S5).
    PowerOff,
    /// The client asked (`shutdown`).
    Stopped,
    /// The guest asked for a reset (ACPI reset register, keyboard controller).
    Reset,
    /// The guest's kernel panicked.
    Panic,
    /// A vCPU triple-faulted or KVM shut it down.
    TripleFault,
    /// KVM could not go on (internal error, failed entry).
    KvmError,
    /// The VMM itself failed (bad start, a device thread that panicked).
    VmmError,
    /// The control connection ended: the client is gone.
    ClientGone,
}

impl ExitReason {
    /// The process's exit code for this reason.
    pub const fn code(self) -> i32 {
        match self {
            Self::PowerOff | Self::Stopped => 0,
            Self::VmmError => 1,
            Self::Reset => 10,
            Self::Panic => 11,
            Self::TripleFault => 12,
            Self::KvmError => 13,
            Self::ClientGone => 14,
        }
    }

    /// The reason an exit code stands for; none for a code that no reason has.
    pub const fn from_code(code: i32) -> Option<Self> {
        match code {
            0 => Some(Self::PowerOff),
            1 => Some(Self::VmmError),
            10 => Some(Self::Reset),
            11 => Some(Self::Panic),
            12 => Some(Self::TripleFault),
            13 => Some(Self::KvmError),
            14 => Some(Self::ClientGone),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_wire() {
        let request = Request {
            id: 7,
            call: Call::Configure(Box::new(VmConfig {
                vcpus: 1,
                memory_mib: 128,
                huge_pages: false,
                merge_group: None,
                kernel: KernelConfig {
                    image: 0,
                    cmdline: "quiet".into(),
                    initrd: None,
                },
                serial: Some(1),
                devices: DeviceConfigs::default(),
            })),
        };
        let text = serde_json::to_string(&request).unwrap();
        assert_eq!(serde_json::from_str::<Request>(&text).unwrap(), request);
    }

    #[test]
    fn unknown_fields_are_refused() {
        let text = r#"{"id":1,"call":{"configure":{"vcpus":1,"cores":2}}}"#;
        assert!(serde_json::from_str::<Request>(text).is_err());
    }

    #[test]
    fn exit_codes_tell_the_reason() {
        for code in 0..256 {
            if let Some(reason) = ExitReason::from_code(code) {
                assert_eq!(reason.code(), code);
            }
        }
    }
}
