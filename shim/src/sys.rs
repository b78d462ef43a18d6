// SPDX-License-Identifier: Apache-2.0
//! What cannot be said without `unsafe`: a child with descriptors of its own.

#![allow(unsafe_code)]

use std::{
    io,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    process::{Child, Command},
};

use rustix::io::fcntl_dupfd_cloexec;

/// The first descriptor that is a child's own.
const FIRST: RawFd = 3;

/// Runs a command whose descriptors from 3 on are `fds`.
pub fn spawn_with(mut command: Command, fds: [OwnedFd; 3]) -> io::Result<Child> {
    let last = FIRST + 3;
    // While these are open nothing that is opened gets the numbers that the
    // child's descriptors are put on: the pipe through which the child tells
    // that it could not be run, above all.
    let mut placeholders = Vec::new();
    for number in FIRST..last {
        let there = fcntl_dupfd_cloexec(&fds[0], number)?;
        if there.as_raw_fd() < last {
            placeholders.push(there);
        }
    }
    let mut high = Vec::with_capacity(fds.len());
    for fd in &fds {
        high.push(fcntl_dupfd_cloexec(fd, last)?);
    }
    let sources = [0, 1, 2].map(|at: usize| high[at].as_raw_fd());
    // SAFETY: between fork and exec only dup2(2) is called, which is
    // async-signal-safe, and nothing is allocated: the error is an errno. The
    // sources' numbers stay open until then, for `high` lives longer, and are
    // none of the targets'.
    unsafe {
        command.pre_exec(move || {
            for (source, target) in sources.into_iter().zip(FIRST..) {
                if libc::dup2(source, target) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    let child = command.spawn();
    drop((placeholders, high));
    child
}
