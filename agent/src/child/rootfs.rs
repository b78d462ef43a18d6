// SPDX-License-Identifier: Apache-2.0
//! The container's file system: root, mounts, pivot, masked and read-only
//! paths (runtime-spec config.md "Root", "Mounts"; config-linux.md "Masked
//! Paths", "Readonly Paths").

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{umount2, MntFlags};
use nix::sys::stat::fchmod;
use nix::sys::statfs::{fstatfs, PROC_SUPER_MAGIC};
use nix::unistd::{chdir, fchdir};

use super::lend;
use super::path::{locate, make_directory, make_file};
use super::report::{At, Done, Failure};
use crate::container::mounts::{check_place, MountPlan, Source};
use crate::container::namespaces::{Namespaces, PidNamespace};
use crate::container::plan::ContainerPlan;
use crate::sys::mount::{
    attach, clone_tree, cwd, new_mount, open_in_root, pivot_here, set_attr, FsOption, MountAttr,
    ATTR_RDONLY,
};

/// What is taken from the guest's file system, before the container's own
/// begins.
pub struct Roots {
    /// The container's root directory.
    pub root: OwnedFd,
    /// Detached copies of the bind mounts' sources, in the order of the plan's
    /// mounts; `None` for file systems that are made.
    sources: Vec<Option<OwnedFd>>,
}

/// Detaches the process's mounts from the guest's and attaches a copy of the
/// root file system over itself, which pivot_root(2) wants. Opens what is to
/// be mounted while the guest's root can: the container's may not get there.
///
/// `lent`: what is there already ([`lend`]).
pub fn prepare_root(plan: &ContainerPlan, lent: Vec<OwnedFd>) -> Done<Roots> {
    let slash = slash()?;
    let propagation = MountAttr {
        propagation: plan.initial_propagation,
        ..MountAttr::default()
    };
    set_attr(slash.as_fd(), &propagation, true).at("set propagation of", "/")?;
    let root = clone_tree(cwd(), &plan.rootfs, true).at("open root file system", &plan.rootfs)?;
    let target = File::open(&plan.rootfs).at("open root file system", &plan.rootfs)?;
    let own_user_namespace = plan.namespaces.user.is_some();
    let mut lent = lent.into_iter();
    let mut open = |mount: &MountPlan| match &mount.source {
        Source::Bind { .. } if own_user_namespace && lend::is_lent(mount) => Ok(lent.next()),
        Source::Bind { path, recursive } => clone_tree(cwd(), path, *recursive)
            .at("open mount source", path)
            .map(Some),
        Source::New { .. } => Ok(None),
    };
    let sources = plan.mounts.iter().map(&mut open).collect::<Done<_>>()?;
    attach(root.as_fd(), target.as_fd()).at("bind root file system", &plan.rootfs)?;
    Ok(Roots { root, sources })
}

/// The root directory.
fn slash() -> Done<OwnedFd> {
    File::open("/").map(Into::into).at("open", "/")
}

/// Makes the mounts of the specification, in their order.
pub fn mount_all(plan: &ContainerPlan, roots: &mut Roots) -> Done<()> {
    for (mount, source) in plan.mounts.iter().zip(&mut roots.sources) {
        mount_one(mount, source.take(), roots.root.as_fd(), &plan.namespaces)?;
    }
    Ok(())
}

