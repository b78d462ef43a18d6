// SPDX-License-Identifier: Apache-2.0
//! User namespaces: which ids of the guest a container's ids are
//! (runtime-spec config-linux.md, "User namespace mappings").

use std::fmt::Write;
use std::fs;

use bulkhead_agent_protocol::oci;
use libc::pid_t;

use crate::error::{AgentError, Context, Result};

/// Lines that the kernel takes.
const MOST_LINES: usize = 340;

/// The ids of a container's user namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserPlan {
    users: IdMap,
    groups: IdMap,
}

/// Ranges of ids: first of the container, first of the guest, how many.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdMap(Vec<(u32, u32, u32)>);

impl UserPlan {
    /// Checks both lists.
    ///
    /// # Errors
    /// [`AgentError::Invalid`] naming the field.
    pub fn new(users: &[oci::IdMapping], groups: &[oci::IdMapping]) -> Result<Self> {
        let (users, groups) = (
            IdMap::new(users, "linux.uidMappings")?,
            IdMap::new(groups, "linux.gidMappings")?,
        );
        for (map, field) in [
            (&users, "linux.uidMappings"),
            (&groups, "linux.gidMappings"),
        ] {
            // Nobody else could set the container up.
            if map.outside(0).is_none() {
                return Err(AgentError::Invalid(format!("{field}: 0 is not mapped")));
            }
        }
        Ok(Self { users, groups })
    }

    /// The guest's id of a user of the container.
    pub fn outside(&self, uid: u32) -> Option<u32> {
        self.users.outside(uid)
    }

    /// Fills in the namespace of `pid`, which is new.
    ///
    /// # Errors
    /// The kernel's, naming the file.
    pub fn write(&self, pid: pid_t) -> Result<()> {
        // The group map by one with privileges: then setgroups(2) works inside.
        for (map, name) in [(&self.groups, "gid_map"), (&self.users, "uid_map")] {
            let path = format!("/proc/{pid}/{name}");
            fs::write(&path, map.text()).step(|| format!("write {path}"))?;
        }
        Ok(())
    }
}

impl IdMap {
    /// Checks a list.
    ///
    /// # Errors
    /// [`AgentError::Invalid`] naming the field.
    pub fn new(list: &[oci::IdMapping], field: &str) -> Result<Self> {
        let wrong = |why: &str| AgentError::Invalid(format!("{field}: {why}"));
        if list.is_empty() {
            return Err(wrong("a user namespace needs a mapping"));
        }
        if list.len() > MOST_LINES {
            return Err(wrong("more than 340 ranges"));
        }
        for range in list {
            let fits = |first: u32| first.checked_add(range.size).is_some();
            if range.size == 0 || !fits(range.container_id) || !fits(range.host_id) {
                return Err(wrong("a range is empty or leaves the 32 bits of ids"));
            }
        }
        let ranges = list
            .iter()
            .map(|range| (range.container_id, range.host_id, range.size));
        Ok(Self(ranges.collect()))
    }

    /// The guest's id of one of the container.
    fn outside(&self, id: u32) -> Option<u32> {
        self.0.iter().find_map(|(inside, outside, size)| {
            let offset = id.checked_sub(*inside)?;
            (offset < *size).then(|| outside + offset)
        })
    }

    /// As /proc/PID/uid_map takes it.
    fn text(&self) -> String {
        let mut text = String::new();
        for (inside, outside, size) in &self.0 {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{inside} {outside} {size}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(container_id: u32, host_id: u32, size: u32) -> oci::IdMapping {
        oci::IdMapping {
            container_id,
            host_id,
            size,
            ..Default::default()
        }
    }

    #[test]
    fn ids_are_looked_up() {
        let map = IdMap::new(&[range(0, 100_000, 10), range(10, 5, 1)], "f").unwrap();
        assert_eq!(map.outside(0), Some(100_000));
        assert_eq!(map.outside(9), Some(100_009));
        assert_eq!(map.outside(10), Some(5));
        assert_eq!(map.outside(11), None);
        assert_eq!(map.text(), "0 100000 10\n10 5 1\n");
    }

    #[test]
    fn mappings_are_checked() {
        let whole = [range(0, 100_000, 65536)];
        assert!(UserPlan::new(&whole, &whole).is_ok());
        for (users, groups, field) in [
            (&[][..], &whole[..], "linux.uidMappings"),
            (&whole, &[range(1, 1, 1)], "linux.gidMappings: 0 is"),
            (&[range(0, 1, 0)], &whole, "linux.uidMappings"),
            (&[range(0, u32::MAX, 2)], &whole, "linux.uidMappings"),
        ] {
            let text = UserPlan::new(users, groups).unwrap_err().to_string();
            assert!(text.starts_with(field), "{text}");
        }
    }
}
