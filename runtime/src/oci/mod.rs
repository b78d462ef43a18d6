// SPDX-License-Identifier: Apache-2.0
//! A bundle's config.json, and what of it goes into the guest.

mod annotations;
mod devices;
mod guest;
mod hooks;
mod idmap;
mod merge;
mod namespaces;
mod process;
mod resources;
mod seccomp;
mod size;

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};
use serde::{de::DeserializeOwned, Serialize};
use serde_json::Value;

pub use self::{
    annotations::{annotation_names, configured},
    guest::{container, role, Pod, Prepared, Role, Volume, GUEST_SHM},
    hooks::check as check_hook,
    merge::merge_group,
    process::process,
    resources::resources,
    size::{Limits, Size},
};

/// Why a bundle's config.json cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// It cannot be read.
    #[error("{} cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It is not what the runtime specification says; the source tells the
    /// field, line and column.
    #[error("{}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and what.
        #[source]
        source: serde_json::Error,
    },
    /// A value cannot be used.
    #[error("{field}: {problem}")]
    Field {
        /// The field, or the annotation.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
}

impl SpecError {
    fn field(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Field {
            field: field.into(),
            problem: problem.into(),
        }
    }
}

/// Reads a bundle's config.json.
///
/// # Errors
/// It is not there, or not a container specification.
pub fn load(bundle: &Path) -> Result<Spec, SpecError> {
    let path = bundle.join("config.json");
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(source) => return Err(SpecError::Read { path, source }),
    };
    let spec = parse(&text).map_err(|source| SpecError::Syntax { path, source })?;
    check_version(&spec)?;
    Ok(spec)
}

/// Refuses versions of the specification whose meaning is unknown: others than
/// 1.x, as all of them are compatible (config.md, "Specification version").
fn check_version(spec: &Spec) -> Result<(), SpecError> {
    let version = spec.version();
    let core = version.split(['-', '+']).next().unwrap_or_default();
    let numbers: Vec<&str> = core.split('.').collect();
    let numeric = |part: &&str| part.parse::<u32>().is_ok();
    if numbers.len() != 3 || !numbers.iter().all(numeric) {
        let problem = format!("{version:?} is no version (it should be like 1.2.0)");
        return Err(SpecError::field("ociVersion", problem));
    }
    match numbers[0] {
        "1" => Ok(()),
        _ => Err(SpecError::field(
            "ociVersion",
            format!("{version:?}: only versions 1.x of the specification are known"),
        )),
    }
}

/// Reads a specification, or a process of one.
///
/// # Errors
/// It is not what the runtime specification says.
pub fn parse<T: DeserializeOwned>(text: &[u8]) -> serde_json::Result<T> {
    serde_json::from_slice(text).or_else(|error| {
        // What the types call differently from the specification is rare: the
        // text is gone through only when it was not understood.
        let mut value: Value = serde_json::from_slice(text)?;
        match process::rename_flags(&mut value) {
            true => serde_json::from_value(value),
            false => Err(error),
        }
    })
}

/// The network namespace to attach to: the path of the spec's network
/// namespace. None: the pod has no network.
pub fn network_namespace(spec: &Spec) -> Option<&Path> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    namespaces
        .iter()
        .find(|namespace| namespace.typ() == LinuxNamespaceType::Network)?
        .path()
        .as_deref()
}

/// Size in bytes of the host's file system that a container which stands for a
/// pod has for the pod's shared memory; none: it says nothing of it.
pub fn shm_size(spec: &Spec) -> Option<u64> {
    let mounts = spec.mounts().as_ref()?;
    let source = mounts.iter().find_map(guest::shared_memory)?;
    let found = rustix::fs::statvfs(source).ok()?;
    Some(found.f_blocks.saturating_mul(found.f_frsize))
}

/// Refuses a pod that asks for the host's network: one without a network
/// namespace (config-linux.md, "Namespaces": the runtime's own is meant then).
///
/// # Errors
/// It has none.
pub fn check_network(spec: &Spec) -> Result<(), SpecError> {
    let namespaces = spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
    let has = |namespace: &LinuxNamespace| namespace.typ() == LinuxNamespaceType::Network;
    if namespaces.into_iter().flatten().any(has) {
        return Ok(());
    }
    Err(SpecError::field(
        "linux.namespaces",
        "there is no network namespace, so the host's network is asked for (hostNetwork: true, \
         --net-host, --network host); a microVM has a network stack of its own and cannot have \
         the host's: leave that out, or choose another runtime for this pod",
    ))
}

/// Whether the spec wants a network namespace that nobody has made yet.
pub fn wants_new_network(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
    namespaces.into_iter().flatten().any(|namespace| {
        namespace.typ() == LinuxNamespaceType::Network && namespace.path().is_none()
    })
}

/// What a pod with a user namespace of its own may do in its network by that
/// namespace's capabilities, and which is the guest's here: ports below 1024, and
/// echo requests.
const USERS_NETWORK: [(&str, &str); 2] = [
    ("net.ipv4.ip_unprivileged_port_start", "0"),
    ("net.ipv4.ping_group_range", "0 2147483647"),
];

