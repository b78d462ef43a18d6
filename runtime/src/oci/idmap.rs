// SPDX-License-Identifier: Apache-2.0
//! Id-mapped mounts of a container (config.md, "Mounts": `uidMappings`,
//! `gidMappings`, and the options `idmap` and `ridmap`). The host makes them:
//! what the guest sees through virtio-fs has the ids that the mount shows, and
//! the guest's ids are those of the host to the specification.

use oci_spec::runtime::{Linux, LinuxIdMapping, Mount};

use crate::resource::idmap::{IdMapping, IdRange, Mapped};

/// The mapping that a mount asks for; none: it asks for none.
///
/// # Errors
/// What is wrong with it.
pub fn mapped(mount: &Mount, linux: Option<&Linux>) -> Result<Option<Mapped>, String> {
    let options = mount.options().iter().flatten();
    // The last word counts.
    let asked = options.rev().find(|option| is_option(option));
    let (users, groups) = (ranges(mount.uid_mappings()), ranges(mount.gid_mappings()));
    let (users, groups) = match (users.is_empty(), groups.is_empty()) {
        (false, false) => (users, groups),
        (true, true) if asked.is_none() => return Ok(None),
        (true, true) => {
            let of = |list: fn(&Linux) -> &Option<Vec<LinuxIdMapping>>| {
                linux.map(|linux| ranges(list(linux))).unwrap_or_default()
            };
            let (users, groups) = (of(Linux::uid_mappings), of(Linux::gid_mappings));
            if users.is_empty() || groups.is_empty() {
                return Err(
                    "idmap without uidMappings and gidMappings means those of the container's \
                     user namespace, and it has none: give the mount its own"
                        .into(),
                );
            }
            (users, groups)
        }
        _ => {
            return Err(
                "one of uidMappings and gidMappings is missing: users and groups are mapped \
                 together, give both"
                    .into(),
            )
        }
    };
    let ids = IdMapping::new(users, groups).map_err(|why| format!("uid/gidMappings: {why}"))?;
    Ok(Some(Mapped {
        ids,
        recursive: asked.is_some_and(|option| option == "ridmap"),
    }))
}

/// Whether a mount's option asks for a mapping; nobody else needs to know it.
pub fn is_option(option: &str) -> bool {
    matches!(option, "idmap" | "ridmap")
}

fn ranges(list: &Option<Vec<LinuxIdMapping>>) -> Vec<IdRange> {
    list.iter()
        .flatten()
        .map(|range| IdRange {
            stored: range.container_id(),
            shown: range.host_id(),
            size: range.size(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(mount: &str, linux: &str) -> Result<Option<Mapped>, String> {
        let mount = format!(r#"{{"destination":"/x","type":"bind","source":"/x"{mount}}}"#);
        let linux: Linux = serde_json::from_str(linux).unwrap();
        mapped(&serde_json::from_str(&mount).unwrap(), Some(&linux))
    }

    const USERNS: &str = r#"{"uidMappings":[{"containerID":0,"hostID":7000,"size":9}],
        "gidMappings":[{"containerID":0,"hostID":8000,"size":9}]}"#;

    #[test]
    fn a_mount_has_its_own_ids_or_the_containers() {
        assert_eq!(asked("", USERNS), Ok(None));
        let empty = r#","uidMappings":[],"gidMappings":[]"#;
        assert_eq!(asked(empty, USERNS), Ok(None));
        for (options, recursive) in [
            (r#"["bind","idmap"]"#, false),
            (r#"["rbind","idmap","ridmap"]"#, true),
        ] {
            let found = asked(&format!(r#","options":{options}"#), USERNS).unwrap();
            let found = found.unwrap();
            assert_eq!((found.ids.user(1), found.ids.group(1)), (7001, 8001));
            assert_eq!(found.recursive, recursive);
        }
        let own = r#","uidMappings":[{"containerID":0,"hostID":1,"size":1}],
            "gidMappings":[{"containerID":0,"hostID":2,"size":1}]"#;
        let found = asked(own, USERNS).unwrap().unwrap();
        assert_eq!((found.ids.user(0), found.ids.group(0)), (1, 2));
        assert!(!found.recursive);
    }

    #[test]
    fn half_a_mapping_is_refused() {
        let half = r#","uidMappings":[{"containerID":0,"hostID":1,"size":1}]"#;
        for (mount, linux, word) in [
            (half, USERNS, "give both"),
            (r#","options":["idmap"]"#, "{}", "user namespace"),
            (
                r#","uidMappings":[{"containerID":0,"hostID":1,"size":0}],
                  "gidMappings":[{"containerID":0,"hostID":1,"size":1}]"#,
                "{}",
                "users: a range is empty",
            ),
        ] {
            let why = asked(mount, linux).unwrap_err();
            assert!(why.contains(word), "{why}");
        }
    }
}
