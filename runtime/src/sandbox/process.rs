// SPDX-License-Identifier: Apache-2.0
//! Running processes: a container's first one, and further ones.

use std::{sync::Arc, time::Duration};

use bulkhead_agent_protocol::agent::{
    self, CopyFileRequest, ExecProcessRequest, ProcessRequest, ResizePtyRequest,
    SignalProcessRequest, StartContainerRequest, WaitProcessRequest,
};

use super::{
    directory::check_name,
    late,
    state::{label, wall_clock, Described, Process, Stage},
    work::{Translated, Work},
    Deleted, Event, Exit, Inner,
};
use crate::{
    agent::{AgentError, Expected, Streams},
    error::{chain, Error, ErrorKind, Step},
    hypervisor::Hypervisor,
    io::{Copies, GuestStreams, Stdio},
};

/// What a shell says of a program that cannot be run.
const NOT_RUN: u32 = 127;

/// Streams that the guest is asked for.
pub struct Requested {
    input: Option<Expected>,
    output: Option<Expected>,
    error: Option<Expected>,
}

impl Requested {
    /// Those that serve `stdio`.
    pub fn of(streams: &Streams, stdio: &Stdio) -> Self {
        let wanted = |wanted: bool| wanted.then(|| streams.expect());
        if stdio.terminal {
            // One for both ways.
            return Self {
                input: None,
                output: wanted(stdio.stdin.is_some() || stdio.stdout.is_some()),
                error: None,
            };
        }
        Self {
            input: wanted(stdio.stdin.is_some()),
            output: wanted(stdio.stdout.is_some()),
            error: wanted(stdio.stderr.is_some()),
        }
    }

    /// Their ids, for the agent; 0: none.
    pub fn ids(&self) -> agent::Stdio {
        let id = |stream: &Option<Expected>| stream.as_ref().map_or(0, Expected::id);
        agent::Stdio {
            stdin_stream: id(&self.input),
            stdout_stream: id(&self.output),
            stderr_stream: id(&self.error),
            ..Default::default()
        }
    }

    /// Takes them, and begins to copy.
    pub async fn connect(
        self,
        stdio: Stdio,
        limit: Duration,
        first_output: impl Fn() + Send + Sync + Clone + 'static,
    ) -> Result<Copies, Error> {
        let streams = GuestStreams {
            input: arrived(self.input, limit).await?,
            output: arrived(self.output, limit).await?,
            error: arrived(self.error, limit).await?,
        };
        Copies::start(stdio, streams, first_output).step(|| "copy standard input and output")
    }
}

async fn arrived(
    stream: Option<Expected>,
    limit: Duration,
) -> Result<Option<std::os::fd::OwnedFd>, Error> {
    let Some(stream) = stream else {
        return Ok(None);
    };
    match stream.arrival(limit).await {
        Some(stream) => Ok(Some(stream)),
        None => Err(Error::Timeout(
            "the guest did not open a process's standard stream (agent.stream_timeout_ms)".into(),
        )),
    }
}

/// See [`super::Sandbox::exec`].
pub fn describe(
    inner: &Inner,
    id: &str,
    exec: &str,
    work: Work,
    stdio: Stdio,
) -> Result<(), Error> {
    check_name("process", exec)?;
    let debug_shell = !inner.config.agent.debug_shell.is_empty();
    let work = Translated::new(work, stdio.terminal, debug_shell)?;
    let mut pod = inner.pod();
    pod.accepts()?;
    let container = pod.container(id)?;
    if container.init.stage != Stage::Running {
        return Err(Error::Precondition(format!(
            "{} is not running",
            label(id, None)
        )));
    }
    if container.execs.contains_key(exec) {
        return Err(Error::AlreadyExists(label(id, Some(exec))));
    }
    let mut described = Process::new(stdio.terminal, stdio.paths.clone());
    described.described = Some(Box::new(Described { work, stdio }));
    container.execs.insert(exec.into(), described);
    pod.tell(Event::ExecAdded {
        id: id.into(),
        exec: exec.into(),
    });
    Ok(())
}

