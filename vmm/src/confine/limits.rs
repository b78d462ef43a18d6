// SPDX-License-Identifier: Apache-2.0
//! How much of the host the process may take, should it be the guest's.
//!
//! Not the size of files: disks are plugged at any time, and a snapshot is as
//! large as the guest's memory.

use std::io;

use rustix::{
    io::Errno,
    process::{getrlimit, setrlimit, Resource, Rlimit},
};

use super::User;

/// Descriptors of a process that shares no directory: 1,023 connections of vsock,
/// and two events for each queue of 31 devices, of which disks may have 16.
const DESCRIPTORS: u64 = 4096;

/// Processes, which threads are, of a user whose only process this is: 64 vCPUs,
/// a few loops, and what the kernel starts in this one's name, which is workers
/// of disks' rings and one for KVM.
const THREADS: u64 = 1024;

/// Bytes of locked memory: some kernels count disks' rings, of which each takes a
/// few pages. As much as Linux itself allows everybody.
const LOCKED: u64 = 8 << 20;

/// Sets the limits of a process in jail, which becomes that user; `files`: it
/// shares directories, of which every file that the guest knows takes a
/// descriptor.
///
/// # Errors
/// What the kernel says.
pub fn set(user: User, files: bool) -> io::Result<()> {
    set_one(Resource::Memlock, LOCKED)?;
    set_one(Resource::Msgqueue, 0)?;
    if !files {
        set_one(Resource::Nofile, DESCRIPTORS)?;
    }
    // All of a user's count, whoever started them.
    if user == User::Own {
        set_one(Resource::Nproc, THREADS)?;
    }
    Ok(())
}

/// Sets a limit for good; where a lower one cannot be raised, that one.
fn set_one(resource: Resource, most: u64) -> io::Result<()> {
    let set = |most| {
        let limit = Rlimit {
            current: most,
            maximum: most,
        };
        setrlimit(resource, limit)
    };
    set(Some(most))
        .or_else(|error| match error {
            Errno::PERM => set(getrlimit(resource).maximum),
            other => Err(other),
        })
        .map_err(Into::into)
}
