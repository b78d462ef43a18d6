// SPDX-License-Identifier: Apache-2.0
//! What the process may do once it runs a guest: as little as its work needs.
//!
//! The process as a whole goes to jail before it makes a machine ([`jail`]).
//! Then it becomes a user whom nobody else is, without capabilities, and opens
//! nothing by its path any more (Landlock): by [`give_up`], on the thread that
//! starts all others, so that these begin like that. Only threads that serve
//! files are made before: they stay the user that the client is, for they make
//! files in anybody's name, with the capabilities that this takes. Each thread
//! is held to the system calls that its work needs ([`seccomp`]).
//!
//! Without shared directories the process has a user namespace of its own, in
//! which nobody is mapped. With some it has not: all threads are in one user
//! namespace, device nodes can be made from the host's first one only
//! (CAP_MKNOD), and guests make them.
//!
//! A program that embeds the library sets no [`Policy`], and nothing happens.

mod filter;
pub mod jail;
mod limits;
pub mod rules;
pub mod seccomp;
mod sys;
#[cfg(test)]
mod tests;

use std::{
    io,
    sync::{
        atomic::{AtomicBool, Ordering},
        OnceLock,
    },
};

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
    /// Whom the process becomes.
    pub user: User,
}

/// Whom the process becomes in its jail; the group has the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum User {
    /// Stays who it is.
    Kept,
    /// 0x7000_0000 plus the process's id in /proc: at no time another
    /// process's, and in a range that neither distributions nor systemd give
    /// away.
    Own,
    /// This one.
    Id(u32),
}

impl std::str::FromStr for User {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match (word, word.parse()) {
            ("kept", _) => Ok(Self::Kept),
            ("own", _) => Ok(Self::Own),
            // The last number means none.
            (_, Ok(id)) if id > 0 && id < u32::MAX => Ok(Self::Id(id)),
            _ => Err("not own, kept, or a number from 1 to 4294967294".into()),
        }
    }
}

/// Why rights cannot be given up.
#[derive(Debug, thiserror::Error)]
#[error("{step}")]
pub struct RightsError {
    step: &'static str,
    #[source]
    source: io::Error,
}

fn step(step: &'static str) -> impl FnOnce(io::Error) -> RightsError {
    move |source| RightsError { step, source }
}

static GIVEN_UP: AtomicBool = AtomicBool::new(false);

/// Takes from the calling thread, and from those that it starts from now on,
/// what nobody but a thread that serves files needs: the user it was, all
/// capabilities, and paths. Once: the second time nothing happens.
///
/// # Errors
/// The kernel refuses.
pub fn give_up() -> Result<(), RightsError> {
    let jail = POLICY.get().is_some_and(|policy| policy.jail);
    if !jail || GIVEN_UP.swap(true, Ordering::SeqCst) {
        return Ok(());
    }
    if let Some(user) = jail::user() {
        sys::become_user(user).map_err(step("another user cannot be become"))?;
    }
    sys::keep_none().map_err(step("capabilities cannot be given up"))?;
    // In a jail without anything, and without the calls for it: should one of
    // these not hold, this does.
    sys::forbid_paths()
        .map(drop)
        .map_err(step("paths cannot be forbidden (Landlock)"))
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
    // Others were started without any.
    if policy.jail && worker == Worker::Files {
        if let Err(error) = sys::keep_only(sys::FILE_CAPABILITIES) {
            panic!("capabilities cannot be given up: {error}");
        }
    }
    if let Err(error) = seccomp::restrict(worker, policy.seccomp) {
        panic!("{}", crate::control::chain(&error));
    }
}
