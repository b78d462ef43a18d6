// SPDX-License-Identifier: Apache-2.0
//! What the process may do once it runs a guest: as little as its work needs.

pub mod rules;
pub mod seccomp;
mod sys;

use self::seccomp::Worker;

/// Restricts the calling thread, which has just been started, to its work.
/// Panics, which ends the process, when that cannot be done.
pub fn enter(worker: Worker) {
    if worker == Worker::Files {
        if let Err(error) = sys::keep_capabilities() {
            // Not root, then: all files are one user's anyway.
            tracing::debug!(%error, "capabilities do not outlast a change of user");
        }
    }
    if let Err(error) = seccomp::restrict(worker) {
        panic!("{}", crate::control::chain(&error));
    }
}
