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
mod config;
mod status;

pub use channel::{Channel, ChannelError};
pub use config::*;
use serde::{Deserialize, Serialize};
pub use status::*;

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
    /// Asks the guest to have so much memory beyond what it booted with, or to
    /// give it back; it takes its time, and may not do all of it:
    /// [`Status::memory`] tells. Memory that was given back is the host's at
    /// once; asked again for the same, the VMM gives up the address space as
    /// well. Needs a mem device.
    Memory(MemoryTarget),
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
                pages: Pages::Transparent,
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
