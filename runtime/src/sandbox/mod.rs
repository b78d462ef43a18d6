// SPDX-License-Identifier: Apache-2.0
//! The pod: one virtual machine and the containers in it.
//!
//! [`boot`] starts the machine, [`container`] makes and removes containers,
//! [`process`] is about what runs in them, [`state`] is what the host knows
//! of all that, [`directory`] is where it keeps it.

mod boot;
mod container;
pub(crate) mod directory;
mod files;
mod host;
mod late;
mod layers;
mod mirror;
mod mountpoints;
mod observe;
mod ports;
mod process;
mod resize;
mod rootfs;
mod state;
mod types;
mod volumes;
mod watcher;
mod work;

use std::{
    fs::File,
    future::Future,
    path::{Path, PathBuf},
    sync::{
        atomic::{AtomicBool, AtomicU64, Ordering},
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
    },
    time::Duration,
};

use bulkhead_agent_protocol::agent::StatsReply;
use oci_spec::runtime::LinuxResources;
use tokio::{
    sync::{mpsc::UnboundedReceiver, watch, Semaphore},
    task::JoinSet,
    time::timeout,
};

pub(crate) use self::observe::Observed;
use self::{
    directory::Directory, files::PodFiles, late::LateNetwork, state::Pod, volumes::Volumes,
    watcher::Watcher,
};
pub use self::{
    types::*,
    work::{Arriving, FileCopy, GuestCommand, Work, FILE_COPY, GUEST_COMMAND},
};
use crate::{
    agent::{Agent, Streams},
    config::Config,
    error::{Error, ErrorKind},
    fault::Fault,
    hypervisor::{bulkhead::BulkheadVmm, console::Console, Ending, Hypervisor},
    io::Stdio,
    oci::Size,
    operator::history::History,
    resource::journal::Journal,
    timeline::Timeline,
};

/// How long an ending machine may take to be seen to have ended, once its
/// agent does not answer any more.
const LAST_MOMENT: Duration = Duration::from_secs(1);

/// A running pod. A handle: clones are the same pod. When the last one is
/// dropped the virtual machine ends; [`Sandbox::shutdown`] gives back what
/// else was taken from the host.
#[derive(Debug, Clone)]
pub struct Sandbox {
    inner: Arc<Inner>,
}

/// What the pod is made of.
struct Inner {
    namespace: String,
    id: String,
    size: Size,
    config: Config,
    fault: Fault,
    directory: Directory,
    journal: Journal,
    vm: BulkheadVmm,
    agent: Agent,
    streams: Streams,
    timeline: Timeline,
    /// Those of a pod that no container stands for; none: one does.
    files: Option<PodFiles>,
    console: Arc<Console>,
    history: Arc<History>,
    volumes: Volumes,
    watcher: Watcher,
    /// Why the machine is being ended, where that is our decision.
    verdict: OnceLock<String>,
    /// Health questions without an answer.
    unanswered: AtomicU64,
    /// What goes on beside; ends with the pod.
    tasks: Mutex<JoinSet<()>>,
    pod: Mutex<Pod>,
    /// What the machine has beyond what it booted with: one at a time changes
    /// it.
    extra: Semaphore,
    /// The first container's hooks have run already, for its network.
    hooked: AtomicBool,
    /// The network namespace that was made for the pod; its path is open here.
    _network: Option<File>,
    /// Its network, where that comes later.
    late: Option<LateNetwork>,
    /// Set once everything has been given back: what could not be.
    closed: watch::Sender<Option<Option<String>>>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl Inner {
    /// The state, for a moment: never across an await.
    fn pod(&self) -> MutexGuard<'_, Pod> {
        self.pod.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unanswered(&self) -> u64 {
        self.unanswered.load(Ordering::Relaxed)
    }

    fn count_unanswered(&self) {
        self.unanswered.fetch_add(1, Ordering::Relaxed);
    }

    /// Says that the machine has ended where an error is a consequence of it.
    async fn explain(&self, error: Error) -> Error {
        if error.kind() != ErrorKind::Unavailable {
            return error;
        }
        let mut ending = self.vm.ending();
        let ended = timeout(LAST_MOMENT, ending.wait_for(Option::is_some)).await;
        match ended {
            Ok(Ok(ending)) => {
                Error::VmEnded(ending.as_ref().map_or_else(String::new, Ending::to_string))
            }
            _ => error,
        }
    }

    fn first_output(&self) {
        self.timeline.first_output(&self.id, self.vm.timeline());
    }
}

/// Runs blocking work of the host on a thread of its own.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    finished(tokio::task::spawn_blocking(work)).await
}

