// SPDX-License-Identifier: Apache-2.0
//! The shim's pod: not started, running, or gone.

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use bulkhead_runtime::{
    config::Config,
    error::chain,
    sandbox::{Sandbox, SandboxRequest},
};
use tokio::sync::{mpsc::UnboundedSender, watch};

use crate::{
    error::CallError,
    events::{self, Message},
    flags::Flags,
};

/// One pod, shared by all calls.
pub struct Pod {
    namespace: String,
    /// The pod's id.
    group: String,
    bundle: PathBuf,
    started_us: u64,
    state: Mutex<State>,
    /// Set when the shim is to go.
    stopped: watch::Sender<bool>,
}

struct State {
    slot: Slot,
    used: bool,
    /// Write ends that keep standard inputs from ending, by container and
    /// further process.
    stdin: HashMap<(String, String), OwnedFd>,
    messages: Option<UnboundedSender<Message>>,
}

enum Slot {
    /// No virtual machine.
    Empty,
    /// One is being started; the receiver's end tells when that is over.
    Starting(watch::Receiver<()>),
    Running(Sandbox, PathBuf),
    /// There will be none any more.
    Gone,
}

impl Pod {
    /// A pod that is not started. `messages`: where its events go.
    pub fn new(flags: &Flags, bundle: &Path, messages: UnboundedSender<Message>) -> Self {
        Self {
            namespace: flags.namespace.clone(),
            group: match flags.group.is_empty() {
                true => flags.id.clone(),
                false => flags.group.clone(),
            },
            bundle: bundle.into(),
            started_us: match flags.started_us {
                0 => bulkhead_runtime::clock::monotonic_us(),
                stamp => stamp,
            },
            state: Mutex::new(State {
                slot: Slot::Empty,
                used: false,
                stdin: HashMap::new(),
                messages: Some(messages),
            }),
            stopped: watch::Sender::new(false),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The running sandbox.
    pub fn sandbox(&self) -> Option<Sandbox> {
        match &self.state().slot {
            Slot::Running(sandbox, _) => Some(sandbox.clone()),
            Slot::Empty | Slot::Starting(_) | Slot::Gone => None,
        }
    }

    /// Whether a container was ever asked for.
    pub fn was_used(&self) -> bool {
        self.state().used
    }

    /// The running sandbox and where it keeps its state; started if it is
    /// not. `bundle` is that of the container that needs it, `config` the
    /// configuration that its options name.
    ///
    /// # Errors
    /// Why it cannot be started; then there is none, and the next container
    /// is another try.
    pub async fn started(
        &self,
        bundle: &Path,
        config: Option<&Path>,
    ) -> Result<(Sandbox, PathBuf), CallError> {
        let _over = loop {
            let mut other = {
                let mut state = self.state();
                state.used = true;
                match &state.slot {
                    Slot::Running(sandbox, state_dir) => {
                        return Ok((sandbox.clone(), state_dir.clone()));
                    }
                    Slot::Gone => return Err(CallError::Stopping),
                    Slot::Starting(other) => other.clone(),
                    Slot::Empty => {
                        let (over, starting) = watch::channel(());
                        state.slot = Slot::Starting(starting);
                        break over;
                    }
                }
            };
            // Fails when it is over, which is what is waited for.
            let _ = other.changed().await;
        };
        let started = self.start(bundle, config).await;
        let mut state = self.state();
        match started {
            Ok((sandbox, state_dir)) => {
                state.slot = Slot::Running(sandbox.clone(), state_dir.clone());
                Ok((sandbox, state_dir))
            }
            Err(error) => {
                state.slot = Slot::Empty;
                Err(error)
            }
        }
    }

    async fn start(
        &self,
        bundle: &Path,
        config: Option<&Path>,
    ) -> Result<(Sandbox, PathBuf), CallError> {
        let config = Config::load(config)?;
        let state_dir = config.runtime.state_dir.clone();
        let bundle = match bundle.as_os_str().is_empty() {
            true => &self.bundle,
            false => bundle,
        };
        let request = SandboxRequest {
            namespace: self.namespace.clone(),
            id: self.group.clone(),
            bundle: bundle.into(),
            shim_start_us: self.started_us,
        };
        let (sandbox, events) = Sandbox::start(config, request).await?;
        if let Some(messages) = self.state().messages.clone() {
            tokio::spawn(events::pass_on(events, messages));
        }
        Ok((sandbox, state_dir))
    }

    /// Keeps a standard input from ending.
    pub fn hold_stdin(&self, id: &str, exec: &str, hold: Option<OwnedFd>) {
        if let Some(hold) = hold {
            self.state().stdin.insert((id.into(), exec.into()), hold);
        }
    }

    /// Lets a standard input end, once its writers have gone.
    pub fn release_stdin(&self, id: &str, exec: &str) {
        self.state().stdin.remove(&(id.into(), exec.into()));
    }

    /// Ends the virtual machine if nothing is in it, after a container could
    /// not be made. The next one gets a new machine.
    pub async fn give_up_if_empty(&self) {
        if let Some(sandbox) = self.take_if_empty(Slot::Empty) {
            end(&sandbox).await;
        }
    }

    /// Ends the virtual machine if nothing is in it, and the shim.
    pub async fn shut_down_if_empty(&self) {
        match self.take_if_empty(Slot::Gone) {
            Some(sandbox) => end(&sandbox).await,
            None if self.has_machine() => return,
            None => self.state().slot = Slot::Gone,
        }
        self.stopped.send_replace(true);
    }

    /// Ends the virtual machine with everything in it.
    pub async fn shut_down(&self) {
        let slot = std::mem::replace(&mut self.state().slot, Slot::Gone);
        if let Slot::Running(sandbox, _) = slot {
            end(&sandbox).await;
        }
    }

    fn has_machine(&self) -> bool {
        matches!(self.state().slot, Slot::Running(..) | Slot::Starting(_))
    }

    fn take_if_empty(&self, instead: Slot) -> Option<Sandbox> {
        let mut state = self.state();
        match &state.slot {
            Slot::Running(sandbox, _) if sandbox.containers().is_empty() => {
                let sandbox = sandbox.clone();
                state.slot = instead;
                Some(sandbox)
            }
            _ => None,
        }
    }

    /// No events after those that are under way.
    pub fn close_events(&self) {
        self.state().messages = None;
    }

    /// Returns when the shim is to go.
    pub async fn stopped(&self) {
        // Fails only without a sender, which is here.
        let _ = self.stopped.subscribe().wait_for(|stopped| *stopped).await;
    }
}

async fn end(sandbox: &Sandbox) {
    if let Err(error) = sandbox.shutdown().await {
        tracing::error!(error = chain(&error), "not everything could be given back");
    }
}
