// SPDX-License-Identifier: Apache-2.0
//! Mounts and directory trees as journalled resources.

use std::{
    ffi::OsString,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{umount2, MntFlags},
};
use rustix::{
    fs::{openat2, statx, AtFlags, Mode, OFlags, ResolveFlags, StatxFlags, CWD},
    mount::{
        mount_change, move_mount, open_tree, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    },
};

use super::idmap::Mapped;
use crate::sys;

/// What a mount of something that is mounted already is to be like.
#[derive(Debug, Clone, Copy, Default)]
pub struct Kind<'a> {
    /// With what is mounted below.
    pub recursive: bool,
    /// Cannot be written through.
    pub read_only: bool,
    /// What is mounted below the original later shows here too, where the
    /// original passes it on.
    pub follows: bool,
    /// Whose the files are.
    pub mapped: Option<&'a Mapped>,
}

/// Mounts the file or directory `source` on `target` as well. The copy has
/// nothing to do with the original's later mounts, in either direction: so
/// unmounting it never unmounts anything of others.
///
/// # Errors
/// What the kernel says.
pub fn bind(source: &Path, target: &Path, recursive: bool, read_only: bool) -> io::Result<()> {
    let kind = Kind {
        recursive,
        read_only,
        ..Kind::default()
    };
    again(source, target, kind)
}

/// As [`bind`], in any way.
///
/// # Errors
/// What the kernel says; of a mapping that cannot be, which file system it is
/// that cannot have it.
pub fn again(source: &Path, target: &Path, kind: Kind<'_>) -> io::Result<()> {
    let tree = detached(source, kind)?;
    // Not through a link.
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(move_mount(&tree, "", CWD, target, flags)?)
}

/// As [`again`], on what is open.
///
/// # Errors
/// As there.
pub fn again_on(source: &Path, target: BorrowedFd<'_>, kind: Kind<'_>) -> io::Result<()> {
    let tree = detached(source, kind)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(&tree, "", target, "", flags)?)
}

/// What is to be mounted, attached nowhere yet.
fn detached(source: &Path, kind: Kind<'_>) -> io::Result<OwnedFd> {
    let tree = copy(source, kind.recursive)?;
    // Before it is attached anywhere.
    sys::isolate_mount(tree.as_fd(), kind.recursive, kind.read_only, kind.follows)?;
    if let Some(Mapped { ids, recursive }) = kind.mapped {
        let namespace = ids.namespace()?;
        let recursive = *recursive && kind.recursive;
        sys::map_mount(tree.as_fd(), recursive, namespace.as_fd())
            .map_err(|error| cannot_be_mapped(source, recursive, &namespace, error))?;
    }
    Ok(tree)
}

/// A copy of a mount, or of a part of it, that is attached nowhere.
fn copy(source: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    Ok(open_tree(CWD, source, flags)?)
}

/// What to say of a mapping that the kernel has refused: which of the file
/// systems it is.
fn cannot_be_mapped(
    source: &Path,
    recursive: bool,
    namespace: &OwnedFd,
    error: io::Error,
) -> io::Error {
    let mut places = vec![source.to_path_buf()];
    if recursive {
        let source = source.canonicalize().unwrap_or_else(|_| source.into());
        let below = mount_points_below(&source).unwrap_or_default();
        places.extend(below.into_iter().filter(|place| *place != source));
    }
    let fails = |place: &PathBuf| {
        let tree = copy(place, false).ok()?;
        let tried = sys::map_mount(tree.as_fd(), false, namespace.as_fd());
        Some((place.clone(), tried.err()?))
    };
    let (place, error) = places
        .iter()
        .find_map(fails)
        .unwrap_or_else(|| (source.into(), error));
    let name = file_system(&place).unwrap_or_else(|| "its file system".into());
    let (place, errno) = (place.display(), error.raw_os_error());
    let why = match errno {
        Some(libc::EINVAL) => format!(
            "{name}, the file system of {place}, cannot be id-mapped by this kernel: use one that \
             can (ext4, xfs, btrfs; tmpfs from Linux 6.3 on) or leave the mapping out"
        ),
        Some(libc::EPERM) => format!(
            "{place} ({name}) cannot be id-mapped: it is already, or its file system was mounted \
             in another user namespace; leave the mapping out"
        ),
        _ => format!("id-map {place} ({name}): {error}"),
    };
    io::Error::new(error.kind(), why)
}

