// SPDX-License-Identifier: Apache-2.0
//! The jail: mount, IPC, UTS and network namespaces of the process's own, and
//! without shared directories a user namespace; and an empty, read-only root
//! directory. A namespace of processes is for the client to make, for a process
//! is born in its own (`CLONE_NEWPID`; the runtime does). In the directory are,
//! where the machine has use for them:
//!
//! ```text
//! /shared<n>             the nth shared directory
//! /vsock                 the directory of the sockets the guest may connect to
//! /proc/self/fd          this process's descriptors
//! /proc/self/mountinfo   its mounts: these
//! ```
//!
//! What is mounted below a shared directory later shows in the jail as well, if
//! the directory lies in a mount that passes mounts on (`MS_SHARED`).

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        atomic::{AtomicBool, Ordering},
        OnceLock,
    },
};

use rustix::{
    fs::{mkdirat, openat, Mode, OFlags, CWD},
    mount::{
        fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, open_tree,
        unmount, FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
        OpenTreeFlags, UnmountFlags,
    },
    process::{chdir, fchdir, pivot_root},
};

use super::{limits, sys, User, POLICY};
use crate::config::Devices;

/// A step that failed.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// The kernel refused.
    #[error("the jail cannot be made: {step} (run as root on Linux 5.12 or later, or do without: --jail off)")]
    System {
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A shared directory, or one of sockets, cannot be brought into a jail
    /// that exists already.
    #[error("this process has tried to make a machine before, and sees no directories any more: start a new one")]
    Used,
}

fn failed(step: &'static str) -> impl FnOnce(rustix::io::Errno) -> JailError {
    move |error| JailError::System {
        step,
        source: error.into(),
    }
}

/// A mount to be.
struct Tree {
    mount: OwnedFd,
    /// Below the jail's root.
    target: String,
    kind: Kind,
}

#[derive(PartialEq, Eq)]
enum Kind {
    Directory,
    File,
}

static JAILED: AtomicBool = AtomicBool::new(false);

/// Whom threads have yet to become.
static USER: OnceLock<u32> = OnceLock::new();

/// Users of processes begin here ([`User::Own`]).
const FIRST_USER: u32 = 0x7000_0000;

/// Whom the threads that serve no files have yet to become, if another; known
/// once the process is in jail.
pub(super) fn user() -> Option<u32> {
    USER.get().copied()
}

/// That user's number, while /proc can be seen.
fn find_user(wanted: User) -> Result<Option<u32>, JailError> {
    let user = match wanted {
        User::Kept => return Ok(None),
        User::Id(user) => user,
        // The id here may be one of a namespace, and everybody's.
        User::Own => {
            let link = std::fs::read_link("/proc/self").map_err(|source| JailError::System {
                step: "this process's id in /proc",
                source,
            })?;
            let id = link.to_str().and_then(|id| id.parse::<u32>().ok());
            // Ids have 22 bits at most.
            FIRST_USER + (id.unwrap_or_default() & ((1 << 22) - 1))
        }
    };
    Ok(Some(user))
}

/// Puts the process into its jail, while it has but one thread, and lets
/// `devices` use what is in there. Nothing happens where the policy has none.
///
/// # Errors
/// A namespace or mount cannot be made.
pub fn enter(devices: &mut Devices) -> Result<(), JailError> {
    let Some(policy) = POLICY.get().filter(|policy| policy.jail) else {
        return Ok(());
    };
    let sockets = match &devices.vsock {
        Some((vsock, _)) => socket_directory(Path::new(&vsock.uds_path)),
        None => None,
    };
    if JAILED.swap(true, Ordering::SeqCst) {
        return match devices.fs.is_empty() && sockets.is_none() {
            true => Ok(()),
            false => Err(JailError::Used),
        };
    }
    sys::no_new_privileges_no_dumps().map_err(|source| JailError::System {
        step: "no new privileges, no dumps",
        source,
    })?;
    limits::set(policy.user, !devices.fs.is_empty()).map_err(|source| JailError::System {
        step: "limits",
        source,
    })?;
    // While the host can be seen.
    let user = find_user(policy.user)?;
    let trees = trees(devices, sockets.as_deref())?;
    sys::unshare_namespaces(!policy.keep_network).map_err(|source| JailError::System {
        step: "namespaces",
        source,
    })?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(failed("leave the host's mounts alone"))?;
    change_root(&trees)?;

    for (number, (_, directory)) in devices.fs.iter_mut().enumerate() {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        *directory = openat(CWD, format!("/shared{number}"), flags, Mode::empty())
            .map_err(failed("open a shared directory"))?;
    }
    if let (Some((vsock, _)), Some(_)) = (&mut devices.vsock, sockets) {
        let path = PathBuf::from(&vsock.uds_path);
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        vsock.uds_path = format!("/vsock/{name}");
    }
    match user {
        Some(user) if devices.fs.is_empty() => own_users(user),
        Some(user) => {
            let _ = USER.set(user);
            Ok(())
        }
        None => Ok(()),
    }
}

