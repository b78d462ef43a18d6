// SPDX-License-Identifier: Apache-2.0
//! The kernel's virtual machine: memory slots, interrupts, vCPUs.

pub mod irq;
pub mod vcpu;
pub mod vm;

/// KVM refused a step.
#[derive(Debug, thiserror::Error)]
#[error("KVM: {step}")]
pub struct KvmError {
    /// What was tried.
    pub step: &'static str,
    /// What KVM said.
    #[source]
    pub source: kvm_ioctls::Error,
}

/// For `map_err`: names the step.
pub(crate) fn failed(step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError { step, source }
}
