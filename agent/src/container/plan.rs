// SPDX-License-Identifier: Apache-2.0
//! The specification, checked and translated into what the child of clone3
//! does. Everything that is wrong with a request is found here, before
//! anything is made.

mod process;

use std::path::{Path, PathBuf};

use bulkhead_agent_protocol::oci;

use super::hooks::GuestHooks;
use super::mounts::{self, MountPlan};
use super::namespaces::Namespaces;
use super::numbers;
use crate::error::{AgentError, Result};
use crate::seccomp;
pub use process::{process, Capabilities, ProcessPlan};

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

/// Checks and translates the specification of the container `id`.
///
/// # Errors
/// [`AgentError::Invalid`] naming the field.
pub fn container(spec: &oci::Spec, id: &str) -> Result<ContainerPlan> {
    let process_spec = spec
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
    let personality = process::personality(linux.personality.as_ref())?;
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
            ..process::process(process_spec, None)?
        },
        seccomp: match linux.seccomp.as_ref() {
            Some(profile) => Some(std::sync::Arc::new(seccomp::compile(profile)?)),
            None => None,
        },
        resources: linux.resources.clone().unwrap_or_default(),
        hooks: GuestHooks::new(spec, id)?,
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
}
