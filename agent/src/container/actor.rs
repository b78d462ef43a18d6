// SPDX-License-Identifier: Apache-2.0
//! One container's actor.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_agent_protocol::agent;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::copy::CopyPlan;
use super::namespaces::PidNamespace;
use super::plan::{self, ContainerPlan};
use super::process::{self, ExitWatch, Further, Gate, Process};
use super::state::{next, Event, State};
use super::{check_name, Containers, Made, Message, Reply, Work};
use crate::cgroup::{resources, stats, Cgroup};
use crate::error::{AgentError, Result};
use crate::mirror::Mirrors;
use crate::stdio;
use crate::steps::{Step, Steps};

/// How long a killed process may take to be gone.
const DEATH: Duration = Duration::from_secs(5);

/// News from the actor's own tasks.
#[derive(Debug)]
pub enum Own {
    /// The first process exists and can be signalled.
    Born(Process),
    /// The first process is ready, or failed to be.
    Ready(Result<(Process, Gate, Steps)>),
    /// The program was executed, or could not be.
    Started(Result<()>, Reply<()>),
    /// The first process has ended.
    Exited,
    /// A further process runs, or could not be made.
    Exec(String, Result<(Process, Steps)>, Reply<Made>),
}

/// A further process.
#[derive(Debug)]
enum Exec {
    /// Being made; its name is taken.
    Creating,
    Made(Process),
}

struct Actor {
    id: String,
    containers: Containers,
    mailbox: mpsc::UnboundedSender<Message>,
    state: State,
    plan: Arc<ContainerPlan>,
    cgroup: Arc<Cgroup>,
    init: Option<Process>,
    gate: Option<Gate>,
    execs: HashMap<String, Exec>,
    mirrors: Mirrors,
    /// Of processes of the guest itself, once there were any.
    guest_group: Option<Arc<Cgroup>>,
    created: Option<Reply<Made>>,
}

/// Makes a container's cgroup and starts its actor, which answers `created`
/// when the first process is ready. `neighbour`: whose pid namespace it joins.
///
/// # Errors
/// When the cgroup cannot be made or limited as asked.
pub fn start(
    containers: Containers,
    id: String,
    plan: ContainerPlan,
    neighbour: Option<Process>,
    stdio: Option<agent::Stdio>,
    mirrors: &[agent::Mirror],
    (mut steps, created): (Steps, Reply<Made>),
) -> Result<mpsc::UnboundedSender<Message>> {
    let mirrors = Mirrors::make(&containers.shared().mirrors.join(&id), mirrors)?;
    let cgroup = Arc::new(containers.shared().hierarchy.container(&id)?);
    if let Err(error) = resources::apply(&cgroup, &plan.resources, true) {
        // Nothing is in it yet.
        let _ = std::fs::remove_dir(cgroup.path());
        return Err(error);
    }
    steps.done(Step::Group);
    let (mailbox, messages) = mpsc::unbounded_channel();
    let actor = Actor {
        id,
        containers,
        mailbox: mailbox.clone(),
        state: State::Creating,
        plan: Arc::new(plan),
        cgroup,
        init: None,
        gate: None,
        execs: HashMap::new(),
        mirrors,
        guest_group: None,
        created: Some(created),
    };
    actor.launch(neighbour, stdio, steps);
    tokio::spawn(actor.run(messages));
    Ok(mailbox)
}

impl Actor {
    /// Makes the first process, on a task of its own.
    fn launch(&self, neighbour: Option<Process>, stdio: Option<agent::Stdio>, mut steps: Steps) {
        let shared = self.containers.clone();
        let (plan, cgroup, mailbox) =
            (self.plan.clone(), self.cgroup.clone(), self.mailbox.clone());
        // Nobody reads the mailbox any more: then the container is gone.
        let tell = move |mailbox: &mpsc::UnboundedSender<Message>, own| {
            let _ = mailbox.send(Message::Own(own));
        };
        tokio::spawn(async move {
            let launch = async {
                let shared = shared.shared();
                let streams =
                    process::open_streams(shared, stdio.as_ref(), plan.process.terminal).await?;
                steps.done(Step::Streams);
                let child =
                    process::spawn_init(shared, &plan, neighbour.as_ref(), &cgroup, streams)?;
                tell(&mailbox, Own::Born(child.process.clone()));
                let ended = mailbox.clone();
                child.ready(steps, move || tell(&ended, Own::Exited)).await
            };
            let result = launch.await;
            tell(&mailbox, Own::Ready(result));
        });
    }