async fn finished<T>(task: tokio::task::JoinHandle<Result<T, Error>>) -> Result<T, Error> {
    match task.await {
        Ok(result) => result,
        Err(error) => Err(Error::Internal(format!("a task ended early: {error}"))),
    }
}

impl Sandbox {
    /// Boots the pod's virtual machine and sets its guest up: network, host
    /// name, shared directory. Containers follow with [`Sandbox::create`].
    /// What happens in the pod arrives at the receiver.
    ///
    /// # Errors
    /// What is wrong with the bundle, the configuration or the host; the
    /// machine's last words where it died. Nothing is left behind then.
    pub async fn start(
        config: Config,
        request: SandboxRequest,
    ) -> Result<(Sandbox, UnboundedReceiver<Event>), Error> {
        boot::start(config, request).await
    }

    /// Where the front end may keep its log: with the pod's state, and gone
    /// with it.
    pub fn log_path(&self) -> PathBuf {
        self.inner.directory.log()
    }

    /// The configuration that is in force for this pod.
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// Process id of the VMM, which stands for every process of the pod.
    pub fn hypervisor_pid(&self) -> u32 {
        self.inner.vm.pid()
    }

    /// Waits until the machine has ended; gives whether it did so by itself
    /// or because it was told to.
    pub async fn ended(&self) -> bool {
        let mut ending = self.inner.vm.ending();
        let ended = ending.wait_for(Option::is_some).await;
        ended.is_ok_and(|ending| ending.as_ref().is_some_and(Ending::is_orderly))
    }

    /// Makes a container, up to its waiting first process. Returns the
    /// process id that stands for it.
    ///
    /// # Errors
    /// What is wrong with the bundle or the host, or the agent's answer.
    /// Nothing is left of the container then.
    pub async fn create(&self, request: CreateRequest) -> Result<u32, Error> {
        let inner = self.inner.clone();
        self.whole(container::create(inner, request)).await
    }

    /// Runs what [`Sandbox::create`] or [`Sandbox::exec`] has prepared.
    /// Returns the process id that stands for it.
    ///
    /// # Errors
    /// It runs already, or cannot be run.
    pub async fn start_process(&self, id: &str, exec: Option<&str>) -> Result<u32, Error> {
        let (inner, id, exec) = (self.inner.clone(), id.into(), exec.map(Into::into));
        self.whole(process::start(inner, id, exec)).await
    }

