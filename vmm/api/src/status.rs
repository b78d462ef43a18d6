// SPDX-License-Identifier: Apache-2.0
//! What a machine and its devices are and do.

use serde::{Deserialize, Serialize};

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
    /// Memory that comes and goes.
    Mem,
    /// A console and a log.
    Console,
}

impl DeviceKind {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Pmem,
        Self::Fs,
        Self::Vsock,
        Self::Net,
        Self::Blk,
        Self::Rng,
        Self::Balloon,
        Self::Mem,
        Self::Console,
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
            Self::Mem => "mem",
            Self::Console => "console",
        }
    }

    /// Device id (virtio 1.2 §5).
    pub const fn virtio_id(self) -> u16 {
        match self {
            Self::Net => 1,
            Self::Blk => 2,
            Self::Console => 3,
            Self::Rng => 4,
            Self::Balloon => 5,
            Self::Vsock => 19,
            Self::Mem => 24,
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

/// How much memory the guest is to have beyond what it booted with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryTarget {
    /// MiB, an even number, and at most the device's `max_mib`.
    pub mib: u32,
}

/// How the memory stands that comes and goes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryStatus {
    /// MiB that it can become.
    pub max_mib: u32,
    /// MiB that the guest was asked to have.
    pub target_mib: u32,
    /// MiB that it has.
    pub plugged_mib: u32,
    /// MiB that it can touch, right or wrong: whole slots.
    pub mapped_mib: u32,
    /// KVM's memory slots for it.
    pub slots: u32,
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
    /// The vCPUs' threads, for who sets their priority or affinity: ids in the
    /// VMM's pid namespace. Of a VM that has run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vcpu_threads: Vec<u32>,
    /// The balloon, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonStatus>,
    /// Memory that comes and goes, where there is such a device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryStatus>,
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
    /// The process sees and may do no more of the host than its devices need.
    #[serde(default)]
    pub jailed: Option<u64>,
    /// Guest memory is there: new, or a snapshot's.
    #[serde(default)]
    pub memory_mapped: Option<u64>,
    /// So are vCPUs and devices; and the kernel, where one is booted.
    #[serde(default)]
    pub assembled: Option<u64>,
    /// They have the snapshot's state, where there is one.
    #[serde(default)]
    pub restored: Option<u64>,
    /// Just before the first KVM_RUN: the kernel's entry.
    pub kernel_entry: Option<u64>,
    /// First connection to the ready port.
    pub guest_ready: Option<u64>,
    /// The guest's kernel read the VM generation id: of a clone, its random
    /// numbers are its own from here on.
    pub generation_read: Option<u64>,
}

/// vCPU exits handled in user space, by kind. Triple faults, most of KVM's events,
/// failed entries and errors end the VM: its log says more of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exits {
    /// Port I/O.
    pub pio: u64,
    /// Memory-mapped I/O.
    pub mmio: u64,
    /// A signal took it out of the guest: a pause, say.
    #[serde(default)]
    pub interrupted: u64,
    /// It was not to run yet (EAGAIN).
    #[serde(default)]
    pub again: u64,
    /// It waits for an interrupt; only where KVM does not do that itself.
    #[serde(default)]
    pub halts: u64,
    /// It can take an interrupt now.
    #[serde(default)]
    pub irq_windows: u64,
    /// Triple faults.
    #[serde(default)]
    pub shutdowns: u64,
    /// The guest's powering off, resets and crashes, told by KVM.
    #[serde(default)]
    pub system_events: u64,
    /// The processor did not enter the guest.
    #[serde(default)]
    pub failed_entries: u64,
    /// KVM could not emulate what the guest did.
    #[serde(default)]
    pub internal_errors: u64,
    /// KVM_RUN failed.
    #[serde(default)]
    pub errors: u64,
    /// All others.
    pub other: u64,
}

impl std::iter::Sum for Exits {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, exits| Self {
            pio: sum.pio + exits.pio,
            mmio: sum.mmio + exits.mmio,
            interrupted: sum.interrupted + exits.interrupted,
            again: sum.again + exits.again,
            halts: sum.halts + exits.halts,
            irq_windows: sum.irq_windows + exits.irq_windows,
            shutdowns: sum.shutdowns + exits.shutdowns,
            system_events: sum.system_events + exits.system_events,
            failed_entries: sum.failed_entries + exits.failed_entries,
            internal_errors: sum.internal_errors + exits.internal_errors,
            errors: sum.errors + exits.errors,
            other: sum.other + exits.other,
        })
    }
}