fn mount_one(
    plan: &MountPlan,
    bound: Option<OwnedFd>,
    root: BorrowedFd<'_>,
    namespaces: &Namespaces,
) -> Done<()> {
    let own_user_namespace = namespaces.user.is_some();
    let destination = &plan.destination;
    let covered = match plan.mode_of_covered {
        true => mode_of(root, destination)?,
        false => None,
    };
    let target = mount_point(bound.as_ref(), root, destination)?;
    let tree = match (&plan.source, bound) {
        (
            Source::New {
                fs_type,
                source,
                options,
            },
            _,
        ) => {
            let mut options = options.clone();
            options.extend(covered.map(|mode| FsOption::Value("mode".into(), format!("{mode:o}"))));
            match new_mount(fs_type, source.as_deref(), &options, plan.attr.set) {
                // Its namespace is the guest's, whose root this is not.
                Err((Errno::EPERM, _)) if own_user_namespace => {
                    guests_own(fs_type, plan, namespaces)?
                }
                Err((errno, complaint)) => {
                    let step = if complaint.is_empty() {
                        format!("mount {fs_type} on")
                    } else {
                        format!("mount {fs_type} ({complaint}) on")
                    };
                    return Err(Failure::step(&step, destination, errno));
                }
                Ok(tree) => tree,
            }
        }
        (Source::Bind { .. }, Some(tree)) => {
            // Those that were lent have them.
            if !(own_user_namespace && lend::is_lent(plan)) {
                set_attributes(&tree, plan, destination)?;
            }
            tree
        }
        (Source::Bind { path, .. }, None) => {
            return Err(Failure::step("open mount source", path, Errno::ENOENT))
        }
    };
    check_target(plan, root, &target, &tree)?;
    if plan.copy_up {
        copy_up(&target, &tree, plan)?;
    }
    attach(tree.as_fd(), target.as_fd()).at("mount on", destination)?;
    for (kind, recursive) in &plan.propagation {
        let attr = MountAttr {
            propagation: *kind,
            ..MountAttr::default()
        };
        set_attr(tree.as_fd(), &attr, *recursive).at("set propagation of", destination)?;
    }
    Ok(())
}

/// The guest's own mount of a file system that belongs to one of its
/// namespaces, for a container that has a user namespace but shares that one.
fn guests_own(fs_type: &str, plan: &MountPlan, namespaces: &Namespaces) -> Done<OwnedFd> {
    let destination = &plan.destination;
    let path = match fs_type {
        "proc" if namespaces.pid == PidNamespace::Guest => Path::new("/proc"),
        "sysfs" => Path::new("/sys"),
        "cgroup2" => Path::new("/sys/fs/cgroup"),
        "mqueue" => Path::new("/dev/mqueue"),
        _ => {
            let step = format!("mount {fs_type} in a user namespace on");
            return Err(Failure::step(&step, destination, Errno::EPERM));
        }
    };
    let tree = clone_tree(cwd(), path, true).at("open mount source", path)?;
    set_attr(tree.as_fd(), &plan.attr, true).at("set mount options of", destination)?;
    Ok(tree)
}

/// The mode of what is at `path`, if something is.
fn mode_of(root: BorrowedFd<'_>, path: &Path) -> Done<Option<u32>> {
    match locate(root, path) {
        Ok(place) => {
            let meta = File::from(place).metadata().at("inspect", path)?;
            Ok(Some(meta.mode() & 0o7777))
        }
        // Where this cannot be told the mount will not work either.
        Err(_) => Ok(None),
    }
}

/// The path of `place` in the container, without links.
fn path_in(root: BorrowedFd<'_>, place: &OwnedFd, path: &Path) -> Done<PathBuf> {
    let real_path = |fd: RawFd| fs::read_link(format!("/proc/self/fd/{fd}"));
    let real = real_path(place.as_raw_fd()).at("inspect", path)?;
    let top = real_path(root.as_raw_fd()).at("inspect", "root")?;
    match real.strip_prefix(&top) {
        Ok(rest) => Ok(Path::new("/").join(rest)),
        Err(_) => Err(Failure::invalid(format!(
            "mounts: {}: leads out of the container's root",
            path.display()
        ))),
    }
}

