// SPDX-License-Identifier: Apache-2.0
//! Reaping: every child of the agent, and every orphan that becomes one.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use libc::pid_t;
use tokio::signal::unix::{signal, SignalKind};
use tokio::sync::oneshot;

use crate::sys::host::realtime_ns;
use crate::sys::process::reap_one;

/// How and when a child ended.
#[derive(Clone, Copy, Debug)]
pub struct Reaped {
    /// Exit code, or 128 plus the signal's number.
    pub status: u32,
    /// Wall clock, nanoseconds since the epoch.
    pub at_ns: i64,
}

/// Knows which children somebody waits for. All others that end are orphans
/// and are reaped and forgotten.
#[derive(Clone, Debug, Default)]
pub struct Reaper {
    waiting: Arc<Mutex<HashMap<pid_t, oneshot::Sender<Reaped>>>>,
}

impl Reaper {
    /// Starts to reap, on a task of its own. Must run before the first child.
    ///
    /// # Errors
    /// When the handler for SIGCHLD cannot be installed.
    pub fn start() -> io::Result<Self> {
        let reaper = Self::default();
        let mut children = signal(SignalKind::child())?;
        let own = reaper.clone();
        tokio::spawn(async move {
            loop {
                own.reap_all();
                if children.recv().await.is_none() {
                    break;
                }
            }
        });
        Ok(reaper)
    }

    /// Tells when the child `pid` has ended. To be called right after the
    /// child was made, before anything is awaited: then the reaping task,
    /// which shares the thread, cannot have seen it yet.
    pub fn watch(&self, pid: pid_t) -> oneshot::Receiver<Reaped> {
        let (sender, receiver) = oneshot::channel();
        self.waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(pid, sender);
        receiver
    }

    fn reap_all(&self) {
        loop {
            match reap_one() {
                Ok(Some(ended)) => {
                    let sender = self
                        .waiting
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .remove(&ended.pid);
                    if let Some(sender) = sender {
                        // Nobody listens any more: then nobody wants to know.
                        let _ = sender.send(Reaped {
                            status: ended.status,
                            at_ns: realtime_ns(),
                        });
                    }
                }
                Ok(None) => return,
                Err(errno) => {
                    crate::error!("msg=\"cannot reap\" errno={errno}");
                    return;
                }
            }
        }
    }
}
