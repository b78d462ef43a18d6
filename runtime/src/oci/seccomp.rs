// SPDX-License-Identifier: Apache-2.0
//! A seccomp profile (config-linux.md, "Seccomp") for the agent.

use bulkhead_agent_protocol::oci;
use oci_spec::runtime::LinuxSeccomp;

use super::{name, SpecError};

/// Translates a profile.
///
/// # Errors
/// A value that does not fit, naming the field.
pub fn seccomp(profile: &LinuxSeccomp) -> Result<oci::Seccomp, SpecError> {
    let mut out = oci::Seccomp {
        default_action: name(&profile.default_action()),
        default_errno_ret: profile.default_errno_ret(),
        architectures: profile.architectures().iter().flatten().map(name).collect(),
        flags: profile.flags().iter().flatten().map(name).collect(),
        listener_path: match profile.listener_path() {
            Some(path) => path.to_string_lossy().into_owned(),
            None => String::new(),
        },
        listener_metadata: profile.listener_metadata().clone().unwrap_or_default(),
        ..Default::default()
    };
    for rule in profile.syscalls().iter().flatten() {
        let mut syscall = oci::Syscall {
            names: rule.names().clone(),
            action: name(&rule.action()),
            errno_ret: rule.errno_ret(),
            ..Default::default()
        };
        for arg in rule.args().iter().flatten() {
            syscall.args.push(oci::SyscallArg {
                index: u32::try_from(arg.index()).map_err(|_| {
                    SpecError::field("linux.seccomp.syscalls.args.index", "is out of range")
                })?,
                value: arg.value(),
                value_two: arg.value_two().unwrap_or(0),
                op: name(&arg.op()),
                ..Default::default()
            });
        }
        out.syscalls.push(syscall);
    }
    Ok(out)
}