    async fn run(mut self, mut messages: mpsc::UnboundedReceiver<Message>) {
        while let Some(message) = messages.recv().await {
            if self.handle(message).await {
                break;
            }
        }
    }

    /// Takes one message. `true`: the container is no more.
    async fn handle(&mut self, message: Message) -> bool {
        match message {
            Message::Start(reply) => self.start(reply),
            Message::Exec(work, steps, reply) => {
                let id = work.exec_id().to_owned();
                match self.exec(*work) {
                    Ok(job) => self.run_exec(id, job, steps, reply),
                    Err(error) => answer(reply, Err(error)),
                }
            }
            Message::Signal(request, reply) => answer(reply, self.signal(&request)),
            Message::Wait(exec_id, reply) => answer(reply, self.exit_of(&exec_id)),
            Message::Resize(request, reply) => answer(reply, self.resize(&request)),
            Message::List(reply) => answer(reply, self.list()),
            Message::Stats(reply) => {
                let allowed = self.allows(Event::Inspect);
                answer(reply, allowed.map(|_| stats::collect(&self.cgroup)));
            }
            Message::Pause(pause, reply) => answer(reply, self.pause(pause).await),
            Message::Update(resources, reply) => {
                let allowed = self.allows(Event::Update);
                let result =
                    allowed.and_then(|_| resources::apply(&self.cgroup, &resources, false));
                answer(reply, result);
            }
            Message::Mirror(mirror, reply) => answer(reply, self.mirrors.update(&mirror)),
            Message::Delete(reply) => {
                let result = self.delete().await;
                let gone = result.is_ok();
                if gone {
                    self.containers.forget(&self.id);
                }
                answer(reply, result);
                return gone;
            }
            Message::DeleteProcess(exec_id, reply) => {
                answer(reply, self.delete_process(&exec_id));
            }
            Message::PidNamespace(reply) => answer(reply, self.pid_namespace()),
            Message::Own(own) => return self.own(own).await,
        }
        false
    }

    async fn own(&mut self, own: Own) -> bool {
        match own {
            Own::Born(process) => self.init = Some(process),
            Own::Ready(Ok((process, gate, steps))) => {
                let pid = process.pid as u32;
                self.init = Some(process);
                self.gate = Some(gate);
                // It may have been killed already; then that stands.
                self.state = next(self.state, Event::Ready).unwrap_or(self.state);
                if let Some(created) = self.created.take() {
                    answer(created, Ok(Made { pid, steps }));
                }
            }
            Own::Ready(Err(error)) => {
                if let Err(left) = self.cgroup.remove().await {
                    crate::warn!("msg=\"cgroup left behind\" id={} error=\"{left}\"", self.id);
                }
                self.containers.forget(&self.id);
                if let Some(created) = self.created.take() {
                    answer(created, Err(error));
                }
                return true;
            }
            Own::Started(result, reply) => {
                self.state = next(self.state, Event::Started).unwrap_or(self.state);
                answer(reply, result);
            }
            Own::Exited => {
                self.state = next(self.state, Event::Exited).unwrap_or(self.state);
                // With a pid namespace the kernel has done it.
                let own = self.plan.namespaces.pid == PidNamespace::Own;
                let group = (!own).then_some(&self.cgroup);
                for group in group.into_iter().chain(&self.guest_group) {
                    if let Err(error) = group.kill() {
                        crate::warn!("msg=\"cannot kill\" id={} error=\"{error}\"", self.id);
                    }
                }
            }
            Own::Exec(id, result, reply) => match result {
                Ok((process, steps)) => {
                    let pid = process.pid as u32;
                    self.execs.insert(id, Exec::Made(process));
                    answer(reply, Ok(Made { pid, steps }));
                }
                Err(error) => {
                    self.execs.remove(&id);
                    answer(reply, Err(error));
                }
            },
        }
        false
    }

    /// The state after `event`, without going there.
    fn allows(&self, event: Event) -> Result<State> {
        next(self.state, event).map_err(|refused| {
            AgentError::Precondition(format!(
                "container {} is {} and cannot {}",
                self.id, refused.state, refused.event
            ))
        })
    }

