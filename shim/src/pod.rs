// SPDX-License-Identifier: Apache-2.0
//! The pod that this shim serves: its sandbox from the first container to
//! `Shutdown`, and what the shim itself keeps of every process.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::OpenOptions,
    path::{Path, PathBuf},
    sync::{
        atomic::{AtomicBool, Ordering},
        Arc, Mutex, MutexGuard, PoisonError,
    },
    time::Duration,
};

use bulkhead_runtime::{
    config::Config,
    error::chain,
    sandbox::{Event, PodSpec, Sandbox, SandboxRequest},
};
use tokio::{
    sync::{mpsc::UnboundedReceiver, watch},
    task::JoinHandle,
    time::timeout,
};

use crate::{
    error::CallError, events, forward::Queue, kept, lock::PodLock, options::Options,
    record::Record, sandbox::SandboxApi, socket, stdio::Streams,
};

/// How long processes may take to be seen to have ended with their machine.
const DEATH: Duration = Duration::from_secs(1);

/// Whose shim this is.
#[derive(Debug, Clone)]
pub struct Identity {
    /// containerd's namespace.
    pub namespace: String,
    /// The pod's id.
    pub group: String,
    /// Where containerd finds the shim.
    pub socket: PathBuf,
    /// CLOCK_MONOTONIC in microseconds when `start` began.
    pub started_us: u64,
    /// What the runtime handler's configuration says of this runtime.
    pub options: Options,
}

/// The pod.
#[derive(Debug)]
pub struct Pod {
    pub identity: Identity,
    phase: watch::Sender<Phase>,
    streams: Mutex<BTreeMap<Name, Streams>>,
    queue: Queue,
    pump: Mutex<Option<JoinHandle<()>>>,
    called: AtomicBool,
    /// What containerd's sandbox API has made of this pod.
    pub sandbox_api: SandboxApi,
}

/// A process: its container, and its own id if it is not the first one.
type Name = (String, Option<String>);

/// Where the pod is in its life.
#[derive(Debug, Clone)]
enum Phase {
    /// Nothing has been created yet.
    Empty,
    /// The machine is being booted.
    Starting,
    /// Containers can be created.
    Running(Sandbox),
    /// Everything is being given back.
    Ending,
    /// There is nothing any more.
    Ended,
}

fn name(id: &str, exec: Option<&str>) -> Name {
    (id.to_owned(), exec.map(str::to_owned))
}

impl Pod {
    /// A pod without anything in it; what happens goes to `queue`.
    pub fn new(identity: Identity, queue: Queue) -> Arc<Self> {
        Arc::new(Self {
            identity,
            phase: watch::Sender::new(Phase::Empty),
            streams: Mutex::default(),
            queue,
            pump: Mutex::default(),
            called: AtomicBool::new(false),
            sandbox_api: SandboxApi::default(),
        })
    }

    /// Somebody uses this shim.
    pub fn called(&self) {
        self.called.store(true, Ordering::Relaxed);
    }

    /// Whether somebody has ever used this shim.
    pub fn was_called(&self) -> bool {
        self.called.load(Ordering::Relaxed)
    }

    /// The sandbox; `None`: it has not been started, or is gone.
    pub fn running(&self) -> Option<Sandbox> {
        match &*self.phase.borrow() {
            Phase::Running(sandbox) => Some(sandbox.clone()),
            _ => None,
        }
    }

    /// The sandbox, for a call about container `id`.
    ///
    /// # Errors
    /// [`CallError::NoContainer`]: there is none, so there are no containers.
    pub fn sandbox(&self, id: &str) -> Result<Sandbox, CallError> {
        self.running()
            .ok_or_else(|| CallError::NoContainer(id.into()))
    }

