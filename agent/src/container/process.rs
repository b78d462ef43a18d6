// SPDX-License-Identifier: Apache-2.0
//! Making processes and seeing them end: the agent's side of clone3.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use bulkhead_agent_protocol::agent;
use libc::pid_t;
use nix::errno::Errno;
use tokio::io::unix::AsyncFd;
use tokio::sync::{oneshot, watch};

use super::copy::CopyPlan;
use super::limits;
use super::namespaces::PidNamespace;
use super::notify::Notice;
use super::plan::{ContainerPlan, ProcessPlan};
use super::user::UserPlan;
use crate::cgroup::{stats, Cgroup, Hierarchy};
use crate::child::lend;
use crate::child::report::{self, Report};
use crate::child::{run_copy, run_exec, run_guest, run_init, Parts};
use crate::error::{AgentError, Context, Result};
use crate::reaper::{Reaped, Reaper};
use crate::stdio::dial::Dialer;
use crate::stdio::{self, AgentEnds, Io, Streams};
use crate::steps::{Step, Steps};
use crate::sys::{fd, process};

/// What everything in the agent shares.
#[derive(Debug)]
pub struct Shared {
    /// Reaps children.
    pub reaper: Reaper,
    /// Reaches the host.
    pub dialer: Dialer,
    /// Where containers' cgroups go.
    pub hierarchy: Hierarchy,
    /// Where copies of the host's directories are.
    pub mirrors: PathBuf,
    /// The agent's own pid namespace.
    pub pid_namespace: OwnedFd,
    /// Whether this is PID 1 of a guest.
    pub in_guest: bool,
}

/// What a further process of a container does.
#[derive(Debug)]
pub enum Further {
    /// Runs a program in the container.
    Program(ProcessPlan),
    /// Runs a program in the guest itself.
    Guest(ProcessPlan),
    /// Copies a file of the container.
    Copy(CopyPlan),
}

impl Further {
    /// Whether it has a terminal.
    pub fn terminal(&self) -> bool {
        match self {
            Self::Program(plan) | Self::Guest(plan) => plan.terminal,
            Self::Copy(_) => false,
        }
    }
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 plus the signal's number.
    pub status: u32,
    /// Wall clock, nanoseconds since the epoch.
    pub at_ns: i64,
    /// Whether the OOM killer was at work in the container meanwhile.
    pub oom_killed: bool,
}

/// Tells about the end of a process, any number of times.
pub type ExitWatch = watch::Receiver<Option<Exit>>;

/// A process of a container, from its birth until it is forgotten.
#[derive(Clone, Debug)]
pub struct Process {
    /// Process id in the guest's root pid namespace.
    pub pid: pid_t,
    pidfd: Arc<OwnedFd>,
    /// The terminal's master, once it has arrived.
    pub terminal: Option<Arc<AsyncFd<OwnedFd>>>,
    /// Set when the process has ended and its output is drained.
    pub exit: ExitWatch,
}

impl Process {
    /// Sends a signal.
    ///
    /// # Errors
    /// [`AgentError::NotFound`] when the process has ended.
    pub fn signal(&self, signal: i32) -> Result<()> {
        match process::pidfd_send_signal(self.pidfd.as_fd(), signal) {
            Err(Errno::ESRCH) => Err(AgentError::NotFound(format!("process {}", self.pid))),
            Err(Errno::EINVAL) => Err(AgentError::Invalid(format!("signal: {signal}"))),
            other => other.step(|| format!("send signal {signal} to {}", self.pid)),
        }
    }

    /// Whether the process has ended and its end has been told.
    pub fn has_ended(&self) -> bool {
        self.exit.borrow().is_some()
    }

    /// The pidfd, to join the process's namespaces.
    pub fn pidfd(&self) -> &Arc<OwnedFd> {
        &self.pidfd
    }
}

