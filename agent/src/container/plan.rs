// SPDX-License-Identifier: Apache-2.0
//! The specification, checked and translated into what the child of clone3
//! does. Everything that is wrong with a request is found here, before
//! anything is made.

use std::collections::HashSet;
use std::ffi::CString;
use std::path::{Path, PathBuf};

use bulkhead_agent_protocol::oci;
use nix::sched::CpuSet;

use super::caps;
use super::hooks::GuestHooks;
use super::mounts::{self, MountPlan};
use super::namespaces::Namespaces;
use super::numbers;
use crate::error::{AgentError, Result};
use crate::seccomp;
use crate::sys::process::SchedAttr;

/// A container's file system and namespaces.
#[derive(Debug)]
pub struct ContainerPlan {
    /// The root file system's path in the guest.
    pub rootfs: PathBuf,
    /// Whether `/` is read-only.
    pub root_read_only: bool,
    /// Propagation of the container's mounts, before its root is set up.
    pub initial_propagation: u64,
    /// Propagation of `/` at the end, if the initial one does not say it.
    pub root_propagation: Option<(u64, bool)>,
    /// Its namespaces.
    pub namespaces: Namespaces,
    /// Mounts in the order of the specification.
    pub mounts: Vec<MountPlan>,
    /// Device nodes besides the default ones.
    pub devices: Vec<DevicePlan>,
    /// Paths to hide.
    pub masked_paths: Vec<PathBuf>,
    /// Paths to make read-only.
    pub read_only_paths: Vec<PathBuf>,
    /// Host name; empty: leave it.
    pub hostname: String,
    /// NIS domain name; empty: leave it.
    pub domainname: String,
    /// Files below /proc/sys and what to write to them.
    pub sysctls: Vec<(PathBuf, String)>,
    /// The container's first process.
    pub process: ProcessPlan,
    /// The compiled seccomp profile, which further processes get too.
    pub seccomp: Option<std::sync::Arc<seccomp::Filter>>,
    /// Limits.
    pub resources: oci::Resources,
    /// Programs to run on the way.
    pub hooks: GuestHooks,
}

impl ContainerPlan {
    /// Sysctls that the container's child writes.
    pub fn sysctls_of_child(&self) -> impl Iterator<Item = &(PathBuf, String)> {
        self.sysctls
            .iter()
            .filter(|(path, _)| !self.is_agents(path))
    }

    /// Sysctls that the agent writes: the network is the guest's, and not to
    /// be changed from within a user namespace.
    pub fn sysctls_of_agent(&self) -> impl Iterator<Item = &(PathBuf, String)> {
        self.sysctls.iter().filter(|(path, _)| self.is_agents(path))
    }

    fn is_agents(&self, path: &Path) -> bool {
        self.namespaces.user.is_some() && path.starts_with("/proc/sys/net")
    }
}

