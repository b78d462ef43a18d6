// SPDX-License-Identifier: Apache-2.0
//! A bundle's config.json, and what of it goes into the guest.

mod annotations;
mod devices;
mod guest;
mod hooks;
mod merge;
mod namespaces;
mod process;
mod resources;
mod seccomp;
mod size;

use std::{
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
    parse(&text).map_err(|source| SpecError::Syntax { path, source })
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