/// A child that is setting itself up.
#[derive(Debug)]
pub struct Child {
    /// What is known of it already; its terminal is still to come.
    pub process: Process,
    channel: AsyncFd<OwnedFd>,
    ends: AgentEnds,
    reaped: oneshot::Receiver<Reaped>,
    exit: watch::Sender<Option<Exit>>,
    cgroup: Arc<Cgroup>,
    oom_kills_before: u64,
    /// What the agent has to set, for the child may not.
    limits: Option<Box<ProcessPlan>>,
    /// What its seccomp listener is told.
    notice: Option<Notice>,
}

/// A child that waits to be told to run its program.
#[derive(Debug)]
pub struct Gate(AsyncFd<OwnedFd>);

impl Gate {
    /// Lets the program run and tells whether it could.
    ///
    /// # Errors
    /// Why the program was not executed.
    pub async fn open(self) -> Result<()> {
        match report::send_go(self.0.as_fd()) {
            // It was killed while it waited; its exit says so.
            Ok(()) | Err(Errno::EPIPE | Errno::ECONNRESET) => {}
            Err(errno) => return Err(errno).step(|| "release process"),
        }
        match next_report(&self.0).await? {
            // The socket closed with the execution of the program.
            None => Ok(()),
            Some(Report::Failed(failure)) => Err(failure.into()),
            Some(_) => Err(AgentError::Internal("a child spoke out of turn".into())),
        }
    }
}

async fn next_report(channel: &AsyncFd<OwnedFd>) -> Result<Option<Report>> {
    let received = channel
        .async_io(tokio::io::Interest::READABLE, |socket| {
            match report::receive(socket.as_fd()) {
                // Closed with a message of ours unread: closed all the same.
                Err(Errno::ECONNRESET) => Ok(None),
                other => Ok(other?),
            }
        })
        .await;
    received.step(|| "receive from child")
}

/// Starts a container's first process, in the pid namespace of `neighbour` if
/// there is one. Nothing is awaited in here: the descriptors it makes are never
/// seen by another child.
///
/// # Errors
/// When the process cannot be made.
pub fn spawn_init(
    shared: &Shared,
    plan: &ContainerPlan,
    neighbour: Option<&Process>,
    cgroup: &Arc<Cgroup>,
    streams: Streams,
) -> Result<Child> {
    for (path, value) in plan.sysctls_of_agent() {
        std::fs::write(path, value).step(|| format!("write sysctl {}", path.display()))?;
    }
    let user = plan.namespaces.user.as_ref();
    let owner = user.map(|user| (user, &plan.process));
    let joined = plan.namespaces.user_joined;
    if joined && neighbour.is_none() {
        return Err(AgentError::Invalid(
            "linux.namespaces: user: the other container has no pid namespace".into(),
        ));
    }
    let lender = match !joined && lend::lent(plan).next().is_some() {
        true => Some(lender(plan, cgroup)?),
        false => None,
    };
    let mut child = spawn(shared, owner, cgroup, streams, |parts| {
        let parts = Parts {
            neighbour: neighbour.filter(|_| joined).map(|n| n.pidfd().as_ref()),
            lender: lender.as_ref(),
            ..*parts
        };
        in_pid_namespace(shared, neighbour, || {
            process::spawn(
                plan.namespaces.at_birth(),
                Some(cgroup.directory().as_fd()),
                || run_init(plan, &parts),
            )
        })
    })?;
    let pid = child.process.pid as u32;
    child.notice = Notice::new(plan, pid, pid);
    if let Some(user) = user.filter(|_| !joined) {
        let mapped = user.write(child.process.pid).and_then(|()| {
            report::send_mapped(child.channel.as_fd()).step(|| "tell of the user namespace")
        });
        if let Err(error) = mapped {
            // It waits, and is reaped like any orphan.
            let _ = child.process.signal(libc::SIGKILL);
            child.reaped.close();
            return Err(error);
        }
    }
    Ok(child)
}