    /// The sandbox for a new container with this bundle: the pod's, or a new
    /// one, which is the second value then. `spec`: of a pod that no container
    /// stands for.
    ///
    /// # Errors
    /// It cannot be started, or the shim is ending.
    pub async fn sandbox_for(
        self: &Arc<Self>,
        bundle: &Path,
        config: Config,
        spec: Option<PodSpec>,
    ) -> Result<(Sandbox, bool), CallError> {
        let mut phases = self.phase.subscribe();
        loop {
            let mine = self.phase.send_if_modified(|phase| {
                let empty = matches!(phase, Phase::Empty);
                if empty {
                    *phase = Phase::Starting;
                }
                empty
            });
            if mine {
                return Ok((self.boot(bundle, config, spec).await?, true));
            }
            match &*phases.borrow_and_update() {
                Phase::Running(sandbox) => return Ok((sandbox.clone(), false)),
                Phase::Ending | Phase::Ended => return Err(CallError::Stopping),
                Phase::Empty | Phase::Starting => {}
            }
            // The sender is in `self`: it does not go.
            let _ = phases.changed().await;
        }
    }

    async fn boot(
        self: &Arc<Self>,
        bundle: &Path,
        config: Config,
        spec: Option<PodSpec>,
    ) -> Result<Sandbox, CallError> {
        let request = SandboxRequest {
            namespace: self.identity.namespace.clone(),
            id: self.identity.group.clone(),
            bundle: bundle.into(),
            pod: spec,
            shim_start_us: self.identity.started_us,
            task_socket: Some(self.identity.socket.clone()),
        };
        match Sandbox::start(config, request).await {
            Ok((sandbox, events)) => {
                kept::at(
                    &sandbox.log_path(),
                    sandbox.config().runtime.log_kept_kib * 1024,
                );
                let pump = tokio::spawn(pump(self.clone(), events));
                *lock(&self.pump) = Some(pump);
                self.phase.send_replace(Phase::Running(sandbox.clone()));
                Ok(sandbox)
            }
            Err(error) => {
                self.phase.send_replace(Phase::Empty);
                Err(error.into())
            }
        }
    }

    /// A container could not be created: gives the sandbox back that was
    /// started for it, unless others use it by now.
    pub async fn unwind(&self, sandbox: &Sandbox) {
        let mine = self.phase.send_if_modified(|phase| {
            let unused = matches!(phase, Phase::Running(_)) && sandbox.containers().is_empty();
            if unused {
                *phase = Phase::Starting;
            }
            unused
        });
        if !mine {
            return;
        }
        give_back(sandbox).await;
        self.phase.send_replace(Phase::Empty);
    }

    /// Writes down what `delete` needs to know. Without it a container that
    /// works would be cleaned up worse, so this is no error.
    pub fn record(&self, bundle: &Path, config: &Config, pid: u32) {
        let record = Record {
            group: self.identity.group.clone(),
            state_dir: config.runtime.state_dir.clone(),
            pid,
        };
        if let Err(error) = record.write(bundle) {
            tracing::warn!(bundle = %bundle.display(), %error, "not written down for delete");
        }
    }

    /// Keeps a process's streams.
    pub fn keep(&self, id: &str, exec: Option<&str>, streams: Streams) {
        let before = lock(&self.streams).insert(name(id, exec), streams);
        debug_assert!(before.is_none(), "processes have names of their own");
    }

    /// Changes what is kept of a process's streams.
    pub fn with_streams<T>(
        &self,
        id: &str,
        exec: Option<&str>,
        change: impl FnOnce(&mut Streams) -> T,
    ) -> Option<T> {
        lock(&self.streams).get_mut(&name(id, exec)).map(change)
    }

    /// Lets a process's streams go, and with a container's first process those
    /// of all of its processes.
    pub fn drop_streams(&self, id: &str, exec: Option<&str>) {
        let gone: Vec<Name> = lock(&self.streams)
            .keys()
            .filter(|(container, process)| {
                container == id && (exec.is_none() || process.as_deref() == exec)
            })
            .cloned()
            .collect();
        for name in gone {
            // A lock of its own each time: what is dropped may take a moment.
            let streams = lock(&self.streams).remove(&name);
            if let Some(streams) = streams {
                tokio::spawn(streams.finish());
            }
        }
    }

    /// Children that are waited for elsewhere; none while that is not known.
    pub fn children(&self) -> Option<BTreeSet<u32>> {
        let vmm = match &*self.phase.borrow() {
            Phase::Running(sandbox) => sandbox.hypervisor_pid(),
            // While it starts or ends there are children without a name.
            _ => return None,
        };
        let mut children: BTreeSet<u32> = lock(&self.streams)
            .values()
            .filter_map(Streams::child)
            .collect();
        children.insert(vmm);
        children.extend(bulkhead_runtime::hooks::children());
        Some(children)
    }

