// SPDX-License-Identifier: Apache-2.0
//! Which pod a container belongs to: one shim, and one virtual machine, per
//! pod.

use std::{collections::HashMap, fs, path::Path};

use serde::Deserialize;

/// Annotations that name the pod, in the order in which they count.
const POD: [&str; 2] = [
    "io.containerd.runc.v2.group",
    "io.kubernetes.cri.sandbox-id",
];

/// CRI-O's name of the pod counts for containers only: the pod's own one has
/// it, too.
const CRIO_POD: &str = "io.kubernetes.cri-o.SandboxID";
const CRIO_TYPE: &str = "io.kubernetes.cri-o.ContainerType";

#[derive(Debug, Default, Deserialize)]
struct Annotated {
    #[serde(default)]
    annotations: HashMap<String, String>,
}

/// The pod of the container with this bundle; the container itself where
/// nothing says otherwise. A bundle without a config.json (the sandbox API's)
/// is a pod's own; a broken one is reported when the container is created.
pub fn of_bundle(bundle: &Path, id: &str) -> String {
    let annotated = fs::read(bundle.join("config.json"))
        .ok()
        .and_then(|text| serde_json::from_slice::<Annotated>(&text).ok())
        .unwrap_or_default();
    of_annotations(&annotated.annotations, id)
}

fn of_annotations(annotations: &HashMap<String, String>, id: &str) -> String {
    let named = |name: &str| annotations.get(name).filter(|pod| !pod.is_empty());
    let crio = || {
        named(CRIO_POD)
            .filter(|_| annotations.get(CRIO_TYPE).map(String::as_str) == Some("container"))
    };
    POD.into_iter()
        .find_map(named)
        .or_else(crio)
        .map_or_else(|| id.to_owned(), Clone::clone)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(annotations: &[(&str, &str)]) -> String {
        let annotations = annotations
            .iter()
            .map(|(name, value)| ((*name).into(), (*value).into()))
            .collect();
        of_annotations(&annotations, "own")
    }

    #[test]
    fn annotations_name_the_pod() {
        assert_eq!(group(&[]), "own");
        assert_eq!(group(&[("other", "x")]), "own");
        assert_eq!(group(&[("io.kubernetes.cri.sandbox-id", "pod")]), "pod");
        assert_eq!(
            group(&[
                ("io.kubernetes.cri.sandbox-id", "pod"),
                ("io.containerd.runc.v2.group", "group"),
            ]),
            "group"
        );
        assert_eq!(group(&[("io.kubernetes.cri.sandbox-id", "")]), "own");
    }

    #[test]
    fn crio_names_the_pod_for_containers() {
        assert_eq!(group(&[(CRIO_POD, "pod"), (CRIO_TYPE, "container")]), "pod");
        assert_eq!(group(&[(CRIO_POD, "pod"), (CRIO_TYPE, "sandbox")]), "own");
        assert_eq!(group(&[(CRIO_POD, "pod")]), "own");
    }

    #[test]
    fn a_bundle_without_a_usable_specification_is_its_own_pod() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(of_bundle(bundle.path(), "own"), "own");
        let config = bundle.path().join("config.json");
        for text in ["{ \"ociVersion\": ", "[]", "{\"annotations\": 3}"] {
            fs::write(&config, text).unwrap();
            assert_eq!(of_bundle(bundle.path(), "own"), "own", "{text}");
        }
        fs::write(
            &config,
            r#"{"ociVersion":"1.0.2","annotations":{"io.kubernetes.cri.sandbox-id":"pod"}}"#,
        )
        .unwrap();
        assert_eq!(of_bundle(bundle.path(), "own"), "pod");
    }
}
