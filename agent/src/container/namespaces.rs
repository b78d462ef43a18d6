// SPDX-License-Identifier: Apache-2.0
//! Which namespaces a container gets (runtime-spec config-linux.md,
//! "Namespaces"). Those given by path are the pod's, which are the guest's
//! own: the guest is the pod. Another container's pid namespace is named by
//! that container.

use std::collections::HashSet;
use std::fmt::Write;

use bulkhead_agent_protocol::oci;

use super::user::UserPlan;
use crate::error::{AgentError, Result};

/// clone3's flag, which nix does not have.
pub const CLONE_NEWTIME: libc::c_int = 0x80;

/// What a container's namespaces are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespaces {
    /// CLONE_NEW* flags of those that are not the guest's own.
    pub flags: libc::c_int,
    /// Whether the container sees its own cgroup as the root.
    pub own_cgroup: bool,
    /// Offsets of a time namespace of its own, as the kernel takes them.
    pub time: Option<String>,
    /// The pid namespace.
    pub pid: PidNamespace,
    /// The ids of a user namespace that is not the guest's.
    pub user: Option<UserPlan>,
    /// The user namespace is that of who has the pid namespace.
    pub user_joined: bool,
}

/// Where a container's processes are numbered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PidNamespace {
    /// With the agent.
    Guest,
    /// By themselves.
    Own,
    /// With those of another container.
    Of(String),
}

impl Namespaces {
    /// Checks and translates.
    ///
    /// # Errors
    /// [`AgentError::Invalid`] naming the field.
    pub fn new(linux: &oci::Linux) -> Result<Self> {
        let mut out = Self {
            flags: 0,
            own_cgroup: false,
            time: None,
            pid: PidNamespace::Guest,
            user: None,
            user_joined: false,
        };
        let (mut time, mut user) = (false, false);
        let mut users_of = None;
        let mut seen = HashSet::new();
        for namespace in &linux.namespaces {
            let kind = namespace.type_.as_str();
            if !seen.insert(kind) {
                return Err(invalid(format!("{kind} is there twice")));
            }
            let joined = !namespace.path.is_empty();
            if !namespace.container_id.is_empty() {
                let of = namespace.container_id.clone();
                match kind {
                    "pid" => out.pid = PidNamespace::Of(of),
                    "user" => {
                        user = true;
                        users_of = Some(of);
                    }
                    _ => {
                        return Err(invalid(format!(
                            "{kind}: only the pid and user namespaces of another container can \
                             be joined"
                        )))
                    }
                }
                continue;
            }
            match kind {
                // The pod's network is the guest's own, with and without a path.
                "network" => {}
                "ipc" | "uts" if joined => {}
                "mount" if !joined => out.flags |= libc::CLONE_NEWNS,
                "pid" if !joined => {
                    out.flags |= libc::CLONE_NEWPID;
                    out.pid = PidNamespace::Own;
                }
                "ipc" => out.flags |= libc::CLONE_NEWIPC,
                "uts" => out.flags |= libc::CLONE_NEWUTS,
                "cgroup" if !joined => out.own_cgroup = true,
                "time" if !joined => time = true,
                "user" if !joined => user = true,
                "mount" | "pid" | "cgroup" | "time" | "user" => {
                    return Err(invalid(format!(
                        "joining a {kind} namespace by its path is not supported"
                    )))
                }
                other => return Err(invalid(format!("unknown type {other:?}"))),
            }
        }
        if out.flags & libc::CLONE_NEWNS == 0 {
            return Err(invalid("a container needs a mount namespace of its own"));
        }
        out.time = time_offsets(linux, time)?;
        out.user = user_mappings(linux, user)?;
        if out.user.is_some() {
            // proc can be mounted by who has the pid namespace only.
            match (&out.pid, users_of) {
                (PidNamespace::Of(pid), Some(users)) if *pid == users => out.user_joined = true,
                (PidNamespace::Of(_), _) => {
                    return Err(invalid(
                        "user: with the pid namespace of another container it has to be that \
                         one's too",
                    ))
                }
                (_, Some(_)) => {
                    return Err(invalid(
                        "user: that of another container is joined with its pid namespace only",
                    ))
                }
                (_, None) => {}
            }
            out.flags |= libc::CLONE_NEWUSER;
        }
        Ok(out)
    }

    /// Those to make with the first process.
    pub fn at_birth(&self) -> libc::c_int {
        match self.user_joined {
            true => 0,
            false => self.flags,
        }
    }

    /// Those that the first process makes once it has joined the user namespace.
    pub fn in_joined(&self) -> libc::c_int {
        self.flags & !(libc::CLONE_NEWUSER | libc::CLONE_NEWPID)
    }

    /// All that a further process has to join, but the pid namespace: it is
    /// born into that.
    pub fn to_join(&self) -> libc::c_int {
        let mut flags = self.flags & !libc::CLONE_NEWPID;
        if self.own_cgroup {
            flags |= libc::CLONE_NEWCGROUP;
        }
        if self.time.is_some() {
            flags |= CLONE_NEWTIME;
        }
        flags
    }
}

fn invalid(why: impl std::fmt::Display) -> AgentError {
    AgentError::Invalid(format!("linux.namespaces: {why}"))
}