    fn start(&mut self, reply: Reply<()>) {
        let gate = match self.allows(Event::Start) {
            Ok(state) => {
                self.state = state;
                self.gate.take()
            }
            Err(error) => return answer(reply, Err(error)),
        };
        let Some(gate) = gate else {
            let text = format!("container {} has no process to start", self.id);
            return answer(reply, Err(AgentError::Internal(text)));
        };
        let mailbox = self.mailbox.clone();
        tokio::spawn(async move {
            let result = gate.open().await;
            let _ = mailbox.send(Message::Own(Own::Started(result, reply)));
        });
    }

    /// Checks a request for a further process and takes its name.
    fn exec(&mut self, work: Work) -> Result<ExecJob> {
        let exec_id = work.exec_id().to_owned();
        check_name(&exec_id, "exec_id")?;
        self.allows(Event::Exec)?;
        let init = self
            .init
            .clone()
            .ok_or_else(|| AgentError::Internal("no first process".into()))?;
        if self.execs.contains_key(&exec_id) {
            return Err(AgentError::AlreadyExists(format!(
                "process {exec_id} of container {}",
                self.id
            )));
        }
        let missing = || AgentError::Invalid("process: missing".into());
        let mut cgroup = self.cgroup.clone();
        let (what, stdio) = match work {
            Work::Program(request) => {
                let process = request.process.as_ref().ok_or_else(missing)?;
                let plan = plan::process(process, Some(&self.plan.process))?;
                (Further::Program(plan), request.stdio)
            }
            Work::Guest(request) => {
                let process = request.process.as_ref().ok_or_else(missing)?;
                let plan = plan::process(process, None)?;
                cgroup = self.guest_group()?;
                (Further::Guest(plan), request.stdio)
            }
            Work::Copy(request) => (Further::Copy(CopyPlan::new(&request)?), request.stdio),
        };
        self.execs.insert(exec_id, Exec::Creating);
        Ok(ExecJob {
            what,
            init,
            cgroup,
            stdio: stdio.into_option(),
        })
    }

    /// The group of the guest's own processes that belong to this container.
    fn guest_group(&mut self) -> Result<Arc<Cgroup>> {
        if let Some(group) = &self.guest_group {
            return Ok(group.clone());
        }
        let made = self.containers.shared().hierarchy.beside(&self.id)?;
        Ok(self.guest_group.insert(Arc::new(made)).clone())
    }

    fn run_exec(&self, id: String, job: ExecJob, mut steps: Steps, reply: Reply<Made>) {
        let containers = self.containers.clone();
        let (plan, mailbox) = (self.plan.clone(), self.mailbox.clone());
        tokio::spawn(async move {
            let launch = async {
                let shared = containers.shared();
                let terminal = job.what.terminal();
                let streams = process::open_streams(shared, job.stdio.as_ref(), terminal).await?;
                steps.done(Step::Streams);
                let (what, init, cgroup) = (&job.what, &job.init, &job.cgroup);
                let child = process::spawn_further(shared, &plan, what, init, cgroup, streams)?;
                let (process, gate, steps) = child.ready(steps, || {}).await?;
                gate.open().await?;
                Ok((process, steps))
            };
            let result = launch.await;
            let _ = mailbox.send(Message::Own(Own::Exec(id, result, reply)));
        });
    }

    /// By which process others join this container's pid namespace.
    fn pid_namespace(&self) -> Result<Option<Process>> {
        if self.plan.namespaces.pid == PidNamespace::Guest {
            return Ok(None);
        }
        match &self.init {
            Some(init) if !init.has_ended() => Ok(Some(init.clone())),
            _ => Err(AgentError::Precondition(format!(
                "container {} has no process whose pid namespace could be joined",
                self.id
            ))),
        }
    }

    fn process(&self, exec_id: &str) -> Result<&Process> {
        let found = if exec_id.is_empty() {
            self.init.as_ref()
        } else {
            match self.execs.get(exec_id) {
                Some(Exec::Made(process)) => Some(process),
                Some(Exec::Creating) | None => None,
            }
        };
        found.ok_or_else(|| {
            AgentError::NotFound(format!("process {exec_id:?} of container {}", self.id))
        })
    }

