// SPDX-License-Identifier: Apache-2.0
//! Whether a pod's memory may be merged (KSM), and with whose.

use bulkhead_ksm_throttler::group::{BadName, Name};
use bulkhead_vmm_api::Pages;
use oci_spec::runtime::Spec;

use super::SpecError;
use crate::config::Hypervisor;

/// The group among whose pods pages may be merged; empty: none. Overrides the
/// configuration's.
const ANNOTATION: &str = "io.bulkhead.hypervisor.merge_group";

/// The merge group of the pod whose first container has this spec: its
/// annotation's, else the configuration's.
///
/// Who is in a group can find out something of what the others have in memory.
/// So a pod cannot choose freely: only groups that the configuration names.
///
/// # Errors
/// The annotation is not a name, or not an allowed one; or the pod's memory is in
/// pages that cannot be merged.
pub fn merge_group(spec: &Spec, config: &Hypervisor) -> Result<Option<Name>, SpecError> {
    let group = wanted(spec, config)?;
    if group.is_some() && config.pages == Pages::Huge {
        return Err(SpecError::field(
            "hypervisor.merge_group",
            "memory in reserved huge pages (hypervisor.pages) is never merged: the pod can have one of both",
        ));
    }
    Ok(group)
}

fn wanted(spec: &Spec, config: &Hypervisor) -> Result<Option<Name>, SpecError> {
    let annotations = spec.annotations().as_ref();
    let Some(text) = annotations.and_then(|all| all.get(ANNOTATION)) else {
        return Ok(config.merge_group.clone());
    };
    if text.is_empty() {
        return Ok(None);
    }
    let field = |problem| SpecError::field(format!("annotations: {ANNOTATION}"), problem);
    let name: Name = text
        .parse()
        .map_err(|error: BadName| field(error.to_string()))?;
    let mut allowed = config
        .merge_group
        .iter()
        .chain(&config.allowed_merge_groups);
    if !allowed.any(|allowed| *allowed == name) {
        return Err(field(format!(
            "{text:?} is not allowed here: hypervisor.allowed_merge_groups would have to name it"
        )));
    }
    Ok(Some(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(annotation: Option<&str>, config: &Hypervisor) -> Result<Option<String>, String> {
        let json = match annotation {
            Some(value) => {
                format!(r#"{{"ociVersion":"1.0.2","annotations":{{"{ANNOTATION}":"{value}"}}}}"#)
            }
            None => r#"{"ociVersion":"1.0.2"}"#.into(),
        };
        let spec: Spec = serde_json::from_str(&json).unwrap();
        merge_group(&spec, config)
            .map(|name| name.map(|name| name.to_string()))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn nothing_is_merged_unless_asked() {
        let config = Hypervisor::default();
        assert_eq!(group(None, &config), Ok(None));
        assert_eq!(group(Some(""), &config), Ok(None));
        let text = group(Some("red"), &config).unwrap_err();
        assert!(text.contains(ANNOTATION), "{text}");
        assert!(text.contains("allowed_merge_groups"), "{text}");
    }

    #[test]
    fn a_pod_may_only_name_what_is_allowed() {
        let config = Hypervisor {
            merge_group: Some("red".parse().unwrap()),
            allowed_merge_groups: vec!["blue".parse().unwrap()],
            ..Hypervisor::default()
        };
        assert_eq!(group(None, &config), Ok(Some("red".into())));
        assert_eq!(group(Some("red"), &config), Ok(Some("red".into())));
        assert_eq!(group(Some("blue"), &config), Ok(Some("blue".into())));
        assert_eq!(group(Some(""), &config), Ok(None));
        for bad in ["green", "Red", "red ", "-", "../x"] {
            assert!(group(Some(bad), &config).is_err(), "{bad}");
        }
    }
}