/// A user namespace of `user`'s, who this process becomes: in it he is as
/// little as in the host's.
fn own_users(user: u32) -> Result<(), JailError> {
    let failed = |step| move |source| JailError::System { step, source };
    // Some hosts let nobody else make one.
    sys::keep_capabilities().map_err(failed("capabilities of another user"))?;
    sys::become_user(user).map_err(failed("another user (--user kept does without)"))?;
    match sys::unshare_user() {
        // Then this is not among what keeps the process in.
        Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
            tracing::warn!("no user namespace: user.max_user_namespaces is too low");
            Ok(())
        }
        other => other.map_err(failed("a user namespace")),
    }
}

/// Where sockets to connect to are; none where there is no such directory, or
/// where it would be the host's root.
fn socket_directory(path: &Path) -> Option<PathBuf> {
    let parent = path.parent()?;
    let usable = parent.is_absolute() && parent != Path::new("/") && parent.is_dir();
    usable.then(|| parent.to_owned())
}

/// Copies of the mounts that the jail is to have, attached nowhere yet.
fn trees(devices: &Devices, sockets: Option<&Path>) -> Result<Vec<Tree>, JailError> {
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let mut trees = Vec::new();
    for (number, (_, directory)) in devices.fs.iter().enumerate() {
        let flags = clone | OpenTreeFlags::AT_EMPTY_PATH | OpenTreeFlags::AT_RECURSIVE;
        let mount = open_tree(directory, "", flags).map_err(failed("copy a shared directory"))?;
        // The host's mounts show here, and never the other way round.
        sys::change_mount(mount.as_fd(), sys::NO_PROGRAMS, libc::MS_SLAVE).map_err(attributes)?;
        trees.push(Tree {
            mount,
            target: format!("shared{number}"),
            kind: Kind::Directory,
        });
    }
    let mut more = Vec::new();
    if let Some(sockets) = sockets {
        more.push((sockets, "vsock", Kind::Directory));
    }
    if !devices.fs.is_empty() {
        more.push((Path::new("/proc/self/fd"), "proc/self/fd", Kind::Directory));
        let mounts = "proc/self/mountinfo";
        more.push((Path::new("/proc/self/mountinfo"), mounts, Kind::File));
    }
    for (source, target, kind) in more {
        let mount = open_tree(CWD, source, clone).map_err(failed("copy a directory"))?;
        let attributes_of = sys::NO_PROGRAMS | libc::MOUNT_ATTR_RDONLY;
        sys::change_mount(mount.as_fd(), attributes_of, libc::MS_PRIVATE).map_err(attributes)?;
        trees.push(Tree {
            mount,
            target: target.into(),
            kind,
        });
    }
    Ok(trees)
}

fn attributes(source: io::Error) -> JailError {
    JailError::System {
        step: "a mount's attributes",
        source,
    }
}

/// Makes the new root, with the mounts in it, and forgets the old one.
fn change_root(trees: &[Tree]) -> Result<(), JailError> {
    let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("new root"))?;
    fsconfig_set_string(tmpfs.as_fd(), "mode", "0555").map_err(failed("new root's mode"))?;
    fsconfig_create(tmpfs.as_fd()).map_err(failed("new root"))?;
    let root = fsmount(
        tmpfs.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )
    .map_err(failed("mount the new root"))?;
    let nothing = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    // Any directory does, for as long as it takes; this one is there.
    move_mount(root.as_fd(), "", CWD, "/proc", nothing).map_err(failed("place the new root"))?;
    let mut made = BTreeSet::new();
    for tree in trees {
        make_target(&root, tree, &mut made).map_err(failed("make a mount point"))?;
        move_mount(tree.mount.as_fd(), "", root.as_fd(), &*tree.target, nothing)
            .map_err(failed("mount a directory"))?;
    }
    let read_only = sys::NO_PROGRAMS | libc::MOUNT_ATTR_RDONLY;
    sys::change_one_mount(root.as_fd(), read_only).map_err(attributes)?;
    fchdir(&root).map_err(failed("enter the new root"))?;
    // The old root lands on top of the new one, from where it goes.
    pivot_root(".", ".").map_err(failed("change the root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(failed("forget the old root"))?;
    chdir("/").map_err(failed("enter the new root"))
}

/// Makes a mount point, with the directories above it that `made` does not
/// have.
fn make_target(root: &OwnedFd, tree: &Tree, made: &mut BTreeSet<String>) -> rustix::io::Result<()> {
    let directory = |path: &str| mkdirat(root, path, Mode::from_raw_mode(0o555));
    for (end, _) in tree.target.match_indices('/') {
        let parent = &tree.target[..end];
        if made.insert(parent.to_owned()) {
            directory(parent)?;
        }
    }
    match tree.kind {
        Kind::Directory => directory(&tree.target),
        Kind::File => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            openat(root, &*tree.target, flags, Mode::RUSR).map(drop)
        }
    }
}