/// A device node to make.
#[derive(Clone, Debug)]
pub struct DevicePlan {
    /// Path in the container.
    pub path: PathBuf,
    /// S_IFCHR, S_IFBLK or S_IFIFO.
    pub kind: libc::mode_t,
    /// Device number.
    pub number: libc::dev_t,
    /// Permissions.
    pub mode: libc::mode_t,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

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

/// Checks and translates the specification of the container `id`.
///
/// # Errors
/// [`AgentError::Invalid`] naming the field.
pub fn container(spec: &oci::Spec, id: &str) -> Result<ContainerPlan> {
    let process = spec
        .process
        .as_ref()
        .ok_or_else(|| invalid("process: missing"))?;
    let root = spec.root.as_ref().ok_or_else(|| invalid("root: missing"))?;
    if !root.path.starts_with('/') {
        return Err(invalid(format!(
            "root.path: {:?} is not absolute",
            root.path
        )));
    }
    let linux = spec.linux.clone().unwrap_or_default();
    let namespaces = Namespaces::new(&linux)?;
    let own_uts = namespaces.flags & libc::CLONE_NEWUTS != 0;
    if !spec.hostname.is_empty() && !own_uts {
        // The pod's name is not a container's to change.
        crate::warn_limited!("msg=\"host name left alone: the UTS namespace is the pod's\"");
    }
    let own = |name: &str| {
        if own_uts {
            name.to_owned()
        } else {
            String::new()
        }
    };
    let (initial_propagation, root_propagation) = root_propagation(&linux.rootfs_propagation)?;
    let personality = personality(linux.personality.as_ref())?;
    no_label(&linux.mount_label, "linux.mountLabel")?;
    Ok(ContainerPlan {
        rootfs: PathBuf::from(&root.path),
        root_read_only: root.readonly,
        initial_propagation,
        root_propagation,
        mounts: spec
            .mounts
            .iter()
            .map(mounts::plan)
            .collect::<Result<_>>()?,
        devices: linux
            .devices
            .iter()
            .filter_map(|each| device(each).transpose())
            .collect::<Result<_>>()?,
        masked_paths: absolute(&linux.masked_paths, "linux.maskedPaths")?,
        read_only_paths: absolute(&linux.readonly_paths, "linux.readonlyPaths")?,
        hostname: own(&spec.hostname),
        domainname: own(&spec.domainname),
        sysctls: sysctls(&linux.sysctl, namespaces.flags)?,
        namespaces,
        process: ProcessPlan {
            personality,
            ..self::process(process, None)?
        },
        seccomp: match linux.seccomp.as_ref() {
            Some(profile) => Some(std::sync::Arc::new(seccomp::compile(profile)?)),
            None => None,
        },
        resources: linux.resources.clone().unwrap_or_default(),
        hooks: GuestHooks::new(spec, id)?,
    })
}

/// Checks and translates a process. A further process of a container
/// (`init` is given) keeps what its specification leaves out.
///
/// # Errors
/// [`AgentError::Invalid`] naming the field.
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

/// Labels of security modules that the guest's kernel has not.
fn no_label(given: &str, field: &str) -> Result<()> {
    if given.is_empty() || given == "unconfined" {
        return Ok(());
    }
    Err(invalid(format!(
        "{field}: {given:?}: the guest's kernel has no such security module"
    )))
}

fn invalid(text: impl Into<String>) -> AgentError {
    AgentError::Invalid(text.into())
}

fn strings(list: &[String], field: &str) -> Result<Vec<CString>> {
    list.iter()
        .map(|text| {
            CString::new(text.as_str()).map_err(|_| invalid(format!("{field}: NUL in {text:?}")))
        })
        .collect()
}

/// Paths that the specification wants to be absolute.
fn absolute(list: &[String], field: &str) -> Result<Vec<PathBuf>> {
    list.iter()
        .map(|path| match path.starts_with('/') {
            true => Ok(mounts::normalise(path)),
            false => Err(invalid(format!("{field}: {path:?} is not absolute"))),
        })
        .collect()
}

fn root_propagation(name: &str) -> Result<(u64, Option<(u64, bool)>)> {
    if name.is_empty() {
        return Ok((libc::MS_SLAVE, None));
    }
    let (kind, recursive) = mounts::propagation(name)
        .ok_or_else(|| invalid(format!("linux.rootfsPropagation: unknown type {name:?}")))?;
    // A shared root cannot be pivoted to; it becomes shared at the end.
    Ok(match kind {
        libc::MS_PRIVATE => (libc::MS_PRIVATE, None),
        libc::MS_SLAVE => (libc::MS_SLAVE, None),
        other => (libc::MS_SLAVE, Some((other, recursive))),
    })
}

/// None: one that may be missing, and is.
fn device(device: &oci::Device) -> Result<Option<DevicePlan>> {
    let path = mounts::normalise(&device.path);
    let kind = match device.type_.as_str() {
        "c" | "u" => libc::S_IFCHR,
        "b" => libc::S_IFBLK,
        "p" => libc::S_IFIFO,
        other => {
            return Err(invalid(format!(
                "linux.devices: {}: unknown type {other:?}",
                device.path
            )))
        }
    };
    let number = |value: i64| {
        u32::try_from(value)
            .map_err(|_| invalid(format!("linux.devices: {}: number {value}", device.path)))
    };
    let device_number = if kind == libc::S_IFIFO {
        0
    } else if !device.name.is_empty() {
        match numbers::device(&device.name, kind == libc::S_IFBLK) {
            Some(number) => number,
            None if device.optional => return Ok(None),
            None => {
                return Err(invalid(format!(
                    "linux.devices: {}: the guest's kernel has no device {:?}",
                    device.path, device.name
                )))
            }
        }
    } else {
        libc::makedev(number(device.major)?, number(device.minor)?)
    };
    Ok(Some(DevicePlan {
        path,
        kind,
        number: device_number,
        mode: device.file_mode.unwrap_or(0o666) & 0o7777,
        uid: device.uid,
        gid: device.gid,
    }))
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

fn sysctls(
    map: &std::collections::HashMap<String, String>,
    namespaces: libc::c_int,
) -> Result<Vec<(PathBuf, String)>> {
    let mut list = map
        .iter()
        .map(|(name, value)| {
            // A container may set what belongs to a namespace of its own, and
            // what is the pod's network's; all else is the guest's.
            let ipc = ["kernel.msg", "kernel.sem", "kernel.shm", "fs.mqueue."];
            let dotted = name.replace('/', ".");
            let allowed = dotted.starts_with("net.")
                || ipc.iter().any(|prefix| dotted.starts_with(prefix))
                    && namespaces & libc::CLONE_NEWIPC != 0
                || dotted == "kernel.domainname" && namespaces & libc::CLONE_NEWUTS != 0;
            if !allowed {
                return Err(invalid(format!(
                    "linux.sysctl: {name:?} is not in a namespace of the container"
                )));
            }
            Ok((sysctl_path(name)?, value.clone()))
        })
        .collect::<Result<Vec<_>>>()?;
    list.sort();
    Ok(list)
}

/// The file of a sysctl. A name written with slashes has them as separators
/// and dots as parts of names (interfaces such as `eth0.1`).
///
/// # Errors
/// [`AgentError::Invalid`] for names that lead elsewhere.
pub fn sysctl_path(name: &str) -> Result<PathBuf> {
    let separator = if name.contains('/') { '/' } else { '.' };
    let mut path = PathBuf::from("/proc/sys");
    for part in name.split(separator) {
        if part.is_empty() || part == "." || part == ".." || part.contains('/') {
            return Err(invalid(format!("linux.sysctl: bad name {name:?}")));
        }
        path.push(part);
    }
    Ok(path)
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

fn personality(personality: Option<&oci::Personality>) -> Result<Option<libc::c_ulong>> {
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

    fn spec() -> oci::Spec {
        let namespace = |kind: &str| oci::Namespace {
            type_: kind.into(),
            ..Default::default()
        };
        oci::Spec {
            process: Some(oci::Process {
                args: vec!["sh".into()],
                cwd: "/".into(),
                ..Default::default()
            })
            .into(),
            root: Some(oci::Root {
                path: "/run/root".into(),
                ..Default::default()
            })
            .into(),
            linux: Some(oci::Linux {
                namespaces: vec![namespace("mount"), namespace("pid"), namespace("network")],
                ..Default::default()
            })
            .into(),
            ..Default::default()
        }
    }

    /// Applies a change and gives the error's text.
    fn refused(change: impl FnOnce(&mut oci::Spec)) -> String {
        let mut spec = spec();
        change(&mut spec);
        match container(&spec, "c") {
            Err(AgentError::Invalid(text)) => text,
            other => panic!("not refused: {other:?}"),
        }
    }

    #[test]
    fn a_plain_container() {
        let plan = container(&spec(), "c").unwrap();
        let flags = libc::CLONE_NEWNS | libc::CLONE_NEWPID;
        assert_eq!(plan.namespaces.flags, flags);
        assert_eq!(plan.process.umask, 0o022);
        assert_eq!(plan.process.capabilities, Capabilities::default());
    }

    #[test]
    fn the_error_names_the_field() {
        assert!(refused(|s| s.process = None.into()).starts_with("process:"));
        assert!(
            refused(|s| s.root.mut_or_insert_default().path = "x".into()).starts_with("root.path")
        );
        assert!(
            refused(|s| s.process.mut_or_insert_default().args.clear()).starts_with("process.args")
        );
        assert!(
            refused(|s| s.process.mut_or_insert_default().cwd = "x".into())
                .starts_with("process.cwd")
        );
        assert!(refused(|s| {
            s.process.mut_or_insert_default().args = vec!["a\0b".into()];
        })
        .starts_with("process.args"));
    }

    #[test]
    fn sysctls_of_the_guest_are_refused() {
        let text = refused(|s| {
            s.linux
                .mut_or_insert_default()
                .sysctl
                .insert("kernel.panic".into(), "1".into());
        });
        assert!(text.contains("kernel.panic"), "{text}");
        assert!(sysctl_path("net/ipv4/conf/eth0.1/forwarding").is_ok());
        assert!(sysctl_path("net/../../self/mem").is_err());
        assert!(sysctl_path("net..ipv4").is_err());
    }

    #[test]
    fn a_further_process_keeps_what_it_does_not_name() {
        let mut spec = spec();
        spec.process.mut_or_insert_default().capabilities = Some(oci::Capabilities {
            bounding: vec!["CAP_KILL".into()],
            ..Default::default()
        })
        .into();
        let process_spec = spec.process.mut_or_insert_default();
        process_spec.rlimits.push(oci::Rlimit {
            type_: "RLIMIT_CORE".into(),
            ..Default::default()
        });
        process_spec.io_priority = Some(oci::IoPriority {
            class: "IOPRIO_CLASS_IDLE".into(),
            ..Default::default()
        })
        .into();
        let init = container(&spec, "c").unwrap().process;
        let exec = oci::Process {
            args: vec!["x".into()],
            cwd: "/".into(),
            ..Default::default()
        };
        let plan = process(&exec, Some(&init)).unwrap();
        assert_eq!(plan.capabilities.bounding, 1 << 5);
        assert_eq!(plan.rlimits, init.rlimits);
        assert_eq!(plan.io_priority, Some(3 << 13));
        let label = oci::Process {
            selinux_label: "system_u:object_r:x:s0".into(),
            ..exec
        };
        let text = process(&label, Some(&init)).unwrap_err().to_string();
        assert!(text.starts_with("process.selinuxLabel"), "{text}");
    }

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
