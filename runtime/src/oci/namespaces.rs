// SPDX-License-Identifier: Apache-2.0
//! A container's namespaces (config-linux.md, "Namespaces") as they are in a
//! guest that is the pod.

use std::path::PathBuf;

use bulkhead_agent_protocol::oci;
use oci_spec::runtime::{Linux, LinuxIdMapping, LinuxNamespace, LinuxNamespaceType};

use super::{guest::Pod, name, Role, SpecError};

/// One namespace for the agent; none: it is the guest's own.
///
/// # Errors
/// It is one that cannot be joined.
pub fn translate(
    namespace: &LinuxNamespace,
    linux: &Linux,
    role: Role,
    pod: Option<Pod<'_>>,
) -> Result<Option<oci::Namespace>, SpecError> {
    let kind = namespace.typ();
    let path = namespace.path().as_ref();
    let refused = |why: &str| {
        let field = format!("linux.namespaces: {}", name(&kind));
        Err(SpecError::field(field, why))
    };
    let mut out = oci::Namespace {
        type_: name(&kind),
        ..Default::default()
    };
    match (kind, path) {
        // The guest is the pod: its network, host name and IPC objects are
        // shared by who joins another's.
        (LinuxNamespaceType::Network, _) => return Ok(None),
        (LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts, path) => {
            if path.is_some() || role == Role::Sandbox {
                return Ok(None);
            }
        }
        // All processes of a pod have one pid on the host, so which container
        // is meant cannot be told; the one that stands for the pod is.
        (LinuxNamespaceType::Pid, Some(path)) => match pod {
            Some(pod) if *path == pids_of(pod) => {
                match pod.sandbox {
                    Some(sandbox) => out.container_id = sandbox.into(),
                    // The guest's own, with the agent as its first process.
                    None => return Ok(None),
                }
            }
            _ => return refused("only that of the same pod can be joined"),
        },
        // The containers of a pod with a user namespace say its path and its
        // ids: each gets one of its own with the same ids. But where they have
        // the pid namespace of who stands for the pod, which is that one's.
        (LinuxNamespaceType::User, Some(_)) => {
            let pods = pod.filter(|pod| joins_pids(linux, *pod));
            if let Some(sandbox) = pods.and_then(|pod| pod.sandbox) {
                out.container_id = sandbox.into();
            }
            if linux.uid_mappings().is_none() || linux.gid_mappings().is_none() {
                return refused("joining another's is not supported without its id mappings");
            }
        }
        (_, Some(_)) => return refused("joining another's is not supported"),
        (_, None) => {}
    }
    Ok(Some(out))
}

/// The pid namespace of a pod's processes.
fn pids_of(pod: Pod<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/{}/ns/pid", pod.pid))
}

fn joins_pids(linux: &Linux, pod: Pod<'_>) -> bool {
    let path = pids_of(pod);
    let mut all = linux.namespaces().iter().flatten();
    all.any(|namespace| {
        namespace.typ() == LinuxNamespaceType::Pid && namespace.path().as_ref() == Some(&path)
    })
}

/// Ids of a user namespace.
pub fn mappings(list: &Option<Vec<LinuxIdMapping>>) -> Vec<oci::IdMapping> {
    list.iter()
        .flatten()
        .map(|range| oci::IdMapping {
            container_id: range.container_id(),
            host_id: range.host_id(),
            size: range.size(),
            ..Default::default()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::container;

    fn translated(linux: &str, pod: Option<Pod<'_>>) -> Result<oci::Linux, SpecError> {
        let spec = serde_json::from_str(&format!(
            r#"{{"ociVersion":"1.2.0","process":{{"cwd":"/","args":["true"],"user":{{"uid":0,"gid":0}}}},
                "root":{{"path":"rootfs"}},"linux":{linux}}}"#
        ))
        .unwrap();
        container(&spec, "c", pod).map(|prepared| prepared.spec.linux.unwrap_or_default())
    }

    #[test]
    fn the_pid_namespace_of_the_pod() {
        let linux = r#"{"namespaces":[{"type":"pid","path":"/proc/77/ns/pid"}]}"#;
        let pod = |pid| Pod {
            pid,
            sandbox: Some("pause"),
        };
        let out = translated(linux, Some(pod(77))).unwrap();
        assert_eq!(out.namespaces[0].container_id, "pause");
        assert_eq!(out.namespaces[0].path, "");
        for other in [Some(pod(7)), None] {
            let text = translated(linux, other).unwrap_err().to_string();
            assert!(text.starts_with("linux.namespaces: pid"), "{text}");
        }
        // With a user namespace: that is the same container's.
        let ids = r#"[{"containerID":0,"hostID":100000,"size":65536}]"#;
        let linux_with_users = format!(
            r#"{{"namespaces":[{{"type":"pid","path":"/proc/77/ns/pid"}},
                {{"type":"user","path":"/proc/77/ns/user"}}],
                "uidMappings":{ids},"gidMappings":{ids}}}"#
        );
        let out = translated(&linux_with_users, Some(pod(77))).unwrap();
        assert_eq!(out.namespaces[1].container_id, "pause");
        // Nobody stands for the pod: its processes are the guest's.
        let alone = Pod {
            pid: 77,
            sandbox: None,
        };
        assert!(translated(linux, Some(alone))
            .unwrap()
            .namespaces
            .is_empty());
    }

    #[test]
    fn ids_and_clocks() {
        let range = r#"[{"containerID":0,"hostID":100000,"size":65536}]"#;
        let out = translated(
            &format!(
                r#"{{"namespaces":[{{"type":"user","path":"/proc/1/ns/user"}},{{"type":"time"}}],
                    "uidMappings":{range},"gidMappings":{range},
                    "timeOffsets":{{"boottime":{{"secs":-3,"nanosecs":5}}}}}}"#
            ),
            None,
        )
        .unwrap();
        let kinds: Vec<&str> = out.namespaces.iter().map(|n| n.type_.as_str()).collect();
        assert_eq!(kinds, ["user", "time"]);
        assert_eq!(out.uid_mappings[0].host_id, 100_000);
        assert_eq!(out.gid_mappings[0].size, 65536);
        let offset = &out.time_offsets["boottime"];
        assert_eq!((offset.secs, offset.nanosecs), (-3, 5));
    }
}
