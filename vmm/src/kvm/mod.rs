// SPDX-License-Identifier: Apache-2.0
//! The kernel's virtual machine: memory slots, interrupts, vCPUs.

pub mod exits;
pub mod gathered;
pub mod state;
pub mod vcpu;
pub mod vm;

/// KVM refused a step.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// A call failed.
    #[error("KVM: {step}")]
    Failed {
        /// What was tried.
        step: &'static str,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A saved state does not fit this host.
    #[error("KVM: {what}: {why}")]
    Unfit {
        /// Which part.
        what: &'static str,
        /// Why not.
        why: String,
    },
}

impl KvmError {
    /// A saved part that does not fit.
    pub(crate) fn unfit(what: &'static str, why: impl Into<String>) -> Self {
        Self::Unfit {
            what,
            why: why.into(),
        }
    }
}

/// For `map_err`: names the step.
pub(crate) fn failed(step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Failed { step, source }
}
