// SPDX-License-Identifier: Apache-2.0
//! A process of the specification (config.md, "Process"), checked and
//! translated.

use std::collections::HashSet;
use std::ffi::CString;
use std::path::PathBuf;

use bulkhead_agent_protocol::oci;
use nix::sched::CpuSet;

use super::{invalid, no_label};
use crate::container::caps;
use crate::error::Result;
use crate::sys::process::SchedAttr;

/// Capability sets as masks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Bounding set.
    pub bounding: u64,
    /// Effective set.
    pub effective: u64,
    /// Permitted set.
    pub permitted: u64,
    /// Inheritable set.
    pub inheritable: u64,
    /// Ambient set.
    pub ambient: u64,
}

/// A process to run.
#[derive(Clone, Debug)]
pub struct ProcessPlan {
    /// Arguments, the program's name first.
    pub args: Vec<CString>,
    /// Environment.
    pub env: Vec<CString>,
    /// Working directory in the container.
    pub cwd: PathBuf,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// File creation mask.
    pub umask: libc::mode_t,
    /// Capabilities.
    pub capabilities: Capabilities,
    /// Resource limits: number, soft, hard.
    pub rlimits: Vec<(libc::c_int, u64, u64)>,
    /// Whether set-uid programs are without effect.
    pub no_new_privileges: bool,
    /// Whether the process gets a terminal.
    pub terminal: bool,
    /// The terminal's size: rows, columns.
    pub console_size: Option<(u16, u16)>,
    /// Adjustment of the OOM killer's score.
    pub oom_score_adj: i32,
    /// Scheduling policy.
    pub scheduler: Option<SchedAttr>,
    /// I/O priority as ioprio_set(2) takes it.
    pub io_priority: Option<u32>,
    /// Execution domain.
    pub personality: Option<libc::c_ulong>,
    /// Processors to run on.
    pub affinity: Option<CpuSet>,
}

/// Checks and translates a process. A further process of a container
/// (`init` is given) keeps what its specification leaves out.
///
/// # Errors
/// [`crate::error::AgentError::Invalid`] naming the field.
pub fn process(process: &oci::Process, init: Option<&ProcessPlan>) -> Result<ProcessPlan> {
    if process.args.is_empty() {
        return Err(invalid("process.args: empty"));
    }
    if !process.cwd.starts_with('/') {
        return Err(invalid(format!(
            "process.cwd: {:?} is not absolute",
            process.cwd
        )));
    }
    no_label(&process.apparmor_profile, "process.apparmorProfile")?;
    no_label(&process.selinux_label, "process.selinuxLabel")?;
    let user = process.user.clone().unwrap_or_default();
    let capabilities = match (process.capabilities.as_ref(), init) {
        (Some(sets), _) => Capabilities {
            bounding: caps::mask(&sets.bounding),
            effective: caps::mask(&sets.effective),
            permitted: caps::mask(&sets.permitted),
            inheritable: caps::mask(&sets.inheritable),
            ambient: caps::mask(&sets.ambient),
        },
        (None, Some(init)) => init.capabilities,
        (None, None) => Capabilities::default(),
    };
    let console_size = match process.console_size.as_ref() {
        Some(size) => {
            let narrow = |value: u32| {
                u16::try_from(value)
                    .map_err(|_| invalid(format!("process.consoleSize: {value} is too big")))
            };
            Some((narrow(size.height)?, narrow(size.width)?))
        }
        None => None,
    };
    Ok(ProcessPlan {
        args: strings(&process.args, "process.args")?,
        env: strings(&process.env, "process.env")?,
        cwd: PathBuf::from(&process.cwd),
        uid: user.uid,
        gid: user.gid,
        groups: user.additional_gids.clone(),
        umask: user.umask.unwrap_or(0o022) & 0o777,
        capabilities,
        rlimits: match init {
            Some(init) if process.rlimits.is_empty() => init.rlimits.clone(),
            _ => rlimits(&process.rlimits)?,
        },
        no_new_privileges: process.no_new_privileges,
        terminal: process.terminal,
        console_size,
        oom_score_adj: match process.oom_score_adj {
            Some(value) if !(-1000..=1000).contains(&value) => {
                return Err(invalid(format!(
                    "process.oomScoreAdj: {value} is not within -1000 to 1000"
                )))
            }
            Some(value) => value,
            None => init.map_or(0, |init| init.oom_score_adj),
        },
        scheduler: scheduler(process.scheduler.as_ref())?
            .or_else(|| init.and_then(|init| init.scheduler)),
        io_priority: io_priority(process.io_priority.as_ref())?
            .or_else(|| init.and_then(|init| init.io_priority)),
        personality: init.and_then(|init| init.personality),
        // A container's first process has none by the specification.
        affinity: match init {
            Some(_) => affinity(process.exec_cpu_affinity.as_ref())?,
            None => None,
        },
    })
}

fn strings(list: &[String], field: &str) -> Result<Vec<CString>> {
    list.iter()
        .map(|text| {
            CString::new(text.as_str()).map_err(|_| invalid(format!("{field}: NUL in {text:?}")))
        })
        .collect()
}

fn rlimits(list: &[oci::Rlimit]) -> Result<Vec<(libc::c_int, u64, u64)>> {
    let mut seen = HashSet::new();
    list.iter()
        .map(|limit| {
            let number = caps::rlimit(&limit.type_)
                .ok_or_else(|| invalid(format!("process.rlimits: unknown {:?}", limit.type_)))?;
            if !seen.insert(number) {
                return Err(invalid(format!(
                    "process.rlimits: {} is there twice",
                    limit.type_
                )));
            }
            if limit.soft > limit.hard {
                return Err(invalid(format!(
                    "process.rlimits: {}: soft {} is more than hard {}",
                    limit.type_, limit.soft, limit.hard
                )));
            }
            Ok((number, limit.soft, limit.hard))
        })
        .collect()
}

