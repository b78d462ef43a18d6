// SPDX-License-Identifier: Apache-2.0
//! What a pod's annotations change of its configuration: `io.bulkhead.` with a
//! key's name, where the configuration allows it.

use oci_spec::runtime::Spec;

use super::SpecError;
use crate::config::{nearest, Config, Key, KEYS};

/// What our annotations begin with.
const PREFIX: &str = "io.bulkhead.";

/// Has an allow-list of its own, by value (see [`super::merge_group`]).
const MERGE_GROUP: &str = "hypervisor.merge_group";

/// Every annotation that can be allowed.
pub fn annotation_names() -> Vec<String> {
    KEYS.iter()
        .filter(|key| key.annotation && key.name != MERGE_GROUP)
        .map(|key| format!("{PREFIX}{}", key.name))
        .collect()
}

/// The configuration for the pod whose first container has this spec.
///
/// # Errors
/// An annotation of ours does not exist, is not allowed, or has a value of the
/// wrong type or out of its bounds; the error names it.
pub fn configured(spec: &Spec, config: &Config) -> Result<Config, SpecError> {
    let mut config = config.clone();
    let mut ours: Vec<(&String, &String)> = spec
        .annotations()
        .iter()
        .flatten()
        .filter(|(name, _)| name.starts_with(PREFIX))
        .collect();
    // Which error is told does not depend on a map's order.
    ours.sort();
    for (name, value) in ours {
        let field = |problem| SpecError::field(format!("annotations: {name}"), problem);
        let known = Key::named(&name[PREFIX.len()..]).filter(|key| key.annotation);
        let Some(key) = known else {
            let names = annotation_names();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let hint = nearest(name, &names)
                .map_or_else(String::new, |near| format!(" (did you mean {near}?)"));
            return Err(field(format!("there is no such annotation{hint}")));
        };
        if key.name == MERGE_GROUP {
            continue;
        }
        if !config.runtime.allowed_annotations.contains(name) {
            return Err(field(
                "not allowed here: runtime.allowed_annotations would have to name it".into(),
            ));
        }
        key.set_text(&mut config, value).map_err(field)?;
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apply(name: &str, value: &str, config: &Config) -> Result<Config, String> {
        let json =
            serde_json::json!({"ociVersion": "1.0.2", "annotations": {name: value, "other": "x"}});
        let spec: Spec = serde_json::from_value(json).unwrap();
        configured(&spec, config).map_err(|error| error.to_string())
    }

    #[test]
    fn sizing_is_allowed_by_default_and_nothing_else() {
        let config = Config::default();
        let sized = apply("io.bulkhead.hypervisor.vcpus", "3", &config).unwrap();
        assert_eq!(sized.hypervisor.vcpus, 3);
        let sized = apply("io.bulkhead.hypervisor.memory_mib", "512", &config).unwrap();
        assert_eq!(sized.hypervisor.memory_mib, 512);
        let sizing: Vec<&String> = config.runtime.allowed_annotations.iter().collect();
        for name in annotation_names() {
            if sizing.contains(&&name) {
                continue;
            }
            let text = apply(&name, "1", &config).unwrap_err();
            assert_eq!(
                text,
                format!("annotations: {name}: not allowed here: runtime.allowed_annotations would have to name it")
            );
        }
    }

    #[test]
    fn what_is_allowed_has_its_keys_type() {
        let mut config = Config::default();
        config.runtime.allowed_annotations = annotation_names();
        let reporting = "io.bulkhead.hypervisor.free_page_reporting";
        let applied = apply(reporting, "false", &config).unwrap();
        assert!(!applied.hypervisor.free_page_reporting);
        assert_eq!(
            apply(reporting, "yes", &config).unwrap_err(),
            format!("annotations: {reporting}: \"yes\" is neither true nor false")
        );
        let pages = "io.bulkhead.hypervisor.pages";
        let applied = apply(pages, "transparent", &config).unwrap();
        assert_eq!(applied.hypervisor.pages.name(), "transparent");
        let timeout = "io.bulkhead.agent.ready_timeout_ms";
        let applied = apply(timeout, "500", &config).unwrap();
        assert_eq!(applied.agent.ready_timeout_ms, 500);
        assert!(apply(timeout, "-1", &config).unwrap_err().contains(timeout));
    }

    #[test]
    fn each_is_in_the_readme() {
        let readme = include_str!("../../../README.md");
        for name in annotation_names() {
            assert!(readme.contains(&format!("| `{name}` |")), "{name}");
        }
    }

    #[test]
    fn what_concerns_the_host_is_no_annotation() {
        let mut config = Config::default();
        config.runtime.allowed_annotations = annotation_names();
        for name in [
            "io.bulkhead.hypervisor.path",
            "io.bulkhead.runtime.state_dir",
            "io.bulkhead.runtime.allowed_annotations",
            "io.bulkhead.debug.crash_at",
            "io.bulkhead.",
        ] {
            let text = apply(name, "/x", &config).unwrap_err();
            assert!(text.contains("there is no such annotation"), "{text}");
        }
        let text = apply("io.bulkhead.hypervisor.memory", "1", &config).unwrap_err();
        assert!(
            text.ends_with("(did you mean io.bulkhead.hypervisor.memory_mib?)"),
            "{text}"
        );
    }
}