/// See [`super::Sandbox::start_process`].
pub async fn start(inner: Arc<Inner>, id: String, exec: Option<String>) -> Result<u32, Error> {
    let described = {
        let mut pod = inner.pod();
        pod.accepts()?;
        let process = pod.process(&id, exec.as_deref())?;
        match process.stage {
            Stage::Created => process.stage = Stage::Starting,
            Stage::Starting | Stage::Running => {
                return Err(Error::Precondition(format!(
                    "{} is running already",
                    label(&id, exec.as_deref())
                )));
            }
            Stage::Stopped => {
                return Err(Error::Precondition(format!(
                    "{} has ended",
                    label(&id, exec.as_deref())
                )));
            }
        }
        process.described.take()
    };
    let started = match (&exec, described) {
        (None, _) => start_container(&inner, &id).await,
        (Some(exec), Some(described)) => start_exec(&inner, &id, exec, *described).await,
        (Some(_), None) => Err(Error::Internal("a process without description".into())),
    };
    match started {
        Ok(()) => {
            let (pid, hooks) = {
                let mut pod = inner.pod();
                pod.started(&id, exec.as_deref());
                let container = pod.containers.get(&id);
                (
                    pod.pid,
                    container.and_then(|container| container.hooks.clone()),
                )
            };
            match (&exec, hooks) {
                (Some(_), _) => watch(&inner, &id, exec.as_deref()),
                (None, Some(hooks)) => {
                    if let Err(error) = hooks.poststart(pid).await {
                        end_after_hook(&inner, &id).await;
                        return Err(error.into());
                    }
                }
                (None, None) => {}
            }
            Ok(pid)
        }
        Err(error) => {
            inner.pod().start_failed(&id, exec.as_deref(), NOT_RUN);
            Err(error)
        }
    }
}

/// A container whose `poststart` hook has failed is stopped (runtime.md,
/// "Lifecycle", step 9). Its end is told as any.
async fn end_after_hook(inner: &Inner, id: &str) {
    let limit = inner.config.agent.rpc_timeout();
    let ended = async {
        send_signal(inner, id, None, 9, true).await?;
        wait(inner, id, None).await
    };
    match tokio::time::timeout(limit, ended).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => {
            tracing::warn!(
                container = id,
                error = chain(&error),
                "not ended after a hook"
            );
        }
        Err(_) => tracing::warn!(container = id, "not ended in time after a hook"),
    }
}

async fn start_container(inner: &Arc<Inner>, id: &str) -> Result<(), Error> {
    late::take(inner).await?;
    let started = inner.agent.start_container(StartContainerRequest {
        container_id: id.into(),
        ..Default::default()
    });
    started.await?;
    inner.timeline.container_started();
    Ok(())
}

async fn start_exec(
    inner: &Inner,
    id: &str,
    exec: &str,
    described: Described,
) -> Result<(), Error> {
    let requested = Requested::of(&inner.streams, &described.stdio);
    let of = |process| ExecProcessRequest {
        container_id: id.into(),
        exec_id: exec.into(),
        process: Some(process).into(),
        stdio: Some(requested.ids()).into(),
        ..Default::default()
    };
    match described.work {
        Translated::Program(process) => inner.agent.exec_process(of(process)).await?,
        Translated::Guest(process) => inner.agent.exec_guest(of(process)).await?,
        Translated::Copy(copy) => {
            let copy = CopyFileRequest {
                container_id: id.into(),
                exec_id: exec.into(),
                stdio: Some(requested.ids()).into(),
                ..copy
            };
            inner.agent.copy_file(copy).await?
        }
    };
    let copies = requested
        .connect(described.stdio, inner.config.agent.stream_timeout(), || {})
        .await?;
    if let Ok(process) = inner.pod().process(id, Some(exec)) {
        process.copies = Some(Arc::new(copies));
    }
    Ok(())
}

/// Follows a process to its end.
pub fn watch(inner: &Arc<Inner>, id: &str, exec: Option<&str>) {
    let (id, exec) = (id.to_owned(), exec.map(str::to_owned));
    let weak = Arc::downgrade(inner);
    let agent = inner.agent.clone();
    tokio::spawn(async move {
        let answer = agent
            .wait_process(WaitProcessRequest {
                container_id: id.clone(),
                exec_id: exec.clone().unwrap_or_default(),
                ..Default::default()
            })
            .await;
        let Some(inner) = weak.upgrade() else {
            return;
        };
        match answer {
            Ok(end) => {
                let exit = Exit {
                    status: end.exit_status,
                    at: wall_clock(end.exited_at_ns),
                };
                ended(&inner, &id, exec.as_deref(), exit, end.oom_killed).await;
            }
            Err(Error::Agent {
                source: AgentError::Disconnected,
                ..
            }) => {
                // Without its agent a guest is of no use.
                if inner.pod().ended.is_none() {
                    tracing::warn!(
                        sandbox = inner.id,
                        container = id,
                        "the guest's agent is gone: its virtual machine is ended"
                    );
                }
                inner.vm.kill();
            }
            Err(error) => tracing::warn!(
                sandbox = inner.id,
                container = id,
                exec,
                error = chain(&error),
                "end of a process is not known"
            ),
        }
    });
}

async fn ended(inner: &Arc<Inner>, id: &str, exec: Option<&str>, exit: Exit, oom: bool) {
    if exec.is_none() {
        inner.first_output();
    }
    let held = {
        let mut pod = inner.pod();
        pod.exited(id, exec, exit, oom);
        exec.is_none() && pod.end_is_held(id)
    };
    if held {
        tokio::time::sleep(inner.config.runtime.execs_timeout()).await;
        inner.pod().give_up_on_execs(id);
    }
}

