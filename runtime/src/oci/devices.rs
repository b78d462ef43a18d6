// SPDX-License-Identifier: Apache-2.0
//! Devices of a specification (config-linux.md, "Devices" and "Allowed Device
//! list"). Their numbers are the host's; the guest's kernel has given out its
//! own. What both mean is the device's name, which the agent looks up.

use std::{fs, path::PathBuf};

use bulkhead_agent_protocol::oci;

use super::SpecError;

/// Majors of characters devices whose minors mean the same in every kernel:
/// memory, terminals and pseudo-terminals (the kernel's list of devices).
fn is_fixed(kind: &str, major: i64) -> bool {
    matches!(kind, "c" | "u") && matches!(major, 1 | 5 | 136..=143)
}

/// Where the host's kernel tells of its devices.
#[derive(Debug, Clone)]
pub struct HostDevices {
    sys: PathBuf,
    list: PathBuf,
}

impl Default for HostDevices {
    fn default() -> Self {
        Self {
            sys: "/sys/dev".into(),
            list: "/proc/devices".into(),
        }
    }
}

impl HostDevices {
    /// A device's name below /dev.
    fn name(&self, kind: &str, major: i64, minor: i64) -> Option<String> {
        let class = if kind == "b" { "block" } else { "char" };
        let place = self.sys.join(class).join(format!("{major}:{minor}"));
        let text = fs::read_to_string(place.join("uevent")).ok()?;
        let mut lines = text.lines();
        lines.find_map(|line| line.strip_prefix("DEVNAME=").map(str::to_owned))
    }

    /// The name by which a driver has a major number.
    fn driver(&self, kind: &str, major: i64) -> Option<String> {
        let text = fs::read_to_string(&self.list).ok()?;
        let (characters, blocks) = text.split_once("Block devices:")?;
        let section = if kind == "b" { blocks } else { characters };
        section.lines().find_map(|line| {
            let (number, name) = line.trim().split_once(' ')?;
            (number.parse() == Ok(major)).then(|| name.trim().to_owned())
        })
    }

    /// Whether the guest can have what the host calls so: of disks only what a
    /// kernel makes by itself, for the others are somebody else's there.
    fn can_be_had(kind: &str, name: &str) -> bool {
        kind != "b" || name.starts_with("loop")
    }

    /// Names the device that is meant. None: one that the guest cannot have,
    /// of a container that was just given all of the host's.
    ///
    /// # Errors
    /// One that the guest cannot have.
    pub fn device(
        &self,
        mut device: oci::Device,
        all: bool,
    ) -> Result<Option<oci::Device>, SpecError> {
        let kind = device.type_.as_str();
        if kind == "p" || is_fixed(kind, device.major) {
            return Ok(Some(device));
        }
        let name = self.name(kind, device.major, device.minor);
        if name
            .as_deref()
            .is_none_or(|name| !Self::can_be_had(kind, name))
            && kind == "b"
        {
            if all {
                return Ok(None);
            }
            return Err(SpecError::field(
                format!("linux.devices: {}", device.path),
                "block devices of the host are not in the guest: give the container a volume",
            ));
        }
        device.name = name.unwrap_or_default();
        device.optional = all;
        Ok(Some(device))
    }

    /// Names the device or the driver that a rule means. None: it is about what
    /// the guest has not.
    pub fn rule(&self, mut rule: oci::DeviceRule) -> Option<oci::DeviceRule> {
        let kind = rule.type_.clone();
        let given = |number: Option<i64>| number.filter(|number| *number >= 0);
        let Some(major) = given(rule.major) else {
            return Some(rule);
        };
        if !matches!(kind.as_str(), "b" | "c" | "u") || is_fixed(&kind, major) {
            return Some(rule);
        }
        let name = match given(rule.minor) {
            Some(minor) => self.name(&kind, major, minor),
            None => self.driver(&kind, major),
        };
        let name = match name {
            Some(name) if Self::can_be_had(&kind, &name) => name,
            None if kind != "b" => return Some(rule),
            _ => return None,
        };
        match given(rule.minor) {
            Some(_) => rule.name = name,
            None => rule.driver = name,
        }
        Some(rule)
    }
}