fn time_offsets(linux: &oci::Linux, own: bool) -> Result<Option<String>> {
    let wrong = |why: String| AgentError::Invalid(format!("linux.timeOffsets: {why}"));
    if !own {
        return match linux.time_offsets.is_empty() {
            true => Ok(None),
            false => Err(wrong("there is no time namespace to set them in".into())),
        };
    }
    let mut text = String::new();
    for (clock, offset) in &linux.time_offsets {
        if clock != "monotonic" && clock != "boottime" {
            return Err(wrong(format!("unknown clock {clock:?}")));
        }
        if offset.nanosecs >= 1_000_000_000 {
            return Err(wrong(format!("{clock}: a second or more of nanoseconds")));
        }
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{clock} {} {}", offset.secs, offset.nanosecs);
    }
    Ok(Some(text))
}

fn user_mappings(linux: &oci::Linux, own: bool) -> Result<Option<UserPlan>> {
    if own {
        return UserPlan::new(&linux.uid_mappings, &linux.gid_mappings).map(Some);
    }
    if linux.uid_mappings.is_empty() && linux.gid_mappings.is_empty() {
        return Ok(None);
    }
    Err(AgentError::Invalid(
        "linux.uidMappings: there is no user namespace to map ids of".into(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linux(kinds: &[&str]) -> oci::Linux {
        oci::Linux {
            namespaces: kinds
                .iter()
                .map(|kind| oci::Namespace {
                    type_: (*kind).into(),
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        }
    }

    fn refused(linux: &oci::Linux) -> String {
        Namespaces::new(linux).unwrap_err().to_string()
    }

    #[test]
    fn a_namespace_by_path_is_the_pods() {
        let mut spec = linux(&["mount", "pid", "uts", "ipc", "network"]);
        for namespace in &mut spec.namespaces[2..] {
            namespace.path = "/proc/1/ns/x".into();
        }
        let out = Namespaces::new(&spec).unwrap();
        assert_eq!(out.flags, libc::CLONE_NEWNS | libc::CLONE_NEWPID);
        assert_eq!(out.to_join(), libc::CLONE_NEWNS);
        for kind in ["mount", "pid", "cgroup", "user", "time"] {
            let mut spec = linux(&[kind]);
            spec.namespaces[0].path = "/proc/1/ns/x".into();
            assert!(refused(&spec).contains(kind));
        }
    }

    #[test]
    fn the_pid_namespace_of_another_container() {
        let mut spec = linux(&["mount", "pid"]);
        spec.namespaces[1].container_id = "pause".into();
        let out = Namespaces::new(&spec).unwrap();
        assert_eq!(out.pid, PidNamespace::Of("pause".into()));
        assert_eq!(out.flags, libc::CLONE_NEWNS);
        spec.namespaces[1].type_ = "ipc".into();
        assert!(refused(&spec).contains("ipc"));
    }

    #[test]
    fn time_offsets_need_a_time_namespace() {
        let offset = oci::TimeOffset {
            secs: -5,
            nanosecs: 7,
            ..Default::default()
        };
        let mut spec = linux(&["mount", "time"]);
        spec.time_offsets.insert("boottime".into(), offset.clone());
        let out = Namespaces::new(&spec).unwrap();
        assert_eq!(out.time.as_deref(), Some("boottime -5 7\n"));
        assert_ne!(out.to_join() & CLONE_NEWTIME, 0);
        spec.time_offsets.insert("realtime".into(), offset.clone());
        assert!(refused(&spec).contains("realtime"));
        let mut spec = linux(&["mount"]);
        spec.time_offsets.insert("boottime".into(), offset);
        assert!(refused(&spec).starts_with("linux.timeOffsets"));
    }

    #[test]
    fn mappings_need_a_user_namespace() {
        let range = oci::IdMapping {
            host_id: 1000,
            size: 10,
            ..Default::default()
        };
        let mut spec = linux(&["mount", "user"]);
        assert!(refused(&spec).starts_with("linux.uidMappings"));
        spec.uid_mappings.push(range.clone());
        spec.gid_mappings.push(range);
        let out = Namespaces::new(&spec).unwrap();
        assert_ne!(out.flags & libc::CLONE_NEWUSER, 0);
        spec.namespaces.pop();
        assert!(refused(&spec).starts_with("linux.uidMappings"));
    }

    #[test]
    fn the_user_namespace_of_who_has_the_pid_namespace() {
        let range = oci::IdMapping {
            host_id: 1000,
            size: 10,
            ..Default::default()
        };
        let spec = |pid: &str, user: &str| {
            let mut spec = linux(&["mount", "pid", "user"]);
            spec.namespaces[1].container_id = pid.into();
            spec.namespaces[2].container_id = user.into();
            spec.uid_mappings.push(range.clone());
            spec.gid_mappings.push(range.clone());
            spec
        };
        let out = Namespaces::new(&spec("pause", "pause")).unwrap();
        assert!(out.user_joined);
        assert_eq!(out.at_birth(), 0);
        assert_eq!(out.in_joined(), libc::CLONE_NEWNS);
        assert_eq!(out.to_join(), libc::CLONE_NEWNS | libc::CLONE_NEWUSER);
        for (pid, user) in [("pause", ""), ("pause", "other"), ("", "pause")] {
            let why = refused(&spec(pid, user));
            assert!(why.starts_with("linux.namespaces: user"), "{why}");
        }
        let own = Namespaces::new(&spec("", "")).unwrap();
        assert_eq!(own.at_birth(), own.flags);
    }

    #[test]
    fn what_is_refused() {
        assert!(refused(&linux(&["pid"])).contains("mount namespace"));
        assert!(refused(&linux(&["mount", "mount"])).contains("twice"));
        assert!(refused(&linux(&["mount", "sideways"])).contains("sideways"));
    }
}
