// SPDX-License-Identifier: Apache-2.0
//! The container's /dev (runtime-spec config-linux.md "Devices", "Default
//! Devices", and runtime-linux.md "Dev symbolic links").

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{fchmodat, fstatat, mknodat, FchmodatFlags, Mode, SFlag};
use nix::unistd::{fchownat, symlinkat, unlinkat, Gid, Uid, UnlinkatFlags};

use super::path::{make_file, parent};
use super::report::{At, Done};
use crate::container::mounts::Source;
use crate::container::plan::{ContainerPlan, DevicePlan};
use crate::sys::mount::{attach, clone_tree, cwd};

const DEFAULTS: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

const LINKS: [(&str, &str); 6] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
    ("/proc/kcore", "/dev/core"),
    ("pts/ptmx", "/dev/ptmx"),
];

/// Makes nodes and links, unless the specification brings a /dev from outside.
pub fn make_all(plan: &ContainerPlan, root: BorrowedFd<'_>) -> Done<()> {
    let dev = Path::new("/dev");
    let from_outside = plan
        .mounts
        .iter()
        .any(|mount| mount.destination == dev && matches!(mount.source, Source::Bind { .. }));
    if from_outside {
        return Ok(());
    }
    let mut places = Places { root, last: None };
    for (path, major, minor) in DEFAULTS {
        make(
            &mut places,
            &DevicePlan {
                path: PathBuf::from(path),
                kind: libc::S_IFCHR,
                number: libc::makedev(major, minor),
                mode: 0o666,
                uid: 0,
                gid: 0,
            },
        )?;
    }
    for device in &plan.devices {
        // Part of the default ones already; an empty path is the root.
        if device.path == Path::new("/dev/ptmx") || device.path == Path::new("/") {
            continue;
        }
        make(&mut places, device)?;
    }
    for (target, path) in LINKS {
        let path = Path::new(path);
        let (directory, name) = places.parent(path)?;
        match symlinkat(Path::new(target), directory, name.as_os_str()) {
            Ok(()) => {}
            // Images bring some of these; ptmx must be the container's own.
            Err(Errno::EEXIST) if !path.ends_with("ptmx") => {}
            Err(Errno::EEXIST) => {
                unlinkat(directory, name.as_os_str(), UnlinkatFlags::NoRemoveDir)
                    .at("replace", path)?;
                symlinkat(Path::new(target), directory, name.as_os_str()).at("link", path)?;
            }
            Err(errno) => return Err(errno).at("link", path),
        }
    }
    Ok(())
}

/// Finds the directories that nodes are in. Nearly all are in one.
struct Places<'a> {
    root: BorrowedFd<'a>,
    last: Option<(PathBuf, OwnedFd)>,
}

impl Places<'_> {
    /// As [`parent`].
    fn parent(&mut self, path: &Path) -> Done<(&OwnedFd, OsString)> {
        let above = path.parent().unwrap_or(Path::new("/"));
        let last = match self.last.take() {
            Some(last) if last.0 == above => last,
            _ => (above.to_owned(), parent(self.root, path)?.0),
        };
        let name = path.file_name().unwrap_or_default().to_owned();
        Ok((&self.last.insert(last).1, name))
    }
}

fn make(places: &mut Places<'_>, device: &DevicePlan) -> Done<()> {
    let path = &device.path;
    let root = places.root;
    let (directory, name) = places.parent(path)?;
    let name = name.as_os_str();
    let kind = SFlag::from_bits_retain(device.kind);
    let mode = Mode::from_bits_retain(device.mode);
    match mknodat(directory, name, kind, mode, device.number) {
        Err(Errno::EEXIST) => {
            let there = fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW);
            let there = there.at("inspect", path)?;
            let same =
                there.st_mode & libc::S_IFMT == device.kind && there.st_rdev == device.number;
            if !same {
                // The image's, a link to a file of the guest perhaps.
                unlinkat(directory, name, UnlinkatFlags::NoRemoveDir).at("replace", path)?;
                mknodat(directory, name, kind, mode, device.number).at("create device", path)?;
            }
        }
        Ok(()) => {}
        Err(Errno::EPERM) => return bind(root, path),
        Err(errno) => return Err(errno).at("create device", path),
    }
    // The mask of the agent took part in the mode.
    fchmodat(directory, name, mode, FchmodatFlags::FollowSymlink).at("set mode of", path)?;
    fchownat(
        directory,
        name,
        Some(Uid::from_raw(device.uid)),
        Some(Gid::from_raw(device.gid)),
        AtFlags::AT_SYMLINK_NOFOLLOW,
    )
    .at("set owner of", path)
}

/// Where nodes cannot be made the guest's own serve.
fn bind(root: BorrowedFd<'_>, path: &Path) -> Done<()> {
    let tree = clone_tree(cwd(), path, false).at("open device", path)?;
    let place = make_file(root, path, 0o666)?;
    attach(tree.as_fd(), place.as_fd()).at("bind device", path)
}