/// Whether a container may use all devices, as a privileged one.
pub fn may_use_all(rules: &[oci::DeviceRule]) -> bool {
    let any = |number: Option<i64>| number.is_none_or(|number| number < 0);
    rules.iter().any(|rule| {
        rule.allow && matches!(rule.type_.as_str(), "" | "a") && any(rule.major) && any(rule.minor)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> (tempfile::TempDir, HostDevices) {
        let directory = tempfile::tempdir().unwrap();
        let at = |path: &str| directory.path().join(path);
        for (place, name) in [
            ("char/10:200", "net/tun"),
            ("char/511:3", "special3"),
            ("block/7:0", "loop0"),
            ("block/254:0", "vda"),
        ] {
            fs::create_dir_all(at(place)).unwrap();
            let text = format!("MAJOR=1\nDEVNAME={name}\nDEVMODE=0666\n");
            fs::write(at(place).join("uevent"), text).unwrap();
        }
        let list = "Character devices:\n  1 mem\n 10 misc\n511 special\n\nBlock devices:\n  7 loop\n254 virtblk\n";
        fs::write(at("devices"), list).unwrap();
        let host = HostDevices {
            sys: directory.path().into(),
            list: at("devices"),
        };
        (directory, host)
    }

    fn device(kind: &str, major: i64, minor: i64) -> oci::Device {
        oci::Device {
            path: "/dev/x".into(),
            type_: kind.into(),
            major,
            minor,
            ..Default::default()
        }
    }

    #[test]
    fn devices_are_named() {
        let (_directory, host) = host();
        let name = |kind: &str, major, minor| {
            let named = host.device(device(kind, major, minor), false);
            named.map(|device| device.unwrap().name)
        };
        for (kind, major, minor, wanted) in [
            ("c", 10, 200, "net/tun"),
            ("u", 511, 3, "special3"),
            ("b", 7, 0, "loop0"),
            ("c", 1, 3, ""),
            ("c", 136, 9, ""),
            ("c", 99, 1, ""),
            ("p", 0, 0, ""),
        ] {
            assert_eq!(name(kind, major, minor).unwrap(), wanted, "{major}:{minor}");
        }
        let text = name("b", 254, 0).unwrap_err().to_string();
        assert!(text.starts_with("linux.devices: /dev/x"), "{text}");
        assert!(host.device(device("b", 254, 0), true).unwrap().is_none());
    }

    #[test]
    fn rules_are_named_by_device_or_driver() {
        let (_directory, host) = host();
        let rule = |kind: &str, major, minor| {
            let rule = host.rule(oci::DeviceRule {
                allow: true,
                type_: kind.into(),
                major,
                minor,
                ..Default::default()
            });
            rule.map(|rule| (rule.name, rule.driver))
        };
        let named = |name: &str, driver: &str| Some((name.to_owned(), driver.to_owned()));
        assert_eq!(rule("c", Some(10), Some(200)), named("net/tun", ""));
        assert_eq!(rule("c", Some(511), None), named("", "special"));
        assert_eq!(rule("c", Some(511), Some(-1)), named("", "special"));
        assert_eq!(rule("c", Some(136), None), named("", ""));
        assert_eq!(rule("a", None, None), named("", ""));
        assert_eq!(rule("b", Some(7), None), named("", "loop"));
        assert_eq!(rule("b", Some(254), Some(0)), None);
        assert_eq!(rule("b", Some(254), None), None);
    }

    #[test]
    fn a_privileged_container_may_use_all() {
        let rule = |allow, kind: &str, major| oci::DeviceRule {
            allow,
            type_: kind.into(),
            major,
            ..Default::default()
        };
        assert!(may_use_all(&[
            rule(false, "a", None),
            rule(true, "a", None)
        ]));
        assert!(!may_use_all(&[
            rule(false, "a", None),
            rule(true, "c", Some(10))
        ]));
    }
}