    /// Describes a further process, for [`Sandbox::start_process`] to run.
    ///
    /// # Errors
    /// There is one of that name, or the container does not run.
    pub async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        work: Work,
        stdio: Stdio,
    ) -> Result<(), Error> {
        process::describe(&self.inner, id, exec_id, work, stdio)
    }

    /// What the host knows of a process; the guest is not asked.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn state(&self, id: &str, exec: Option<&str>) -> Result<ProcessState, Error> {
        self.inner.pod().state(id, exec)
    }

    /// Waits until a process has ended.
    ///
    /// # Errors
    /// [`Error::NotFound`], also when it is deleted meanwhile.
    pub async fn wait(&self, id: &str, exec: Option<&str>) -> Result<Exit, Error> {
        process::wait(&self.inner, id, exec).await
    }

    /// Sends a signal to a process, or to all of its container.
    ///
    /// # Errors
    /// [`Error::Finished`] when it has ended.
    pub async fn kill(
        &self,
        id: &str,
        exec: Option<&str>,
        signal: u32,
        all: bool,
    ) -> Result<(), Error> {
        process::kill(&self.inner, id, exec, signal, all).await
    }

    /// Sets the size of a process's terminal, in characters.
    ///
    /// # Errors
    /// It has none, or does not run.
    pub async fn resize_pty(
        &self,
        id: &str,
        exec: Option<&str>,
        width: u16,
        height: u16,
    ) -> Result<(), Error> {
        process::resize(&self.inner, id, exec, width, height).await
    }

    /// The caller writes no more to a process's standard input. What ends the
    /// stream is that the caller closes its last write end of what it gave as
    /// [`Stdio::stdin`]; this checks that there is such a process.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn close_stdin(&self, id: &str, exec: Option<&str>) -> Result<(), Error> {
        self.inner.pod().process(id, exec).map(drop)
    }

    /// Process ids of a container in the guest, with the names of those that
    /// [`Sandbox::exec`] began.
    ///
    /// # Errors
    /// It does not exist, or the agent's answer.
    pub async fn pids(&self, id: &str) -> Result<Vec<(u32, Option<String>)>, Error> {
        container::pids(&self.inner, id).await
    }

    /// A container's resource usage.
    ///
    /// # Errors
    /// It does not exist, or the agent's answer.
    pub async fn stats(&self, id: &str) -> Result<StatsReply, Error> {
        container::stats(&self.inner, id).await
    }

    /// Freezes a container.
    ///
    /// # Errors
    /// It does not run.
    pub async fn pause(&self, id: &str) -> Result<(), Error> {
        let (inner, id) = (self.inner.clone(), id.to_owned());
        self.whole(container::pause(inner, id)).await
    }

    /// Thaws a container.
    ///
    /// # Errors
    /// It is not frozen.
    pub async fn resume(&self, id: &str) -> Result<(), Error> {
        let (inner, id) = (self.inner.clone(), id.to_owned());
        self.whole(container::resume(inner, id)).await
    }

    /// Changes a container's limits, and the machine's size with them as far as
    /// the configuration lets it (`hypervisor.extra_vcpus`,
    /// `hypervisor.extra_memory_mib`).
    ///
    /// # Errors
    /// It does not exist, the agent's answer, or the guest does not take what it
    /// is to get; nothing is changed then.
    pub async fn update(&self, id: &str, resources: LinuxResources) -> Result<(), Error> {
        let (inner, id) = (self.inner.clone(), id.to_owned());
        self.whole(container::update(inner, id, resources)).await
    }

    /// Removes a container or a further process that has ended or was never
    /// started.
    ///
    /// # Errors
    /// It runs.
    pub async fn delete(&self, id: &str, exec: Option<&str>) -> Result<Deleted, Error> {
        let (inner, id) = (self.inner.clone(), id.to_owned());
        match exec {
            None => self.whole(container::delete(inner, id)).await,
            Some(exec) => {
                let exec = exec.to_owned();
                self.whole(process::delete(inner, id, exec)).await
            }
        }
    }

    /// Ids of all containers.
    pub fn containers(&self) -> Vec<String> {
        self.inner.pod().containers.keys().cloned().collect()
    }

    /// Ends the virtual machine and gives back everything that was taken from
    /// the host. Any number of times.
    ///
    /// # Errors
    /// What could not be given back; it stays in the journal for
    /// [`recover`].
    pub async fn shutdown(&self) -> Result<(), Error> {
        let first = !std::mem::replace(&mut self.inner.pod().closing, true);
        if first {
            let inner = self.inner.clone();
            tokio::spawn(async move {
                inner
                    .vm
                    .shutdown(inner.config.hypervisor.stop_timeout())
                    .await;
                let directory = inner.directory.clone();
                let released = blocking(move || directory.release()).await;
                let left = released.err().map(|error| crate::error::chain(&error));
                inner.closed.send_replace(Some(left));
            });
        }
        let mut closed = self.inner.closed.subscribe();
        let left = match closed.wait_for(Option::is_some).await {
            Ok(closed) => closed.clone().flatten(),
            Err(_) => None,
        };
        match left {
            Some(left) => Err(Error::Internal(left)),
            None => Ok(()),
        }
    }

    /// Runs an operation to its end even when the caller gives up on it: half
    /// of one would leave things behind.
    async fn whole<T: Send + 'static>(
        &self,
        operation: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        let result = finished(tokio::spawn(operation)).await;
        match result {
            Ok(value) => Ok(value),
            Err(error) => Err(self.inner.explain(error).await),
        }
    }
}

/// Gives back everything that a sandbox whose front end died had taken: its
/// VMM is killed if it still runs. Any number of times; blocks.
///
/// # Errors
/// What could not be given back; it stays in the journal for another try.
pub fn recover(state_dir: &Path, namespace: &str, id: &str) -> Result<(), Error> {
    Directory::of(state_dir, namespace, id).release()
}
