// SPDX-License-Identifier: Apache-2.0
//! Mounts and directory trees as journalled resources.

use std::{
    ffi::OsString,
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{umount2, MntFlags},
};
use rustix::{
    fs::{openat2, Mode, OFlags, ResolveFlags, CWD},
    mount::{
        mount_change, move_mount, open_tree, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    },
};

use crate::sys;

/// Mounts the file or directory `source` on `target` as well. The copy has
/// nothing to do with the original's later mounts, in either direction: so
/// unmounting it never unmounts anything of others.
///
/// # Errors
/// What the kernel says.
pub fn bind(source: &Path, target: &Path, recursive: bool, read_only: bool) -> io::Result<()> {
    attach(source, target, recursive, read_only, false)
}

/// As [`bind`] with everything below, to write to; what is mounted below the
/// original later shows in the copy too, where the original passes it on.
///
/// # Errors
/// What the kernel says.
pub fn follow(source: &Path, target: &Path) -> io::Result<()> {
    attach(source, target, true, false, true)
}

fn attach(
    source: &Path,
    target: &Path,
    recursive: bool,
    read_only: bool,
    receives: bool,
) -> io::Result<()> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree = open_tree(CWD, source, flags)?;
    // Before it is attached anywhere.
    sys::isolate_mount(tree.as_fd(), recursive, read_only, receives)?;
    move_mount(
        &tree,
        "",
        CWD,
        target,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )?;
    Ok(())
}

/// Mounts a directory on itself, as a mount that passes on to its copies in
/// other namespaces what is mounted below it.
///
/// # Errors
/// What the kernel says.
pub fn share(directory: &Path) -> io::Result<()> {
    bind(directory, directory, false, false)?;
    Ok(mount_change(directory, MountPropagationFlags::SHARED)?)
}

/// A path below `root` that does not lead out of it, whatever symbolic links
/// are in there; valid as long as the descriptor is open.
///
/// # Errors
/// What the kernel says.
pub fn inside(root: &Path, path: &Path) -> io::Result<(OwnedFd, PathBuf)> {
    let root = openat2(
        CWD,
        root,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::empty(),
    )?;
    let found = openat2(
        &root,
        path,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )?;
    let name = PathBuf::from(format!("/proc/self/fd/{}", found.as_raw_fd()));
    Ok((found, name))
}

/// Unmounts everything stacked on `target`; nothing when there is nothing.
/// Detaches, so that an open file in it does not keep it.
pub fn unmount(target: &Path) -> io::Result<()> {
    loop {
        match umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // Not a mount point, or not there.
            Err(Errno::EINVAL | Errno::ENOENT | Errno::ENOTDIR) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Removes a directory and what is in it, after unmounting everything mounted
/// on or below it: what is mounted there belongs to others and is never
/// deleted through.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    let mut below = mount_points_below(path)?;
    // Deepest and newest first.
    below.reverse();
    for target in &below {
        unmount(target)?;
    }
    if let Some(left) = mount_points_below(path)?.first() {
        return Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            format!("{} is still mounted", left.display()),
        ));
    }
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Mount points at or below `path` in this mount namespace, in mount order.
pub fn mount_points_below(path: &Path) -> io::Result<Vec<PathBuf>> {
    let table = std::fs::read("/proc/self/mountinfo")?;
    Ok(table
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(unescape)
        .filter(|target| target.starts_with(path))
        .collect())
}

/// Undoes the octal escapes of /proc/self/mountinfo (proc(5)).
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = (first == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_undone() {
        assert_eq!(unescape(br"/a\040b\134c"), PathBuf::from(r"/a b\c"));
        assert_eq!(unescape(br"/a\0"), PathBuf::from(r"/a\0"));
    }

    #[test]
    fn a_copy_follows_the_original_and_not_the_other_way_round() {
        if !nix::unistd::geteuid().is_root() {
            println!(
                "SKIPPED: a_copy_follows_the_original_and_not_the_other_way_round: needs root"
            );
            return;
        }
        let base = std::env::temp_dir().join(format!("bulkhead-follow-{}", std::process::id()));
        let _ = remove_tree(&base);
        let at = |name: &str| base.join(name);
        for name in ["original/in", "shared/copy", "shared/apart", "extra"] {
            std::fs::create_dir_all(at(name)).unwrap();
        }
        std::fs::write(at("extra/file"), "seen").unwrap();
        share(&at("original")).unwrap();
        share(&at("shared")).unwrap();
        follow(&at("original"), &at("shared/copy")).unwrap();
        bind(&at("original"), &at("shared/apart"), true, false).unwrap();
        bind(&at("extra"), &at("original/in"), false, false).unwrap();
        assert_eq!(std::fs::read(at("shared/copy/in/file")).unwrap(), b"seen");
        assert!(!at("shared/apart/in/file").exists());
        // Taking the copy away leaves the original as it is.
        remove_tree(&at("shared")).unwrap();
        assert!(at("original/in/file").exists());
        remove_tree(&base).unwrap();
    }

    #[test]
    fn a_tree_is_removed_without_touching_what_is_mounted_in_it() {
        if !nix::unistd::geteuid().is_root() {
            println!(
                "SKIPPED: a_tree_is_removed_without_touching_what_is_mounted_in_it: needs root"
            );
            return;
        }
        let base = std::env::temp_dir().join(format!("bulkhead-tree-{}", std::process::id()));
        let _ = remove_tree(&base);
        let precious = base.join("precious");
        let tree = base.join("tree");
        std::fs::create_dir_all(tree.join("in")).unwrap();
        std::fs::create_dir_all(&precious).unwrap();
        std::fs::write(precious.join("file"), "kept").unwrap();
        nix::mount::mount(
            Some(&precious),
            &tree.join("in"),
            None::<&str>,
            nix::mount::MsFlags::MS_BIND,
            None::<&str>,
        )
        .unwrap();
        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
        assert_eq!(std::fs::read(precious.join("file")).unwrap(), b"kept");
        remove_tree(&tree).unwrap();
        remove_tree(&base).unwrap();
    }
}