/// The type of the file system that a path is on.
fn file_system(path: &Path) -> Option<String> {
    let found = statx(CWD, path, AtFlags::empty(), StatxFlags::MNT_ID).ok()?;
    let id = found.stx_mnt_id.to_string();
    let table = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    table.lines().find_map(|line| {
        let rest = line.strip_prefix(&id)?.strip_prefix(' ')?;
        let (_, kind) = rest.split_once(" - ")?;
        Some(kind.split(' ').next()?.to_owned())
    })
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
    use std::{
        fs::File,
        os::unix::{fs::MetadataExt, process::CommandExt},
    };

    use super::{
        super::idmap::{IdMapping, IdRange},
        *,
    };

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
        let follows = Kind {
            recursive: true,
            follows: true,
            ..Kind::default()
        };
        again(&at("original"), &at("shared/copy"), follows).unwrap();
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
    fn files_have_other_ids_where_they_are_mapped() {
        const NAME: &str = "files_have_other_ids_where_they_are_mapped";
        if !nix::unistd::geteuid().is_root() {
            println!("SKIPPED: {NAME}: needs root");
            return;
        }
        let base = std::env::temp_dir().join(format!("bulkhead-idmap-{}", std::process::id()));
        let _ = remove_tree(&base);
        let at = |name: &str| base.join(name);
        for name in ["disk/below", "other", "top", "all"] {
            std::fs::create_dir_all(at(name)).unwrap();
        }
        std::fs::write(at("disk/file"), "seen").unwrap();
        std::fs::write(at("other/file"), "").unwrap();
        bind(&at("other"), &at("disk/below"), false, false).unwrap();
        let range = |shown| {
            vec![IdRange {
                stored: 0,
                shown,
                size: 10,
            }]
        };
        let ids = IdMapping::new(range(7000), range(8000)).unwrap();
        let map = |source: &Path, target: &str, recursive| {
            let mapped = Mapped {
                ids: ids.clone(),
                recursive,
            };
            let kind = Kind {
                recursive: true,
                mapped: Some(&mapped),
                ..Kind::default()
            };
            again(source, &at(target), kind).map_err(|error| error.to_string())
        };
        if let Err(why) = map(&at("disk"), "top", false) {
            remove_tree(&base).unwrap();
            assert!(why.contains("cannot be id-mapped"), "{why}");
            println!("SKIPPED: {NAME}: {why}");
            return;
        }
        map(&at("disk"), "all", true).unwrap();
        let owner = |name: &str| {
            let found = std::fs::metadata(at(name)).unwrap();
            (found.uid(), found.gid())
        };
        for (name, wanted) in [
            ("disk/file", (0, 0)),
            ("top/file", (7000, 8000)),
            ("top/below/file", (0, 0)),
            ("all/file", (7000, 8000)),
            ("all/below/file", (7000, 8000)),
        ] {
            assert_eq!(owner(name), wanted, "{name}");
        }
        // Who has an id there makes files of that on the disk, nobody else.
        let mut touch = std::process::Command::new("touch");
        let status = touch.arg(at("top/made")).uid(7000).gid(8003).status();
        assert!(status.unwrap().success());
        assert_eq!(owner("top/made"), (7000, 8003));
        assert_eq!(owner("disk/made"), (0, 3));
        let error = File::create(at("top/roots")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EOVERFLOW));
        std::os::unix::fs::chown(at("top/made"), Some(7009), None).unwrap();
        assert_eq!(owner("disk/made"), (9, 3));
        // Which one of the file systems it is that cannot.
        let why = map(Path::new("/proc/sys"), "other", false).unwrap_err();
        assert!(why.contains("proc, the file system of /proc/sys"), "{why}");
        unmount(&at("disk/below")).unwrap();
        bind(Path::new("/proc/sys"), &at("disk/below"), false, false).unwrap();
        map(&at("disk"), "other", false).unwrap();
        unmount(&at("other")).unwrap();
        let why = map(&at("disk"), "other", true).unwrap_err();
        let below = format!("proc, the file system of {}", at("disk/below").display());
        assert!(why.contains(&below), "{why}");
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
