// SPDX-License-Identifier: Apache-2.0
//! Virtual machines: what the sandbox needs of one, and the drivers.

pub mod bulkhead;
pub mod cmdline;
pub mod console;
mod error;
pub(crate) mod tail;

use std::{fmt, os::fd::OwnedFd, path::PathBuf, time::Duration};

use async_trait::async_trait;
use bulkhead_vmm_api::{ExitReason, Pages, Timeline};
use tokio::sync::watch;

pub use self::error::HypervisorError;

/// A virtual machine to be booted. Everything it uses is handed over open.
#[derive(Debug)]
pub struct Machine {
    /// Virtual processors, with those that the guest does not use at first.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// MiB that it may become more; 0: it stays as it is.
    pub extra_memory_mib: u32,
    /// Which of the host's pages it is in.
    pub pages: Pages,
    /// Whether the guest has a balloon that gives free memory back.
    pub free_page_reporting: bool,
    /// MiB of the shared directory's DAX window; 0: none.
    pub dax_mib: u32,
    /// Whether locks of files of the shared directory are the host's.
    pub host_locks: bool,
    /// What is to stay open while guest memory is mergeable; none: it is not.
    pub merge_group: Option<OwnedFd>,
    /// The guest kernel's command line.
    pub cmdline: String,
    /// The guest kernel.
    pub kernel: OwnedFd,
    /// The guest image, the first persistent memory device.
    pub image: OwnedFd,
    /// Where the serial console writes.
    pub console: OwnedFd,
    /// The directory shared with the guest.
    pub shared: OwnedFd,
    /// Sockets to and from the guest.
    pub vsock: Vsock,
    /// Network interfaces.
    pub nics: Vec<NicDevice>,
}

/// The vsock device.
#[derive(Debug)]
pub struct Vsock {
    /// Listening Unix socket for connections to the guest.
    pub listener: OwnedFd,
    /// Connections of the guest to port P go to the Unix socket `<path>_<P>`.
    pub path: PathBuf,
    /// The guest's first connection to this port means that it is ready.
    pub ready_port: u32,
}

/// One network interface.
#[derive(Debug)]
pub struct NicDevice {
    /// Name in logs.
    pub id: String,
    /// Tap with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
    pub tap: OwnedFd,
    /// The guest's hardware address.
    pub mac: [u8; 6],
    /// MTU in bytes.
    pub mtu: u16,
    /// /dev/vhost-net of its own: the host's kernel moves its packets.
    pub vhost: Option<OwnedFd>,
}

/// A process that runs one virtual machine.
#[async_trait]
pub trait Hypervisor: Send + Sync {
    /// Its process id on the host.
    fn pid(&self) -> u32;

    /// Builds the machine and lets it run; returns once it does.
    ///
    /// # Errors
    /// What is wrong with the machine, or why the process ended.
    async fn boot(&self, machine: Machine) -> Result<(), HypervisorError>;

    /// Plugs a network interface while the machine runs. The guest finds it when
    /// it looks at its bus again.
    ///
    /// # Errors
    /// There is no room for it, or why the process ended.
    async fn plug_nic(&self, nic: NicDevice) -> Result<(), HypervisorError>;

    /// Asks the guest to have so many MiB beyond what it booted with. It takes
    /// its time: [`Self::extra_memory`] tells.
    ///
    /// # Errors
    /// So much cannot be, or why the process ended.
    async fn set_extra_memory(&self, mib: u32) -> Result<(), HypervisorError>;

    /// MiB that the guest really has beyond what it booted with.
    ///
    /// # Errors
    /// Why the process ended.
    async fn extra_memory(&self) -> Result<u32, HypervisorError>;

    /// Changes from none once, when the process has ended.
    fn ending(&self) -> watch::Receiver<Option<Ending>>;

    /// When things happened, as far as is known.
    fn timeline(&self) -> Timeline;

    /// Ends the machine without the guest's help: asks, kills after
    /// `patience`, and returns when the process is gone.
    async fn shutdown(&self, patience: Duration);

    /// Kills the process.
    fn kill(&self);
}

/// How a virtual machine's process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ending {
    /// Why, as far as the VMM could tell.
    pub reason: Option<ExitReason>,
    /// The signal that ended the process.
    pub signal: Option<i32>,
    /// Its exit code.
    pub code: Option<i32>,
    /// The last lines that the VMM wrote to its standard error.
    pub stderr: String,
}

impl Ending {
    /// Whether somebody wanted this.
    pub fn is_orderly(&self) -> bool {
        self.signal.is_none()
            && matches!(
                self.reason,
                Some(ExitReason::PowerOff | ExitReason::Stopped)
            )
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the virtual machine has ended: ")?;
        match (self.signal, self.reason, self.code) {
            (Some(libc::SIGSYS), _, _) => f.write_str(
                "its VMM made a forbidden system call and was killed \
                 (the kernel's log names it: audit type=1326)",
            )?,
            (Some(signal), _, _) => write!(f, "its VMM was killed by signal {signal}")?,
            (None, Some(reason), _) => f.write_str(describe(reason))?,
            (None, None, Some(code)) => write!(f, "its VMM exited with code {code}")?,
            (None, None, None) => f.write_str("for an unknown reason")?,
        }
        if !self.is_orderly() && !self.stderr.is_empty() {
            write!(f, "; the VMM said: {}", self.stderr)?;
        }
        Ok(())
    }
}

fn describe(reason: ExitReason) -> &'static str {
    match reason {
        ExitReason::PowerOff => "the guest powered off",
        ExitReason::Stopped => "it was stopped",
        ExitReason::Reset => "the guest asked for a reset",
        ExitReason::Panic => "the guest's kernel panicked",
        ExitReason::TripleFault => "the guest triple-faulted",
        ExitReason::KvmError => "KVM could not run the guest",
        ExitReason::VmmError => "the VMM failed",
        ExitReason::ClientGone => "its control connection was lost",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forbidden_system_call_is_told_as_such() {
        let ending = Ending {
            reason: None,
            signal: Some(libc::SIGSYS),
            code: None,
            stderr: String::new(),
        };
        assert!(!ending.is_orderly());
        let text = ending.to_string();
        assert!(text.contains("forbidden system call"), "{text}");
        let killed = Ending {
            signal: Some(libc::SIGKILL),
            ..ending
        };
        assert!(killed.to_string().contains("signal 9"), "{killed}");
    }
}
