// SPDX-License-Identifier: Apache-2.0
//! `-info` and `-v`: what this runtime is.

use std::io::{self, Read, Write};

use bulkhead_agent_protocol::MOUNT_OPTIONS;
use bulkhead_shim_protocol::types::{RuntimeInfo, RuntimeVersion};
use oci_spec::{
    runtime::{
        CgroupBuilder, Features, FeaturesBuilder, IDMapBuilder, LinuxFeatureBuilder,
        LinuxNamespaceType, MountExtensionsBuilder, SeccompBuilder,
    },
    OciSpecError,
};
use protobuf::{well_known_types::any::Any, Message, MessageField};

/// The runtime's name for containerd.
const NAME: &str = "io.containerd.bulkhead.v2";

/// What containerd calls the features document, whose value is JSON.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Versions of the runtime specification that are understood.
const OLDEST: &str = "1.0.0";
const NEWEST: &str = "1.3.0";

/// Prints `RuntimeInfo`. containerd may give options on standard input; they
/// change nothing. What containerd 2 gives a container depends on the features
/// in it: id-mapped mounts, and with them user namespaces of pods, and mounts
/// that are read-only with all below them.
///
/// # Errors
/// When standard output cannot be written.
pub fn run() -> io::Result<()> {
    io::stdin().read_to_end(&mut Vec::new())?;
    let info = runtime_info().map_err(io::Error::other)?;
    let bytes = info.write_to_bytes().map_err(io::Error::other)?;
    io::stdout().write_all(&bytes)
}

/// The features document (OCI runtime-spec, features.md). What it does not
/// mention is not known to be there or not.
fn features() -> Result<Features, OciSpecError> {
    let hooks = [
        "prestart",
        "createRuntime",
        "createContainer",
        "startContainer",
        "poststart",
        "poststop",
    ];
    let idmap = IDMapBuilder::default().enabled(true).build()?;
    let linux = LinuxFeatureBuilder::default()
        .namespaces([
            LinuxNamespaceType::Cgroup,
            LinuxNamespaceType::Ipc,
            LinuxNamespaceType::Mount,
            LinuxNamespaceType::Network,
            LinuxNamespaceType::Pid,
            LinuxNamespaceType::Time,
            LinuxNamespaceType::User,
            LinuxNamespaceType::Uts,
        ])
        .cgroup(CgroupBuilder::default().v1(false).v2(true).build()?)
        .seccomp(SeccompBuilder::default().enabled(true).build()?)
        .mount_extensions(MountExtensionsBuilder::default().idmap(idmap).build()?)
        .build()?;
    FeaturesBuilder::default()
        .oci_version_min(OLDEST)
        .oci_version_max(NEWEST)
        .hooks(hooks.map(String::from))
        .mount_options(MOUNT_OPTIONS.map(String::from))
        .linux(linux)
        .build()
}

fn runtime_info() -> Result<RuntimeInfo, Box<dyn std::error::Error + Send + Sync>> {
    Ok(RuntimeInfo {
        name: NAME.into(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        }),
        features: MessageField::some(Any {
            type_url: FEATURES.into(),
            value: serde_json::to_vec(&features()?)?,
            ..Default::default()
        }),
        ..Default::default()
    })
}

/// Prints the version for people.
///
/// # Errors
/// When standard output cannot be written.
pub fn version() -> io::Result<()> {
    writeln!(
        io::stdout(),
        "{} {}",
        env!("CARGO_PKG_NAME"),
        env!("CARGO_PKG_VERSION")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As containerd 2 looks at it.
    #[test]
    fn containerd_finds_what_it_asks_for() {
        let info = runtime_info().unwrap();
        let features = info.features.unwrap();
        assert_eq!(features.type_url, FEATURES);
        let document: serde_json::Value = serde_json::from_slice(&features.value).unwrap();
        assert_eq!(
            document["linux"]["mountExtensions"]["idmap"]["enabled"],
            true
        );
        let has = |list: &serde_json::Value, name: &str| {
            list.as_array().unwrap().iter().any(|each| each == name)
        };
        assert!(has(&document["linux"]["namespaces"], "user"));
        assert!(has(&document["mountOptions"], "rro"));
    }
}
