// SPDX-License-Identifier: Apache-2.0
//! A process of a specification (config.md, "Process") for the agent.

use bulkhead_agent_protocol::oci;
use oci_spec::runtime::{Capabilities, Process};
use serde_json::Value;

use super::{name, SpecError};

/// Translates a process.
///
/// Labels of AppArmor and SELinux are the host's: its policies do not exist in
/// the guest, whose kernel is the boundary here. They are left out.
///
/// # Errors
/// A value that does not fit, naming the field.
pub fn process(process: &Process) -> Result<oci::Process, SpecError> {
    let user = process.user();
    let mut out = oci::Process {
        terminal: process.terminal().unwrap_or(false),
        user: Some(oci::User {
            uid: user.uid(),
            gid: user.gid(),
            umask: user.umask(),
            additional_gids: user.additional_gids().clone().unwrap_or_default(),
            username: user.username().clone().unwrap_or_default(),
            ..Default::default()
        })
        .into(),
        args: process.args().clone().unwrap_or_default(),
        env: process.env().clone().unwrap_or_default(),
        cwd: process.cwd().to_string_lossy().into_owned(),
        no_new_privileges: process.no_new_privileges().unwrap_or(false),
        oom_score_adj: process.oom_score_adj(),
        ..Default::default()
    };
    if out.args.is_empty() {
        return Err(SpecError::field("process.args", "is empty"));
    }
    if let Some(size) = process.console_size() {
        let narrow = |value: u64, field: &str| {
            u32::try_from(value).map_err(|_| {
                SpecError::field(
                    format!("process.consoleSize.{field}"),
                    format!("{value} is too big"),
                )
            })
        };
        out.console_size = Some(oci::Box {
            height: narrow(size.height(), "height")?,
            width: narrow(size.width(), "width")?,
            ..Default::default()
        })
        .into();
    }
    if let Some(sets) = process.capabilities() {
        out.capabilities = Some(oci::Capabilities {
            bounding: capabilities(sets.bounding()),
            effective: capabilities(sets.effective()),
            inheritable: capabilities(sets.inheritable()),
            permitted: capabilities(sets.permitted()),
            ambient: capabilities(sets.ambient()),
            ..Default::default()
        })
        .into();
    }
    for limit in process.rlimits().iter().flatten() {
        out.rlimits.push(oci::Rlimit {
            type_: name(&limit.typ()),
            hard: limit.hard(),
            soft: limit.soft(),
            ..Default::default()
        });
    }
    if let Some(scheduler) = process.scheduler() {
        out.scheduler = Some(oci::Scheduler {
            policy: name(scheduler.policy()),
            nice: scheduler.nice().unwrap_or(0),
            priority: scheduler.priority().unwrap_or(0),
            flags: scheduler
                .flags()
                .iter()
                .flatten()
                .map(|flag| flag_name(&name(flag)))
                .collect(),
            runtime: scheduler.runtime().unwrap_or(0),
            deadline: scheduler.deadline().unwrap_or(0),
            period: scheduler.period().unwrap_or(0),
            ..Default::default()
        })
        .into();
    }
    if let Some(priority) = process.io_priority() {
        out.io_priority = Some(oci::IoPriority {
            class: name(&priority.class()),
            priority: i32::try_from(priority.priority())
                .map_err(|_| SpecError::field("process.ioPriority.priority", "is out of range"))?,
            ..Default::default()
        })
        .into();
    }
    if let Some(affinity) = process.exec_cpu_affinity() {
        out.exec_cpu_affinity = Some(oci::CpuAffinity {
            initial: affinity.initial().clone().unwrap_or_default(),
            final_: affinity.cpu_affinity_final().clone().unwrap_or_default(),
            ..Default::default()
        })
        .into();
    }
    Ok(out)
}