/// Refuses places that a symbolic link of the image has led to and that the
/// specification could not have named, and proc or sysfs through any link:
/// they would end up where masking does not look.
fn check_target(
    plan: &MountPlan,
    root: BorrowedFd<'_>,
    target: &OwnedFd,
    tree: &OwnedFd,
) -> Done<()> {
    let destination = &plan.destination;
    let refused = |why: &str| {
        let path = destination.display();
        Err(Failure::invalid(format!("mounts: {path}: {why}")))
    };
    let real = path_in(root, target, destination)?;
    let kind = match &plan.source {
        Source::New { fs_type, .. } => fs_type.as_str(),
        Source::Bind { .. } => "bind",
    };
    if matches!(kind, "proc" | "sysfs") && real != *destination {
        return refused(&format!("{kind} cannot be mounted through a symbolic link"));
    }
    if let Err(why) = check_place(&real) {
        return refused(&why);
    }
    if real == Path::new("/proc") {
        let found = fstatfs(tree).at("inspect", destination)?;
        if found.filesystem_type() != PROC_SUPER_MAGIC {
            return refused("only a proc file system can be mounted over /proc");
        }
    }
    Ok(())
}

/// Gives a mount that is bound the attributes of its options.
pub fn set_attributes(tree: &OwnedFd, plan: &MountPlan, destination: &Path) -> Done<()> {
    for (attr, recursive) in [(plan.attr, false), (plan.recursive_attr, true)] {
        if attr != MountAttr::default() {
            set_attr(tree.as_fd(), &attr, recursive).at("set mount options of", destination)?;
        }
    }
    Ok(())
}

/// Opens the place of a mount, making it where it is missing: a file for a
/// file that is bound, else a directory.
fn mount_point(bound: Option<&OwnedFd>, root: BorrowedFd<'_>, destination: &Path) -> Done<OwnedFd> {
    if let Some(tree) = bound {
        let source = tree.try_clone().map(File::from);
        let meta = source.and_then(|file| file.metadata());
        if !meta.at("inspect mount source of", destination)?.is_dir() {
            return make_file(root, destination, 0o644);
        }
    }
    make_directory(root, destination)
}

/// Copies what the image has at a mount point into the file system that is
/// about to cover it.
fn copy_up(from: &OwnedFd, to: &OwnedFd, plan: &MountPlan) -> Done<()> {
    let link = |fd: &OwnedFd| PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let asked_for = fs::metadata(link(to))
        .at("inspect", &plan.destination)?
        .mode();
    copy_tree(&link(from), &link(to)).at("copy up", &plan.destination)?;
    if plan.mode_of_covered {
        return Ok(());
    }
    // The options' mode is not the image's.
    let mode = nix::sys::stat::Mode::from_bits_retain(asked_for & 0o7777);
    let directory = File::open(link(to)).at("copy up", &plan.destination)?;
    fchmod(&directory, mode).at("copy up", &plan.destination)
}

fn copy_tree(from: &Path, to: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::{lchown, symlink, PermissionsExt};
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let meta = entry.metadata()?;
        let kind = meta.file_type();
        if kind.is_dir() {
            fs::create_dir(&target)?;
            copy_tree(&source, &target)?;
        } else if kind.is_symlink() {
            symlink(fs::read_link(&source)?, &target)?;
        } else if kind.is_file() {
            fs::copy(&source, &target)?;
        } else {
            continue;
        }
        lchown(&target, Some(meta.uid()), Some(meta.gid()))?;
        if !kind.is_symlink() {
            // After the owner: chown clears the set-uid bits.
            fs::set_permissions(&target, fs::Permissions::from_mode(meta.mode() & 0o7777))?;
        }
    }
    let meta = fs::metadata(from)?;
    let directory = File::open(to)?;
    std::os::unix::fs::fchown(&directory, Some(meta.uid()), Some(meta.gid()))?;
    fchmod(
        &directory,
        nix::sys::stat::Mode::from_bits_retain(meta.mode() & 0o7777),
    )?;
    Ok(())
}

/// Makes `root` the root directory and lets go of the guest's.
pub fn pivot(root: BorrowedFd<'_>) -> Done<()> {
    let old = File::open("/").at("open", "/")?;
    fchdir(root).at("change directory to", "root")?;
    pivot_here().at("pivot to", "root")?;
    // The old root is now mounted over the new one; leave it through its
    // descriptor. As a slave its unmounting does not reach the guest.
    fchdir(&old).at("change directory to", "old root")?;
    let slave = MountAttr {
        propagation: libc::MS_SLAVE,
        ..MountAttr::default()
    };
    set_attr(old.as_fd(), &slave, true).at("set propagation of", "old root")?;
    umount2(".", MntFlags::MNT_DETACH).at("unmount", "old root")?;
    chdir("/").at("change directory to", "/")
}

