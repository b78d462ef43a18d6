// SPDX-License-Identifier: Apache-2.0
//! The listener of a seccomp profile (runtime-spec config-linux.md,
//! "Seccomp" and "The Container Process State"): it gets the descriptor by
//! which it decides about calls, with the state of the process.
//!
//! A descriptor is the guest kernel's, so the listener is a process of the
//! guest: of another container of the pod, whose socket is in a volume.

use std::fmt::Write;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use tokio::time::{sleep, timeout};

use super::hooks::member;
use super::plan::ContainerPlan;
use crate::error::{AgentError, Context, Result};
use crate::seccomp::Listener;
use crate::sys::mount::open_in_root;
use crate::sys::{fd, process, socket};

/// How long a listener may take for a place in its queue.
const CONNECT: Duration = Duration::from_secs(10);
/// Between two tries for one.
const PAUSE: Duration = Duration::from_millis(20);

/// What the listener of one process is told, and where.
#[derive(Debug)]
pub struct Notice {
    listener: Listener,
    state: String,
}

impl Notice {
    /// For the process `pid` of a container whose first process is `init`;
    /// none where the profile asks nobody.
    pub fn new(plan: &ContainerPlan, pid: u32, init: u32) -> Option<Self> {
        let listener = plan.seccomp.as_ref()?.listener.clone()?;
        let status = if pid == init { "creating" } else { "running" };
        let mut state = String::from("{");
        member(&mut state, "ociVersion", plan.hooks.version());
        // Writing to a string cannot fail.
        let _ = write!(state, ",\"fds\":[\"seccompFd\"],\"pid\":{pid},");
        member(&mut state, "metadata", &listener.metadata);
        let _ = write!(state, ",\"state\":{}}}", plan.hooks.state(status, init));
        Some(Self { listener, state })
    }

    /// Takes the descriptor `number` of the process of `pidfd` and hands it
    /// over.
    ///
    /// # Errors
    /// When nobody listens, or does not take it.
    pub async fn send(&self, pidfd: &OwnedFd, number: RawFd) -> Result<()> {
        let taken = process::pidfd_getfd(pidfd.as_fd(), number)
            .step(|| "take the seccomp listener's descriptor")?;
        let path = self.listener.path.display();
        let connected = timeout(CONNECT, self.connect()).await;
        let socket = match connected {
            Ok(Ok(socket)) => socket,
            Ok(Err(errno @ (Errno::ENOENT | Errno::ECONNREFUSED))) => {
                return Err(AgentError::Invalid(format!(
                    "linux.seccomp.listenerPath: {path}: {}: no process of the pod listens there",
                    errno.desc()
                )))
            }
            Ok(Err(errno)) => {
                return Err(errno).step(|| format!("connect to seccomp listener {path}"))
            }
            Err(_) => {
                let what = format!("connect to seccomp listener {path}");
                return Err(AgentError::Timeout(what));
            }
        };
        // Shorter than any socket's buffer by far, so it goes at once.
        fd::send_with_fd(socket.as_fd(), self.state.as_bytes(), taken.as_fd())
            .step(|| format!("send to seccomp listener {path}"))
    }

    async fn connect(&self) -> nix::Result<OwnedFd> {
        let slash: OwnedFd = match std::fs::File::open("/") {
            Ok(slash) => slash.into(),
            Err(error) => return Err(crate::error::errno_of(&error)),
        };
        let place = open_in_root(slash.as_fd(), &self.listener.path, libc::O_PATH, 0)?;
        loop {
            match socket::unix_connect(place.as_fd()) {
                // Its queue is full.
                Err(Errno::EAGAIN) => sleep(PAUSE).await,
                other => return other,
            }
        }
    }
}