    fn exit_of(&self, exec_id: &str) -> Result<ExitWatch> {
        self.process(exec_id).map(|process| process.exit.clone())
    }

    fn signal(&self, request: &agent::SignalProcessRequest) -> Result<()> {
        let signal = i32::try_from(request.signal)
            .ok()
            .filter(|signal| (0..=64).contains(signal))
            .ok_or_else(|| AgentError::Invalid(format!("signal: {}", request.signal)))?;
        if !request.exec_id.is_empty() {
            return self.process(&request.exec_id)?.signal(signal);
        }
        let ended = || AgentError::NotFound(format!("process of container {}", self.id));
        if self.state == State::Stopped {
            return Err(ended());
        }
        self.allows(Event::Signal)?;
        if request.all {
            return self.signal_all(signal);
        }
        self.process("")?.signal(signal)
    }

    fn signal_all(&self, signal: i32) -> Result<()> {
        if signal == libc::SIGKILL {
            return self.cgroup.kill();
        }
        for pid in self.cgroup.processes()? {
            // Those that end meanwhile need no signal.
            // SIGKILL is the one signal for which a new process in place of
            // an old one would matter, and that goes by cgroup.kill.
            let signal = nix::sys::signal::Signal::try_from(signal).ok();
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
        }
        Ok(())
    }

    fn resize(&self, request: &agent::ResizePtyRequest) -> Result<()> {
        use std::os::fd::AsFd;
        let process = self.process(&request.exec_id)?;
        let terminal = process.terminal.as_ref().ok_or_else(|| {
            AgentError::Precondition(format!("process {} has no terminal", process.pid))
        })?;
        stdio::resize(terminal.as_fd(), request.height, request.width)
    }

    fn list(&self) -> Result<agent::ListProcessesReply> {
        self.allows(Event::Inspect)?;
        let name_of = |pid: i32| {
            self.execs.iter().find_map(|(id, exec)| match exec {
                Exec::Made(process) if process.pid == pid && !process.has_ended() => {
                    Some(id.clone())
                }
                _ => None,
            })
        };
        let processes = self
            .cgroup
            .processes()?
            .into_iter()
            .map(|pid| agent::list_processes_reply::Process {
                pid: pid as u32,
                exec_id: name_of(pid).unwrap_or_default(),
                ..Default::default()
            })
            .collect();
        Ok(agent::ListProcessesReply {
            processes,
            ..Default::default()
        })
    }

    async fn pause(&mut self, pause: bool) -> Result<()> {
        let event = if pause { Event::Pause } else { Event::Resume };
        let state = self.allows(event)?;
        self.cgroup.freeze(pause).await?;
        self.state = state;
        Ok(())
    }

    async fn delete(&mut self) -> Result<()> {
        let before = self.state;
        self.state = self.allows(Event::Delete)?;
        let result = self.take_apart().await;
        if result.is_err() {
            // To be tried again.
            self.state = before;
        }
        result
    }

    async fn take_apart(&mut self) -> Result<()> {
        // A process that was never started waits at the gate no longer.
        self.gate = None;
        self.cgroup.kill()?;
        if let Some(group) = &self.guest_group {
            group.remove().await?;
        }
        if let Some(init) = &self.init {
            let mut exit = init.exit.clone();
            let ended = exit.wait_for(Option::is_some);
            if timeout(DEATH, ended).await.is_err() {
                return Err(AgentError::Timeout(format!(
                    "container {}: the end of its first process",
                    self.id
                )));
            }
        }
        self.cgroup.remove().await
    }

    fn delete_process(&mut self, exec_id: &str) -> Result<()> {
        if exec_id.is_empty() {
            return Err(AgentError::Invalid("exec_id: empty".into()));
        }
        if !self.process(exec_id)?.has_ended() {
            return Err(AgentError::Precondition(format!(
                "process {exec_id} of container {} has not ended",
                self.id
            )));
        }
        self.execs.remove(exec_id);
        Ok(())
    }
}

/// A further process, ready to be made.
struct ExecJob {
    what: Further,
    init: Process,
    cgroup: Arc<Cgroup>,
    stdio: Option<agent::Stdio>,
}

/// Answers one who may have stopped listening: its deadline has passed.
fn answer<T>(reply: oneshot::Sender<Result<T>>, result: Result<T>) {
    let _ = reply.send(result);
}