/// See [`super::Sandbox::wait`].
pub async fn wait(inner: &Inner, id: &str, exec: Option<&str>) -> Result<Exit, Error> {
    let mut exit = inner.pod().process(id, exec)?.exit.subscribe();
    let ended = match exit.wait_for(Option::is_some).await {
        Ok(exit) => *exit,
        Err(_) => None,
    };
    ended.ok_or_else(|| Error::NotFound(label(id, exec)))
}

/// See [`super::Sandbox::kill`].
pub async fn kill(
    inner: &Inner,
    id: &str,
    exec: Option<&str>,
    signal: u32,
    all: bool,
) -> Result<(), Error> {
    {
        let mut pod = inner.pod();
        let process = pod.process(id, exec)?;
        match (process.stage, exec) {
            (Stage::Stopped, _) => return Err(Error::Finished(label(id, exec))),
            (Stage::Created, Some(_)) => {
                return Err(Error::Precondition(format!(
                    "{} has not been started",
                    label(id, exec)
                )));
            }
            _ => {}
        }
        pod.accepts()?;
    }
    match send_signal(inner, id, exec, signal, all).await {
        Err(error) if error.kind() == ErrorKind::NotFound => Err(Error::Finished(label(id, exec))),
        Err(error) => Err(inner.explain(error).await),
        Ok(()) => Ok(()),
    }
}

/// Sends a signal without looking at the state.
pub async fn send_signal(
    inner: &Inner,
    id: &str,
    exec: Option<&str>,
    signal: u32,
    all: bool,
) -> Result<(), Error> {
    let sent = inner.agent.signal_process(SignalProcessRequest {
        container_id: id.into(),
        exec_id: exec.unwrap_or_default().into(),
        signal,
        all,
        ..Default::default()
    });
    sent.await.map(drop)
}

/// See [`super::Sandbox::resize_pty`].
pub async fn resize(
    inner: &Inner,
    id: &str,
    exec: Option<&str>,
    width: u16,
    height: u16,
) -> Result<(), Error> {
    {
        let mut pod = inner.pod();
        let process = pod.process(id, exec)?;
        if !process.terminal {
            return Err(Error::Precondition(format!(
                "{} has no terminal",
                label(id, exec)
            )));
        }
        if let (Stage::Created, Some(described)) = (process.stage, &mut process.described) {
            // It gets it when it starts.
            described.work.resize(width, height);
            return Ok(());
        }
        pod.accepts()?;
    }
    let resized = inner.agent.resize_pty(ResizePtyRequest {
        container_id: id.into(),
        exec_id: exec.unwrap_or_default().into(),
        width: width.into(),
        height: height.into(),
        ..Default::default()
    });
    match resized.await {
        Ok(_) => Ok(()),
        Err(error) => Err(inner.explain(error).await),
    }
}

/// See [`super::Sandbox::delete`].
pub async fn delete(inner: Arc<Inner>, id: String, exec: String) -> Result<Deleted, Error> {
    let copies = {
        let mut pod = inner.pod();
        let process = pod.process(&id, Some(&exec))?;
        match process.stage {
            Stage::Created | Stage::Stopped => process.copies.clone(),
            Stage::Starting | Stage::Running => {
                return Err(Error::Precondition(format!(
                    "{} is running: kill it first",
                    label(&id, Some(&exec))
                )));
            }
        }
    };
    if let Some(copies) = copies {
        if !copies
            .delivered(inner.config.runtime.output_timeout())
            .await
        {
            tracing::warn!(
                sandbox = inner.id,
                container = id,
                exec,
                "output was not taken, and is dropped"
            );
        }
        copies.stop();
        let gone = inner.agent.delete_process(ProcessRequest {
            container_id: id.clone(),
            exec_id: exec.clone(),
            ..Default::default()
        });
        if inner.pod().ended.is_none() {
            match gone.await {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => tracing::warn!(
                    sandbox = inner.id,
                    container = id,
                    exec,
                    error = chain(&error),
                    "process not forgotten in the guest"
                ),
            }
        }
    }
    let mut pod = inner.pod();
    let pid = pod.pid;
    let container = pod.container(&id)?;
    let Some(process) = container.execs.remove(&exec) else {
        return Err(Error::NotFound(label(&id, Some(&exec))));
    };
    let ended = *process.exit.borrow();
    let exit = ended.unwrap_or(Exit {
        status: 0,
        at: std::time::SystemTime::now(),
    });
    pod.tell(Event::Deleted {
        id,
        exec: Some(exec),
        pid,
        status: exit.status,
        at: exit.at,
    });
    Ok(Deleted { pid, exit })
}