/// What can only happen when everything is mounted and the root is in place.
pub fn finish(plan: &ContainerPlan) -> Done<()> {
    let slash = slash()?;
    if let Some((kind, recursive)) = plan.root_propagation {
        let attr = MountAttr {
            propagation: kind,
            ..MountAttr::default()
        };
        set_attr(slash.as_fd(), &attr, recursive).at("set propagation of", "/")?;
    }
    let read_only = MountAttr {
        set: ATTR_RDONLY,
        ..MountAttr::default()
    };
    for mount in plan.mounts.iter().filter(|mount| mount.read_only_later) {
        let place = locate(slash.as_fd(), &mount.destination).at("open", &mount.destination)?;
        set_attr(place.as_fd(), &read_only, false).at("make read-only", &mount.destination)?;
    }
    if plan.root_read_only {
        set_attr(slash.as_fd(), &read_only, false).at("make read-only", "/")?;
    }
    Ok(())
}

/// Makes the read-only paths so; those that do not exist are left out.
pub fn protect(paths: &[PathBuf]) -> Done<()> {
    let slash = slash()?;
    let read_only = MountAttr {
        set: ATTR_RDONLY,
        ..MountAttr::default()
    };
    for path in paths {
        let place = match locate(slash.as_fd(), path) {
            Err(Errno::ENOENT | Errno::ENOTDIR) => continue,
            other => other.at("open", path)?,
        };
        let tree = clone_tree(place.as_fd(), Path::new(""), true).at("bind", path)?;
        set_attr(tree.as_fd(), &read_only, true).at("make read-only", path)?;
        attach(tree.as_fd(), place.as_fd()).at("mount on", path)?;
    }
    Ok(())
}

/// Hides the masked paths: files behind /dev/null, directories behind an
/// empty file system, which all of them share.
pub fn mask(paths: &[PathBuf]) -> Done<()> {
    let slash = slash()?;
    let mut empty: Option<OwnedFd> = None;
    for path in paths {
        let place = match locate(slash.as_fd(), path) {
            Err(Errno::ENOENT | Errno::ENOTDIR) => continue,
            other => other.at("open", path)?,
        };
        let is_directory = File::from(place.try_clone().at("open", path)?)
            .metadata()
            .at("inspect", path)?
            .is_dir();
        let cover = if !is_directory {
            let null = null_device(slash.as_fd())?;
            clone_tree(null.as_fd(), Path::new(""), false).at("bind", "/dev/null")?
        } else if let Some(first) = &empty {
            clone_tree(first.as_fd(), Path::new(""), false).at("bind", path)?
        } else {
            new_mount("tmpfs", None, &[], ATTR_RDONLY)
                .map_err(|(errno, _)| Failure::step("mount tmpfs on", path, errno))?
        };
        attach(cover.as_fd(), place.as_fd()).at("mask", path)?;
        if is_directory && empty.is_none() {
            empty = Some(cover);
        }
    }
    Ok(())
}

/// The container's /dev/null, which an image could have replaced.
fn null_device(root: BorrowedFd<'_>) -> Done<OwnedFd> {
    const NULL: libc::dev_t = libc::makedev(1, 3);
    let path = Path::new("/dev/null");
    let null = open_in_root(root, path, libc::O_PATH | libc::O_NOFOLLOW, 0).at("open", path)?;
    let meta = File::from(null.try_clone().at("open", path)?)
        .metadata()
        .at("inspect", path)?;
    if meta.file_type().is_char_device() && meta.rdev() == NULL {
        Ok(null)
    } else {
        Err(Failure::invalid(
            "/dev/null of the container is not the null device",
        ))
    }
}