/// Starts who makes mounts for a container's first process; gives where they
/// come out. It ends by itself, and is reaped like any orphan.
fn lender(plan: &ContainerPlan, cgroup: &Cgroup) -> Result<OwnedFd> {
    let (theirs, ours) = fd::packet_pair().step(|| "create socket for mounts")?;
    let group = cgroup.directory();
    process::spawn(0, Some(group.as_fd()), || lend::run(plan, &theirs))
        .step(|| "create process for mounts")?;
    Ok(ours)
}

/// Starts a further process of the container whose first one is `init`.
///
/// # Errors
/// When the process cannot be made.
pub fn spawn_further(
    shared: &Shared,
    container: &ContainerPlan,
    what: &Further,
    init: &Process,
    cgroup: &Arc<Cgroup>,
    streams: Streams,
) -> Result<Child> {
    let owner = match what {
        Further::Program(plan) => container.namespaces.user.as_ref().map(|user| (user, plan)),
        Further::Guest(_) | Further::Copy(_) => None,
    };
    let neighbour = (container.namespaces.pid != PidNamespace::Guest).then_some(init);
    let mut child = spawn(shared, owner, cgroup, streams, |parts| {
        let body = || match what {
            Further::Program(plan) => run_exec(container, plan, init.pidfd(), parts),
            Further::Guest(plan) => run_guest(plan, parts),
            Further::Copy(plan) => run_copy(container, plan, init.pidfd(), parts),
        };
        if let Further::Guest(_) = what {
            let made = process::spawn(0, Some(cgroup.directory().as_fd()), body);
            return made.step(|| "create process");
        }
        in_pid_namespace(shared, neighbour, || {
            match process::spawn(0, Some(cgroup.directory().as_fd()), body) {
                // The container manages cgroups of its own: go where its first
                // process is.
                Err(Errno::EBUSY) => match cgroup.group_of(init.pid) {
                    Some(group) => process::spawn(0, Some(group.as_fd()), body),
                    None => Err(Errno::EBUSY),
                },
                other => other,
            }
        })
    })?;
    child.notice = Notice::new(container, child.process.pid as u32, init.pid as u32);
    Ok(child)
}

/// Makes a child that is born into the pid namespace of `neighbour`.
fn in_pid_namespace<T>(
    shared: &Shared,
    neighbour: Option<&Process>,
    make: impl FnOnce() -> nix::Result<T>,
) -> Result<T> {
    let Some(neighbour) = neighbour else {
        return make().step(|| "create process");
    };
    let gone = || AgentError::Precondition("the container's first process has ended".into());
    match process::setns(neighbour.pidfd().as_fd(), libc::CLONE_NEWPID) {
        Err(Errno::ESRCH) => return Err(gone()),
        other => other.step(|| "join pid namespace")?,
    }
    let made = make();
    process::setns(shared.pid_namespace.as_fd(), libc::CLONE_NEWPID)
        .expect("the agent can always return to its own pid namespace");
    match made {
        // A pid namespace without its first process takes no more.
        Err(Errno::ENOMEM) => Err(gone()),
        other => other.step(|| "create process"),
    }
}

