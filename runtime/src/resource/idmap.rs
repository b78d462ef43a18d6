// SPDX-License-Identifier: Apache-2.0
//! Which ids the files of a mount have: id-mapped mounts (mount_setattr(2),
//! "ID-mapped mounts").
//!
//! The kernel takes a mapping as a user namespace. One that nobody lives in is
//! enough: it is made with a process that ends at once, and its maps are
//! written, and it is opened, while that process has not been waited for.

use std::{
    fmt::Write,
    fs::{self, File},
    io,
    os::fd::OwnedFd,
};

use crate::sys;

/// Lines that the kernel takes in a map (user_namespaces(7)).
const MOST: usize = 340;

/// Whose files are that have an id without a mapping, as the kernel shows them
/// (/proc/sys/kernel/overflowuid).
const NOBODY: u32 = 65534;

/// A range of ids that becomes another of the same size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange {
    /// The first on the file system.
    pub stored: u32,
    /// The first that the mount shows for it.
    pub shown: u32,
    /// How many.
    pub size: u32,
}

/// Ids of users and of groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMapping {
    users: Vec<IdRange>,
    groups: Vec<IdRange>,
}

/// Which mounts of a tree have a mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapped {
    /// The mapping.
    pub ids: IdMapping,
    /// That of everything mounted below as well.
    pub recursive: bool,
}

impl IdMapping {
    /// Checks both lists.
    ///
    /// # Errors
    /// What is wrong with one, naming which.
    pub fn new(users: Vec<IdRange>, groups: Vec<IdRange>) -> Result<Self, String> {
        check(&users).map_err(|why| format!("users: {why}"))?;
        check(&groups).map_err(|why| format!("groups: {why}"))?;
        Ok(Self { users, groups })
    }

    /// The user that a file shows.
    pub fn user(&self, stored: u32) -> u32 {
        shown(&self.users, stored)
    }

    /// The group that a file shows.
    pub fn group(&self, stored: u32) -> u32 {
        shown(&self.groups, stored)
    }

    /// A user namespace with these maps. Takes a privilege (CAP_SYS_ADMIN).
    ///
    /// # Errors
    /// What the kernel says.
    pub fn namespace(&self) -> io::Result<OwnedFd> {
        let ended = sys::ended_in_user_namespace().map_err(|error| {
            let why = match error.raw_os_error() {
                Some(libc::ENOSPC) => "there are too many (user.max_user_namespaces)",
                _ => "it cannot be made",
            };
            io::Error::new(error.kind(), format!("user namespace: {why}: {error}"))
        })?;
        let pid = ended.pid();
        // With privileges: the groups need no more than the users.
        for (name, ranges) in [("gid_map", &self.groups), ("uid_map", &self.users)] {
            fs::write(format!("/proc/{pid}/{name}"), text(ranges)).map_err(|error| {
                let why = match error.raw_os_error() {
                    Some(libc::EINVAL) => "two of its ranges overlap, or it is too long: ",
                    _ => "",
                };
                io::Error::new(error.kind(), format!("id mapping ({name}): {why}{error}"))
            })?;
        }
        Ok(File::open(format!("/proc/{pid}/ns/user"))?.into())
    }
}

fn check(ranges: &[IdRange]) -> Result<(), &'static str> {
    if ranges.is_empty() {
        return Err("there is no range");
    }
    if ranges.len() > MOST {
        return Err("there are more than 340 ranges");
    }
    for range in ranges {
        let fits = |first: u32| first.checked_add(range.size).is_some();
        if range.size == 0 || !fits(range.stored) || !fits(range.shown) {
            return Err("a range is empty or leaves the 32 bits of ids");
        }
    }
    Ok(())
}

fn shown(ranges: &[IdRange], stored: u32) -> u32 {
    let found = ranges.iter().find_map(|range| {
        let offset = stored.checked_sub(range.stored)?;
        (offset < range.size).then(|| range.shown + offset)
    });
    found.unwrap_or(NOBODY)
}

/// As /proc/PID/uid_map takes it.
fn text(ranges: &[IdRange]) -> String {
    let mut text = String::new();
    for IdRange {
        stored,
        shown,
        size,
    } in ranges
    {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{stored} {shown} {size}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(stored: u32, shown: u32, size: u32) -> IdRange {
        IdRange {
            stored,
            shown,
            size,
        }
    }

    #[test]
    fn ids_are_looked_up() {
        let users = vec![range(0, 100_000, 10), range(10, 5, 1)];
        let ids = IdMapping::new(users, vec![range(7, 0, 1)]).unwrap();
        let users: Vec<u32> = [0, 9, 10, 11].map(|id| ids.user(id)).into();
        assert_eq!(users, [100_000, 100_009, 5, NOBODY]);
        assert_eq!((ids.group(7), ids.group(0)), (0, NOBODY));
        assert_eq!(text(&ids.users), "0 100000 10\n10 5 1\n");
    }

    #[test]
    fn ranges_are_checked() {
        let good = || vec![range(0, 100_000, 65536)];
        for (users, groups, word) in [
            (vec![], good(), "users: there is no range"),
            (good(), vec![], "groups: there is no range"),
            (vec![range(0, 0, 0)], good(), "users: a range is empty"),
            (good(), vec![range(0, u32::MAX, 2)], "groups: a range"),
            (good(), vec![range(1, 1, 1); 341], "groups: there are more"),
        ] {
            let why = IdMapping::new(users, groups).unwrap_err();
            assert!(why.starts_with(word), "{why}");
        }
    }

    #[test]
    fn a_namespace_leaves_no_process() {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIPPED: a_namespace_leaves_no_process: needs root");
            return;
        }
        let ids = IdMapping::new(vec![range(0, 9, 1)], vec![range(0, 9, 1)]).unwrap();
        let namespace = ids.namespace().unwrap();
        let of =
            |path: &str| fs::metadata(path).map(|meta| std::os::unix::fs::MetadataExt::ino(&meta));
        let own = of("/proc/self/ns/user").unwrap();
        let path = format!(
            "/proc/self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(&namespace)
        );
        assert_ne!(of(&path).unwrap(), own);
        let children = fs::read_to_string("/proc/thread-self/children").unwrap();
        assert_eq!(children, "");
        // What cannot be told from one range alone.
        let twice = vec![range(0, 9, 2), range(1, 20, 1)];
        let ids = IdMapping::new(twice, vec![range(0, 9, 1)]).unwrap();
        let why = ids.namespace().unwrap_err().to_string();
        assert!(why.contains("uid_map") && why.contains("overlap"), "{why}");
        let children = fs::read_to_string("/proc/thread-self/children").unwrap();
        assert_eq!(children, "");
    }
}