fn scheduler(scheduler: Option<&oci::Scheduler>) -> Result<Option<SchedAttr>> {
    let Some(scheduler) = scheduler else {
        return Ok(None);
    };
    let policy = match scheduler.policy.as_str() {
        "SCHED_OTHER" => 0,
        "SCHED_FIFO" => 1,
        "SCHED_RR" => 2,
        "SCHED_BATCH" => 3,
        "SCHED_ISO" => 4,
        "SCHED_IDLE" => 5,
        "SCHED_DEADLINE" => 6,
        other => return Err(invalid(format!("process.scheduler.policy: {other:?}"))),
    };
    let mut flags = 0;
    for flag in &scheduler.flags {
        flags |= match flag.as_str() {
            "SCHED_FLAG_RESET_ON_FORK" => 0x01,
            "SCHED_FLAG_RECLAIM" => 0x02,
            "SCHED_FLAG_DL_OVERRUN" => 0x04,
            "SCHED_FLAG_KEEP_POLICY" => 0x08,
            "SCHED_FLAG_KEEP_PARAMS" => 0x10,
            "SCHED_FLAG_UTIL_CLAMP_MIN" => 0x20,
            "SCHED_FLAG_UTIL_CLAMP_MAX" => 0x40,
            other => return Err(invalid(format!("process.scheduler.flags: {other:?}"))),
        };
    }
    Ok(Some(SchedAttr {
        size: 0,
        policy,
        flags,
        nice: scheduler.nice,
        priority: u32::try_from(scheduler.priority)
            .map_err(|_| invalid("process.scheduler.priority: negative"))?,
        runtime: scheduler.runtime,
        deadline: scheduler.deadline,
        period: scheduler.period,
    }))
}

fn io_priority(priority: Option<&oci::IoPriority>) -> Result<Option<u32>> {
    let Some(priority) = priority else {
        return Ok(None);
    };
    let class = match priority.class.as_str() {
        "IOPRIO_CLASS_RT" => 1,
        "IOPRIO_CLASS_BE" => 2,
        "IOPRIO_CLASS_IDLE" => 3,
        other => return Err(invalid(format!("process.ioPriority.class: {other:?}"))),
    };
    match u32::try_from(priority.priority) {
        Ok(data @ 0..=7) => Ok(Some(class << 13 | data)),
        _ => Err(invalid(format!(
            "process.ioPriority.priority: {} is not within 0 to 7",
            priority.priority
        ))),
    }
}

/// The processors of a further process. It is born in its container's cgroup,
/// so what counts is where it is to end.
fn affinity(affinity: Option<&oci::CpuAffinity>) -> Result<Option<CpuSet>> {
    let Some(affinity) = affinity else {
        return Ok(None);
    };
    let initial = cpus(&affinity.initial, "process.execCPUAffinity.initial")?;
    let last = cpus(&affinity.final_, "process.execCPUAffinity.final")?;
    Ok(last.or(initial))
}

/// A list of processors such as `0-3,7`.
fn cpus(list: &str, field: &str) -> Result<Option<CpuSet>> {
    let wrong = || invalid(format!("{field}: {list:?} is not a list such as 0-3,7"));
    if list.is_empty() {
        return Ok(None);
    }
    let mut set = CpuSet::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| text.parse::<usize>().map_err(|_| wrong());
        let (first, last) = (number(first)?, number(last)?);
        if first > last || last >= CpuSet::count() {
            return Err(wrong());
        }
        for cpu in first..=last {
            set.set(cpu).map_err(|_| wrong())?;
        }
    }
    Ok(Some(set))
}

pub(super) fn personality(personality: Option<&oci::Personality>) -> Result<Option<libc::c_ulong>> {
    let Some(personality) = personality else {
        return Ok(None);
    };
    if !personality.flags.is_empty() {
        return Err(invalid("linux.personality.flags: none are supported"));
    }
    match personality.domain.as_str() {
        "LINUX" => Ok(Some(0)),
        "LINUX32" => Ok(Some(8)),
        other => Err(invalid(format!("linux.personality.domain: {other:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors() {
        let set = |list: &str| {
            let set = cpus(list, "field").ok()??;
            Some((0..64).filter(|cpu| set.is_set(*cpu).unwrap()).collect())
        };
        assert_eq!(set("0-2,5"), Some(vec![0, 1, 2, 5]));
        assert_eq!(set("3"), Some(vec![3]));
        for bad in ["", "3-1", "a", "1,", "-1", "0-99999999999", "1-2-3"] {
            assert_eq!(set(bad), None, "{bad}");
        }
    }

    #[test]
    fn limits_are_checked() {
        let limit = |soft, hard| oci::Rlimit {
            type_: "RLIMIT_NOFILE".into(),
            soft,
            hard,
            ..Default::default()
        };
        assert!(rlimits(&[limit(2, 1)]).is_err());
        assert!(rlimits(&[limit(1, 2), limit(1, 2)]).is_err());
        assert_eq!(
            rlimits(&[limit(1, 2)]).unwrap(),
            [(libc::RLIMIT_NOFILE as i32, 1, 2)]
        );
    }
}