/// Adds to a pod's sysctls what its user namespace takes, where it has one. What the
/// pod says itself stays.
pub fn allow_users_network(spec: &Spec, sysctls: &mut HashMap<String, String>) {
    let namespaces = spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
    let mut namespaces = namespaces.into_iter().flatten();
    if !namespaces.any(|namespace| namespace.typ() == LinuxNamespaceType::User) {
        return;
    }
    for (name, value) in USERS_NETWORK {
        if !sysctls.keys().any(|key| key.replace('/', ".") == name) {
            sysctls.insert(name.into(), value.into());
        }
    }
}

/// The spec's name of an enumeration's value.
fn name<T: Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(name)) => name,
        // The enumerations of the specification are all names.
        other => unreachable!("not a name: {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_with_users_has_low_ports() {
        let ids = r#""uidMappings":[{"containerID":0,"hostID":1,"size":9}]"#;
        let spec = |namespace: &str| -> Spec {
            serde_json::from_str(&format!(
                r#"{{"ociVersion":"1.2.0","linux":{{"namespaces":[{{"type":"{namespace}"}}],{ids}}}}}"#
            ))
            .unwrap()
        };
        let mut sysctls = HashMap::new();
        allow_users_network(&spec("pid"), &mut sysctls);
        assert!(sysctls.is_empty());
        // What the pod says holds, however it spells it.
        let own = "net/ipv4/ip_unprivileged_port_start";
        sysctls.insert(own.into(), "80".into());
        allow_users_network(&spec("user"), &mut sysctls);
        assert_eq!(sysctls.len(), 2);
        assert_eq!(sysctls[own], "80");
        assert_eq!(sysctls["net.ipv4.ping_group_range"], "0 2147483647");
    }

    /// Cases misc_props, process_capabilities_fail, process_rlimits_fail,
    /// memory_policy and net_devices of the conformance suites.
    #[test]
    fn unknown_properties_are_ignored_and_unknown_values_refused() {
        let read = |version: &str, process: &str, linux: &str| {
            let directory = tempfile::tempdir().unwrap();
            let text = format!(
                r#"{{"ociVersion":"{version}","unknown":{{"x":1}},"annotations":{{"org.unknown":""}},
                    "root":{{"path":"rootfs"}},"process":{{"cwd":"/","args":["true"],
                    "user":{{"uid":0,"gid":0}}{process}}},"linux":{{{linux}}}}}"#
            );
            std::fs::write(directory.path().join("config.json"), text).unwrap();
            let spec = load(directory.path())?;
            container(&spec, "c", None).map(drop)
        };
        for version in ["1.0.0", "1.0.2-dev", "1.3.0+x"] {
            read(version, "", "").unwrap();
        }
        for (version, process, linux, word) in [
            ("invalid", "", "", "ociVersion"),
            ("1.0", "", "", "ociVersion"),
            ("2.0.0", "", "", "ociVersion"),
            (
                "1.2.0",
                r#","rlimits":[{"type":"RLIMIT_TEST","soft":1,"hard":1}]"#,
                "",
                "RLIMIT_TEST",
            ),
            (
                "1.2.0",
                r#","capabilities":{"bounding":["CAP_TEST"]}"#,
                "",
                "TEST",
            ),
            (
                "1.3.0",
                "",
                r#""memoryPolicy":{"mode":"INTERLEAVE","nodes":"0"}"#,
                "INTERLEAVE",
            ),
            (
                "1.3.0",
                "",
                r#""memoryPolicy":{"mode":"MPOL_BIND","nodes":"0","flags":["badflag"]}"#,
                "badflag",
            ),
            ("1.3.0", "", r#""memoryPolicy":{"nodes":"0"}"#, "mode"),
            (
                "1.3.0",
                "",
                r#""netDevices":{"eth1":{"name":"eth2"}}"#,
                "linux.netDevices: eth1",
            ),
        ] {
            let error = read(version, process, linux).unwrap_err();
            let mut text = error.to_string();
            if let Some(source) = std::error::Error::source(&error) {
                text.push_str(&source.to_string());
            }
            assert!(text.contains(word), "{text} has no {word}");
        }
        let policy = r#""memoryPolicy":{"mode":"MPOL_DEFAULT","nodes":""},"netDevices":{}"#;
        read("1.3.0", "", policy).unwrap();
    }

    #[test]
    fn the_hosts_network_is_refused() {
        for (linux, refused) in [
            (r#"{"namespaces":[{"type":"pid"}]}"#, true),
            ("{}", true),
            (r#"{"namespaces":[{"type":"network"}]}"#, false),
            (
                r#"{"namespaces":[{"type":"network","path":"/run/netns/x"}]}"#,
                false,
            ),
        ] {
            let text = format!(r#"{{"ociVersion":"1.0.2","linux":{linux}}}"#);
            let checked = check_network(&parse(text.as_bytes()).unwrap());
            assert_eq!(checked.is_err(), refused, "{linux}");
        }
        let error = check_network(&parse(br#"{"ociVersion":"1.0.2"}"#).unwrap()).unwrap_err();
        assert!(error.to_string().contains("hostNetwork: true"), "{error}");
    }
}
