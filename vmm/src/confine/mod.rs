// SPDX-License-Identifier: Apache-2.0
//! What the process may do once it runs a guest: as little as its work needs.
//!
//! The process as a whole goes to jail before it makes a machine ([`jail`]);
//! each of its threads gives up what its work does not need (here), and is
//! held to the system calls that it does ([`seccomp`]).
//!
//! A program that embeds the library sets no [`Policy`], and nothing happens.

pub mod jail;
pub mod rules;
pub mod seccomp;
mod sys;
#[cfg(test)]
mod tests;

use std::sync::OnceLock;

use self::seccomp::{Mode, Worker};

/// How far the process is confined.
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// What comes of forbidden system calls.
    pub seccomp: Mode,
    /// Whether there is a jail, and capabilities are given up.
    pub jail: bool,
    /// The network namespace is one made for this process, which others use.
    pub keep_network: bool,
}

static POLICY: OnceLock<Policy> = OnceLock::new();

/// Sets how far the process is confined, once for its life.
pub fn set_policy(policy: Policy) {
    let _ = POLICY.set(policy);
}

/// Restricts the calling thread to its work: a thread that has just been
/// started, or whose work has changed. There is no way back. Panics, which
/// ends the process, when that cannot be done.
pub fn enter(worker: Worker) {
    if worker == Worker::Files {
        if let Err(error) = sys::keep_capabilities() {
            // Not root, then: all files are one user's anyway.
            tracing::debug!(%error, "capabilities do not outlast a change of user");
        }
    }
    #[cfg(test)]
    if std::env::var_os(seccomp::LEFT_OUT).is_some() {
        // Devices' tests, run by the test of the rules.
        seccomp::restrict(worker, Mode::Kill).expect("a filter");
        return;
    }
    let Some(policy) = POLICY.get() else {
        return;
    };
    if policy.jail {
        let kept = match worker {
            Worker::Files => sys::FILE_CAPABILITIES,
            Worker::Control | Worker::Vcpu | Worker::Devices => sys::NO_CAPABILITIES,
        };
        if let Err(error) = sys::keep_only(kept) {
            panic!("capabilities cannot be given up: {error}");
        }
        // In a jail without anything, and without the calls for it: should one
        // of these not hold, this does.
        if worker != Worker::Files {
            if let Err(error) = sys::forbid_paths() {
                panic!("paths cannot be forbidden (Landlock): {error}");
            }
        }
    }
    if let Err(error) = seccomp::restrict(worker, policy.seccomp) {
        panic!("{}", crate::control::chain(&error));
    }
}