fn spawn(
    shared: &Shared,
    owner: Option<(&UserPlan, &ProcessPlan)>,
    cgroup: &Arc<Cgroup>,
    streams: Streams,
    make: impl FnOnce(&Parts<'_>) -> Result<(pid_t, OwnedFd)>,
) -> Result<Child> {
    let (child_ends, ends) = stdio::connect(streams)?;
    if let Some(uid) = owner.and_then(|(user, plan)| user.outside(plan.uid)) {
        child_ends
            .give_to(uid)
            .step(|| format!("give standard streams to user {uid}"))?;
    }
    let (ours, theirs) = fd::packet_pair().step(|| "create socket to child")?;
    let channel = fd::watched(ours).step(|| "watch child")?;
    let oom_kills_before = stats::oom_kills(cgroup);
    let (pid, pidfd) = make(&Parts {
        channel: &theirs,
        ends: &child_ends,
        neighbour: None,
        lender: None,
        die_with_agent: !shared.in_guest,
    })?;
    let reaped = shared.reaper.watch(pid);
    let (exit, exit_watch) = watch::channel(None);
    Ok(Child {
        process: Process {
            pid,
            pidfd: Arc::new(pidfd),
            terminal: None,
            exit: exit_watch,
        },
        channel,
        ends,
        reaped,
        exit,
        cgroup: cgroup.clone(),
        oom_kills_before,
        limits: owner.map(|(_, plan)| Box::new(plan.clone())),
        notice: None,
    })
}

impl Child {
    /// Waits until the child is ready to run its program, and adds what was done
    /// to `steps`. From then on its
    /// input and output flow and its end is watched; `ended` is called after
    /// the end was told to those who wait.
    ///
    /// # Errors
    /// Why the child gave up. It is gone then.
    pub async fn ready(
        self,
        mut steps: Steps,
        ended: impl FnOnce() + Send + 'static,
    ) -> Result<(Process, Gate, Steps)> {
        let Self {
            mut process,
            channel,
            ends,
            reaped,
            exit,
            cgroup,
            oom_kills_before,
            limits,
            notice,
        } = self;
        let set_limits = || match &limits {
            Some(plan) => limits::apply(plan, process.pid)
                .map_err(|(step, errno)| AgentError::Step { step, errno }),
            None => Ok(()),
        };
        let io = match await_ready(&channel, &process, notice).await {
            Ok((master, told)) => {
                steps.extend(told);
                set_limits().and_then(|()| Io::start(ends, master))
            }
            Err(error) => Err(error),
        };
        let io = match io {
            Ok(io) => io,
            Err(error) => {
                // It may be on its way out already.
                let _ = process.signal(libc::SIGKILL);
                if let Ok(reaped) = reaped.await {
                    exit.send_replace(Some(Exit {
                        status: reaped.status,
                        at_ns: reaped.at_ns,
                        oom_killed: false,
                    }));
                }
                return Err(error);
            }
        };
        process.terminal = io.terminal();
        tokio::spawn(async move {
            let Ok(reaped) = reaped.await else { return };
            io.drain().await;
            exit.send_replace(Some(Exit {
                status: reaped.status,
                at_ns: reaped.at_ns,
                oom_killed: stats::oom_kills(&cgroup) > oom_kills_before,
            }));
            ended();
        });
        steps.done(Step::Ready);
        Ok((process, Gate(channel), steps))
    }
}

/// The child's messages up to "ready"; gives the terminal if one came, and what
/// the child has done.
async fn await_ready(
    channel: &AsyncFd<OwnedFd>,
    process: &Process,
    mut notice: Option<Notice>,
) -> Result<(Option<OwnedFd>, Steps)> {
    let mut master = None;
    loop {
        match next_report(channel).await? {
            Some(Report::Ready(steps)) => return Ok((master, steps)),
            Some(Report::Terminal(terminal)) => master = Some(terminal),
            Some(Report::Listener(number)) => match notice.take() {
                Some(notice) => notice.send(process.pidfd(), number).await?,
                None => return Err(AgentError::Internal("a listener out of turn".into())),
            },
            Some(Report::Failed(failure)) => return Err(failure.into()),
            None => {
                return Err(AgentError::Internal(
                    "the process ended before it was set up".into(),
                ))
            }
        }
    }
}

/// Opens the streams of a process that is about to be made.
///
/// # Errors
/// As [`Streams::open`].
pub async fn open_streams(
    shared: &Shared,
    stdio: Option<&agent::Stdio>,
    terminal: bool,
) -> Result<Streams> {
    let none = agent::Stdio::default();
    Streams::open(&shared.dialer, stdio.unwrap_or(&none), terminal).await
}