    /// `Shutdown`: ends the shim unless there are containers, or a sandbox
    /// that has a shutdown of its own.
    pub async fn shutdown(self: &Arc<Self>) {
        if self.sandbox_api.is_used() {
            return;
        }
        let idle = match &*self.phase.borrow() {
            Phase::Empty | Phase::Ending | Phase::Ended => true,
            Phase::Starting => false,
            Phase::Running(sandbox) => sandbox.containers().is_empty(),
        };
        if idle {
            self.end().await;
        }
    }

    /// Gives everything back, whatever there is. Whoever comes second waits.
    pub async fn end(self: &Arc<Self>) {
        let mut phases = self.phase.subscribe();
        // A machine that is being booted is ended when it is there.
        let _ = phases
            .wait_for(|phase| !matches!(phase, Phase::Starting))
            .await;
        let mut sandbox = None;
        let mine = self.phase.send_if_modified(|phase| match phase {
            Phase::Empty => {
                *phase = Phase::Ending;
                true
            }
            Phase::Running(running) => {
                sandbox = Some(running.clone());
                *phase = Phase::Ending;
                true
            }
            Phase::Starting | Phase::Ending | Phase::Ended => false,
        });
        if mine {
            self.give_up(sandbox).await;
        }
        self.ended().await;
    }

    async fn give_up(&self, sandbox: Option<Sandbox>) {
        // Who starts a shim of this name meanwhile waits until all is gone.
        let path = self.identity.socket.clone();
        let locked = tokio::task::spawn_blocking(move || PodLock::acquire(&path)).await;
        if let Ok(Err(error)) = &locked {
            tracing::warn!(%error, "pod not locked");
        }
        if let Err(error) = socket::remove(&self.identity.socket) {
            tracing::warn!(%error, "socket not removed");
        }
        if let Some(sandbox) = sandbox {
            let containers = sandbox.containers();
            give_back(&sandbox).await;
            for id in containers {
                // All have ended; this sees to it that it has been told.
                let _ = timeout(DEATH, sandbox.wait(&id, None)).await;
            }
        }
        drop(locked);
        self.phase.send_replace(Phase::Ended);
        let pump = lock(&self.pump).take();
        if let Some(pump) = pump {
            let _ = pump.await;
        }
    }

    /// Waits until there is nothing any more.
    pub async fn ended(&self) {
        let mut phases = self.phase.subscribe();
        // The sender is in `self`: it does not go.
        let _ = phases.wait_for(|phase| matches!(phase, Phase::Ended)).await;
    }

    fn handle(&self, event: Event, sandbox_event: impl FnOnce(Event)) {
        match &event {
            Event::Exited { id, exec, .. } => {
                self.with_streams(id, exec.as_deref(), Streams::ended);
            }
            Event::Oom { id } => self.mark_oom(id),
            _ => {}
        }
        sandbox_event(event);
    }

    /// CRI-O, which gets no events, looks for this file.
    fn mark_oom(&self, id: &str) {
        let state = self.sandbox(id).ok().and_then(|s| s.state(id, None).ok());
        if let Some(state) = state {
            let path = state.bundle.join("oom");
            let made = OpenOptions::new().create(true).append(true).open(path);
            if let Err(error) = made {
                tracing::warn!(id, %error, "file oom not made");
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub async fn give_back(sandbox: &Sandbox) {
    // Its files go with the sandbox.
    kept::end();
    if let Err(error) = sandbox.shutdown().await {
        tracing::error!(error = chain(&error), "not everything could be given back");
    }
}

/// Moves what happens to the queue, in its order, until the pod has ended and
/// all has been told.
async fn pump(pod: Arc<Pod>, mut happened: UnboundedReceiver<Event>) {
    loop {
        let event = tokio::select! {
            biased;
            event = happened.recv() => event,
            () = pod.ended() => None,
        };
        let Some(event) = event else {
            return;
        };
        pod.handle(event, |event| {
            match events::envelope(&pod.identity.namespace, event) {
                Ok(envelope) => pod.queue.push(envelope),
                Err(error) => tracing::error!(%error, "event cannot be written"),
            }
        });
    }
}
