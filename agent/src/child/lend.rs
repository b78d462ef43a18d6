// SPDX-License-Identifier: Apache-2.0
//! Mounts that a container with a user namespace cannot change as it is asked:
//! how times of access are kept is locked for it (mount_namespaces(7),
//! "Restrictions on mount namespaces"). A child that stays the guest's makes
//! copies that are so, and hands them over.

use std::convert::Infallible;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;

use super::report::{self, At, Done, Failure, Report};
use super::rootfs::set_attributes;
use crate::container::mounts::{MountPlan, Source};
use crate::container::plan::ContainerPlan;
use crate::sys::fd;
use crate::sys::mount::{clone_tree, cwd, set_attr, MountAttr, ATTR_ATIME_MASK, ATTR_NODIRATIME};
use crate::sys::process::exit_now;

/// What goes with each descriptor.
const MOUNT: &[u8] = b"m";

/// Whether a mount has to come from outside of the container's user namespace.
pub fn is_lent(mount: &MountPlan) -> bool {
    let locked = |attr: &MountAttr| (attr.set | attr.clear) & (ATTR_ATIME_MASK | ATTR_NODIRATIME);
    matches!(mount.source, Source::Bind { .. })
        && (locked(&mount.attr) | locked(&mount.recursive_attr)) != 0
}

/// Those of a container, in their order.
pub fn lent(plan: &ContainerPlan) -> impl Iterator<Item = &MountPlan> {
    let all = plan.namespaces.user.as_ref().map(|_| &plan.mounts);
    all.into_iter().flatten().filter(|mount| is_lent(mount))
}

/// All of them, made by the child itself, which is the guest's yet.
pub fn make_all(plan: &ContainerPlan) -> Done<Vec<OwnedFd>> {
    lent(plan).map(|mount| make(plan, mount)).collect()
}

/// All of them, from who makes them ([`run`]).
pub fn take_all(plan: &ContainerPlan, socket: BorrowedFd<'_>) -> Done<Vec<OwnedFd>> {
    lent(plan)
        .map(|mount| take(socket, &mount.destination))
        .collect()
}

/// Makes them, in their order, and hands them to who has the other end of
/// `socket`.
pub fn run(plan: &ContainerPlan, socket: &OwnedFd) -> Infallible {
    let kept = fd::close_all_but(&mut [0, 1, 2, socket.as_raw_fd()]);
    if kept.is_err() {
        exit_now(1);
    }
    let socket = socket.as_fd();
    for mount in lent(plan) {
        let told = match make(plan, mount) {
            Ok(tree) => fd::send_with_fd(socket, MOUNT, tree.as_fd()),
            Err(failure) => report::send_failure(socket, &failure).and(Err(Errno::ECANCELED)),
        };
        if told.is_err() {
            exit_now(1);
        }
    }
    exit_now(0)
}

/// One of them, attached nowhere.
fn make(plan: &ContainerPlan, mount: &MountPlan) -> Done<OwnedFd> {
    let Source::Bind { path, recursive } = &mount.source else {
        return Err(Failure::invalid("a mount that is not bound was to be lent"));
    };
    let tree = clone_tree(cwd(), path, *recursive).at("open mount source", path)?;
    // As a mount that the namespace had from its beginning.
    for propagation in [libc::MS_SLAVE, plan.initial_propagation] {
        let attr = MountAttr {
            propagation,
            ..MountAttr::default()
        };
        set_attr(tree.as_fd(), &attr, true).at("set propagation of", path)?;
    }
    set_attributes(&tree, mount, &mount.destination)?;
    Ok(tree)
}

/// Takes the next one.
fn take(socket: BorrowedFd<'_>, destination: &Path) -> Done<OwnedFd> {
    let mut buffer = [0; report::LONGEST];
    let (count, tree) = loop {
        match fd::receive_with_fd(socket, &mut buffer) {
            Err(Errno::EINTR) => {}
            other => break other.at("take mount source of", destination)?,
        }
    };
    if let Some(tree) = tree {
        return Ok(tree);
    }
    match report::understand(&buffer[..count], None) {
        Ok(Report::Failed(failure)) => Err(failure),
        // It was killed.
        _ => Err(Failure::step(
            "take mount source of",
            destination,
            Errno::ECANCELED,
        )),
    }
}