/// Flags of a scheduler that the types call differently: as the types do, and
/// as the specification does.
const FLAGS: [(&str, &str); 2] = [
    ("SCHED_RESET_ON_FORK", "SCHED_FLAG_RESET_ON_FORK"),
    ("SCHED_FLAG_D_L_OVERRUN", "SCHED_FLAG_DL_OVERRUN"),
];

/// The specification's name of a flag.
fn flag_name(name: &str) -> String {
    let known = FLAGS.iter().find(|(types, _)| *types == name);
    known
        .map_or(name, |(_, specification)| specification)
        .into()
}

/// Renames the specification's flags of schedulers, of a whole specification
/// or of a process, to what the types call them. Whether there were any.
pub fn rename_flags(value: &mut Value) -> bool {
    let mut renamed = false;
    for place in ["/process/scheduler/flags", "/scheduler/flags"] {
        let list = value.pointer_mut(place).and_then(Value::as_array_mut);
        for flag in list.into_iter().flatten() {
            let known = FLAGS.iter().find(|(_, name)| flag.as_str() == Some(name));
            if let Some((types, _)) = known {
                *flag = Value::from(*types);
                renamed = true;
            }
        }
    }
    renamed
}

/// In an order that does not change from run to run.
fn capabilities(set: &Option<Capabilities>) -> Vec<String> {
    let mut names: Vec<String> = set.iter().flatten().map(name).collect();
    names.sort_unstable();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_a_process_is_lost() {
        let process: Process = crate::oci::parse(
            br#"{"terminal":true,"consoleSize":{"height":24,"width":80},"cwd":"/srv","args":["a","b"],
                "env":["X=1"],"user":{"uid":1,"gid":2,"umask":63,"additionalGids":[3,4]},
                "capabilities":{"bounding":["CAP_KILL"],"effective":["CAP_CHOWN"],
                    "inheritable":["CAP_FOWNER"],"permitted":["CAP_SETUID"],"ambient":["CAP_SETGID"]},
                "rlimits":[{"type":"RLIMIT_NOFILE","soft":5,"hard":6}],"noNewPrivileges":true,
                "oomScoreAdj":-7,"scheduler":{"policy":"SCHED_FIFO","priority":9,
                    "flags":["SCHED_FLAG_RESET_ON_FORK","SCHED_FLAG_DL_OVERRUN","SCHED_FLAG_RECLAIM"]},
                "ioPriority":{"class":"IOPRIO_CLASS_BE","priority":6},
                "execCPUAffinity":{"initial":"0-3","final":"1"}}"#,
        )
        .unwrap();
        let out = super::process(&process).unwrap();
        assert!(out.terminal && out.no_new_privileges);
        assert_eq!((out.console_size.height, out.console_size.width), (24, 80));
        assert_eq!((out.user.uid, out.user.gid), (1, 2));
        assert_eq!(out.user.umask, Some(0o077));
        assert_eq!(out.user.additional_gids, [3, 4]);
        let sets = &out.capabilities;
        for (set, name) in [
            (&sets.bounding, "CAP_KILL"),
            (&sets.effective, "CAP_CHOWN"),
            (&sets.inheritable, "CAP_FOWNER"),
            (&sets.permitted, "CAP_SETUID"),
            (&sets.ambient, "CAP_SETGID"),
        ] {
            assert_eq!(set.as_slice(), [name]);
        }
        assert_eq!(out.rlimits[0].type_, "RLIMIT_NOFILE");
        assert_eq!(out.oom_score_adj, Some(-7));
        assert_eq!(out.scheduler.policy, "SCHED_FIFO");
        let flags = ["RESET_ON_FORK", "DL_OVERRUN", "RECLAIM"].map(|f| format!("SCHED_FLAG_{f}"));
        assert_eq!(out.scheduler.flags, flags);
        assert_eq!(out.io_priority.class, "IOPRIO_CLASS_BE");
        assert_eq!(out.exec_cpu_affinity.initial, "0-3");
        assert_eq!(out.exec_cpu_affinity.final_, "1");
    }
}
