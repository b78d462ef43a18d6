// SPDX-License-Identifier: Apache-2.0
//! Scheduling and resource limits of a process. To raise some of them takes
//! privileges that a user namespace has not: there the agent sets them from
//! outside.

use libc::pid_t;
use nix::errno::Errno;

use super::plan::ProcessPlan;
use crate::sys::process;

/// Sets what `plan` says for `pid`; 0: for the caller.
///
/// # Errors
/// What was being done, and the kernel's answer.
pub fn apply(plan: &ProcessPlan, pid: pid_t) -> Result<(), (String, Errno)> {
    if let Some(attr) = plan.scheduler {
        process::sched_setattr(pid, attr).map_err(|errno| ("set scheduler".into(), errno))?;
    }
    if let Some(value) = plan.io_priority {
        process::ioprio_set(pid, value).map_err(|errno| ("set I/O priority".into(), errno))?;
    }
    for (resource, soft, hard) in &plan.rlimits {
        process::setrlimit(pid, *resource, *soft, *hard)
            .map_err(|errno| (format!("set resource limit {resource}"), errno))?;
    }
    Ok(())
}
