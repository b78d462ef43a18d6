// SPDX-License-Identifier: Apache-2.0
//! seccomp profiles (runtime-spec config-linux.md, "Seccomp"), compiled to
//! classic BPF without a C library.
//!
//! Guests run x86_64 programs only: the kernel has neither the i386 nor the
//! x32 ABI, so rules for those architectures have nothing to apply to.

mod compile;
mod profile;
mod table;

use std::os::fd::OwnedFd;

use bulkhead_agent_protocol::oci;

pub use profile::Listener;

use crate::error::{AgentError, Result};
use crate::sys::process::seccomp_filter;

/// A compiled profile.
#[derive(Debug)]
pub struct Filter {
    flags: libc::c_ulong,
    program: Vec<libc::sock_filter>,
    /// Who is asked about calls, where the profile names one.
    pub listener: Option<Listener>,
}

impl Filter {
    /// Applies the filter to the calling thread, for good. Gives the listener's
    /// descriptor where there is to be one.
    ///
    /// # Errors
    /// EACCES without CAP_SYS_ADMIN and without no_new_privs.
    pub fn install(&self) -> nix::Result<Option<OwnedFd>> {
        seccomp_filter(self.flags, &self.program, self.listener.is_some())
    }
}

/// Compiles a profile.
///
/// # Errors
/// [`AgentError::Invalid`] naming the field.
pub fn compile(profile: &oci::Seccomp) -> Result<Filter> {
    let profile = profile::translate(profile)?;
    let program = compile::compile(&profile)
        .map_err(|_| AgentError::Invalid("linux.seccomp: the profile is too big".into()))?;
    Ok(Filter {
        flags: profile.flags,
        program,
        listener: profile.listener,
    })
}
