// SPDX-License-Identifier: Apache-2.0
//! Virtual machines: what the sandbox needs of one, and the drivers.

mod error;

use std::fmt;

use bulkhead_vmm_api::ExitReason;

pub use self::error::HypervisorError;

/// How a virtual machine's process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ending {
    /// Why, as far as the VMM could tell.
    pub reason: Option<ExitReason>,
    /// The signal that ended the process.
    pub signal: Option<i32>,
    /// The last lines that the VMM wrote to its standard error.
    pub stderr: String,
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("virtual machine ended: ")?;
        match (self.signal, self.reason) {
            (Some(signal), _) => write!(f, "killed by signal {signal}")?,
            (None, Some(reason)) => f.write_str(describe(reason))?,
            (None, None) => f.write_str("for an unknown reason")?,
        }
        if !self.stderr.is_empty() {
            write!(f, "; it said: {}", self.stderr)?;
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
