// SPDX-License-Identifier: Apache-2.0
//! What happens in the child of clone3, between the agent and the user's
//! program. Everything here may block or fail without harm to the agent: the
//! child reports what went wrong and ends.

mod copy;
mod devices;
mod hooks;
pub mod lend;
mod path;
mod program;
pub mod report;
mod rootfs;
mod terminal;

use std::convert::Infallible;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sched::{unshare, CloneFlags};
use nix::unistd::setsid;

use crate::container::copy::CopyPlan;
use crate::container::hooks::GuestHooks;
use crate::container::namespaces::CLONE_NEWTIME;
use crate::container::plan::{ContainerPlan, ProcessPlan};
use crate::stdio::ChildEnds;
use crate::steps::{Step, Steps};
use crate::sys::process::{exit_now, new_session_keyring, prctl, reset_signals, setns};
use crate::sys::{fd, host};
use report::{At, Done, Failure};

/// What a child that could not run its program exits with.
const EXIT_FAILED: i32 = 127;

/// What every child gets from the agent.
pub struct Parts<'a> {
    /// The socket to the agent.
    pub channel: &'a OwnedFd,
    /// Its descriptors 0, 1 and 2.
    pub ends: &'a ChildEnds,
    /// The process whose user namespace is joined (its pidfd).
    pub neighbour: Option<&'a OwnedFd>,
    /// Who hands over mounts from outside of the user namespace ([`lend`]).
    pub lender: Option<&'a OwnedFd>,
    /// Die with the agent: only outside a guest, where the agent's end is not
    /// everybody's.
    pub die_with_agent: bool,
}

/// A standard stream of this process.
fn standard(number: i32) -> BorrowedFd<'static> {
    crate::sys::fd::standard(number)
}

/// Runs a container's first process.
pub fn run_init(plan: &ContainerPlan, parts: &Parts<'_>) -> Infallible {
    let mut steps = Steps::default();
    let others: Vec<&OwnedFd> = parts.neighbour.into_iter().chain(parts.lender).collect();
    let result = begin(parts, &others).and_then(|()| set_up_init(plan, parts, &mut steps));
    let result = result.map(|program| (program, steps));
    end(result, &plan.process, Some(&plan.hooks), parts)
}

/// Runs a further process in the container of `init` (its pidfd).
pub fn run_exec(
    container: &ContainerPlan,
    plan: &ProcessPlan,
    init: &OwnedFd,
    parts: &Parts<'_>,
) -> Infallible {
    let mut steps = Steps::default();
    let result =
        begin(parts, &[init]).and_then(|()| set_up_exec(container, plan, init, parts, &mut steps));
    let result = result.map(|program| (program, steps));
    end(result, plan, None, parts)
}

/// Runs a program in the guest itself.
pub fn run_guest(plan: &ProcessPlan, parts: &Parts<'_>) -> Infallible {
    let mut steps = Steps::default();
    let result = begin(parts, &[]).and_then(|()| set_up_guest(plan, parts, &mut steps));
    let result = result.map(|program| (program, steps));
    end(result, plan, None, parts)
}

/// Copies a file of the container of `init` (its pidfd).
pub fn run_copy(
    container: &ContainerPlan,
    plan: &CopyPlan,
    init: &OwnedFd,
    parts: &Parts<'_>,
) -> Infallible {
    let channel = parts.channel.as_fd();
    let mut steps = Steps::default();
    let entered = begin(parts, &[init]).and_then(|()| {
        steps.done(Step::Born);
        enter(container, init)?;
        terminal::pipes(parts.ends)
    });
    if let Err(failure) = entered {
        let _ = report::send_failure(channel, &failure);
        exit_now(EXIT_FAILED);
    }
    await_start(parts, &steps);
    // As the execution of a program does it: the agent sees that it runs.
    match fd::close_all_but(&mut [0, 1, 2]) {
        Ok(()) => exit_now(copy::run(plan)),
        Err(_) => exit_now(EXIT_FAILED),
    }
}

/// Drops everything that is the agent's. A descriptor kept here would keep
/// other containers' streams open.
fn begin(parts: &Parts<'_>, others: &[&OwnedFd]) -> Done<()> {
    let mut keep = parts.ends.raw();
    keep.extend([0, 1, 2, parts.channel.as_raw_fd()]);
    keep.extend(others.iter().map(|fd| fd.as_raw_fd()));
    fd::close_all_but(&mut keep).at("close descriptors", "")?;
    // The agent's handlers write to descriptors that are closed now.
    reset_signals();
    prctl(libc::PR_SET_DUMPABLE, 0).at("hide from tracing", "")?;
    setsid().at("start session", "")?;
    match new_session_keyring() {
        Ok(()) | Err(Errno::ENOSYS | Errno::EPERM | Errno::EDQUOT) => Ok(()),
        Err(errno) => Err(errno).at("create session keyring", ""),
    }
}

/// The order is that of the specification's life cycle and of what later
/// steps need: /proc of the guest until the pivot, privileges until the user.
/// In a user namespace everything that takes the guest's root comes before its
/// own root is become, who owns what is made then.
fn set_up_init(
    plan: &ContainerPlan,
    parts: &Parts<'_>,
    steps: &mut Steps,
) -> Done<program::Program> {
    steps.done(Step::Born);
    let namespaces = &plan.namespaces;
    set_oom_score(plan.process.oom_score_adj)?;
    let mut lent = Vec::new();
    if let Some(neighbour) = parts.neighbour {
        lent = lend::make_all(plan)?;
        join_user(namespaces.in_joined(), neighbour)?;
    } else if namespaces.user.is_some()
        && !report::await_mapped(parts.channel.as_fd()).at("wait", "")?
    {
        exit_now(EXIT_FAILED);
    }
    if let Some(lender) = parts.lender {
        lent = lend::take_all(plan, lender.as_fd())?;
    }
    if namespaces.own_cgroup {
        // Now, in the container's cgroup, so that it is the root seen.
        unshare(CloneFlags::CLONE_NEWCGROUP).at("create cgroup namespace", "")?;
    }
    if let Some(offsets) = &namespaces.time {
        set_time(offsets)?;
    }
    let mut roots = rootfs::prepare_root(plan, lent)?;
    steps.done(Step::Root);
    if namespaces.user.is_some() {
        program::become_its_root()?;
    }
    for (path, value) in plan.sysctls_of_child() {
        fs::write(path, value).at("write sysctl", path)?;
    }
    if !plan.hostname.is_empty() {
        nix::unistd::sethostname(&plan.hostname).at("set host name", "")?;
    }
    if !plan.domainname.is_empty() {
        host::set_domainname(&plan.domainname).at("set domain name", "")?;
    }
    // Modes of what is made from here on are as asked for.
    nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    rootfs::mount_all(plan, &mut roots)?;
    steps.done(Step::Mounts);
    let root = roots.root;
    devices::make_all(plan, root.as_fd())?;
    steps.done(Step::Devices);
    let state = plan.hooks.state("creating", std::process::id());
    hooks::run_all(&plan.hooks.create_container, &state, &[])?;
    rootfs::pivot(root.as_fd())?;
    steps.done(Step::Pivot);
    make_cwd(&plan.process.cwd)?;
    terminal::set_up(&plan.process, parts.ends, parts.channel.as_fd(), true)?;
    rootfs::finish(plan)?;
    rootfs::protect(&plan.read_only_paths)?;
    rootfs::mask(&plan.masked_paths)?;
    steps.done(Step::Masks);
    program::limit(&plan.process, namespaces.user.is_some())?;
    let program = program::become_user(
        &plan.process,
        plan.seccomp.as_deref(),
        parts.channel.as_fd(),
    )?;
    steps.done(Step::User);
    Ok(program)
}

/// Joins the user namespace of `neighbour`, and makes those that are to be that
/// one's.
fn join_user(flags: libc::c_int, neighbour: &OwnedFd) -> Done<()> {
    match setns(neighbour.as_fd(), libc::CLONE_NEWUSER) {
        Err(Errno::ESRCH) => {
            return Err(Failure::invalid(
                "linux.namespaces: user: the other container's first process has ended",
            ))
        }
        // It is in the guest's own, as this process.
        Err(Errno::EINVAL) => {
            return Err(Failure::invalid(
                "linux.namespaces: user: the other container has no user namespace",
            ))
        }
        other => other.at("join user namespace", "")?,
    }
    unshare(CloneFlags::from_bits_retain(flags)).at("create namespaces", "")
}

/// Makes a time namespace, which the program's execution enters.
fn set_time(offsets: &str) -> Done<()> {
    unshare(CloneFlags::from_bits_retain(CLONE_NEWTIME)).at("create time namespace", "")?;
    if offsets.is_empty() {
        return Ok(());
    }
    let path = "/proc/self/timens_offsets";
    match fs::write(path, offsets) {
        Err(error) if error.raw_os_error() == Some(libc::ERANGE) => Err(Failure::invalid(
            "linux.timeOffsets: a clock would be negative or too far ahead",
        )),
        other => other.at("write", path),
    }
}

fn set_up_exec(
    container: &ContainerPlan,
    plan: &ProcessPlan,
    init: &OwnedFd,
    parts: &Parts<'_>,
    steps: &mut Steps,
) -> Done<program::Program> {
    steps.done(Step::Born);
    set_oom_score(plan.oom_score_adj)?;
    enter(container, init)?;
    let own_user_namespace = container.namespaces.user.is_some();
    nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    terminal::set_up(plan, parts.ends, parts.channel.as_fd(), false)?;
    program::limit(plan, own_user_namespace)?;
    let program = program::become_user(plan, container.seccomp.as_deref(), parts.channel.as_fd())?;
    steps.done(Step::User);
    Ok(program)
}

/// Joins the namespaces of a container, as its root.
fn enter(container: &ContainerPlan, init: &OwnedFd) -> Done<()> {
    match setns(init.as_fd(), container.namespaces.to_join()) {
        Err(Errno::ESRCH) => {
            return Err(Failure::invalid("the container's first process has ended"))
        }
        other => other.at("join namespaces", "")?,
    }
    match container.namespaces.user {
        Some(_) => program::become_its_root(),
        None => Ok(()),
    }
}

fn set_up_guest(
    plan: &ProcessPlan,
    parts: &Parts<'_>,
    steps: &mut Steps,
) -> Done<program::Program> {
    steps.done(Step::Born);
    set_oom_score(plan.oom_score_adj)?;
    nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    terminal::set_up(plan, parts.ends, parts.channel.as_fd(), false)?;
    program::limit(plan, false)?;
    let program = program::become_user(plan, None, parts.channel.as_fd())?;
    steps.done(Step::User);
    Ok(program)
}

/// Reports that all is ready, and waits until it is to go on. Without the
/// agent, or when it has given up on this process, there is no return.
fn await_start(parts: &Parts<'_>, steps: &Steps) {
    if parts.die_with_agent {
        let _ = prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong);
    }
    let channel = parts.channel.as_fd();
    let told = report::send_ready(channel, steps).and_then(|()| report::await_go(channel));
    if !matches!(told, Ok(true)) {
        exit_now(EXIT_FAILED);
    }
}

/// Reports, waits for the start and runs the program, after the hooks of a
/// container's start.
fn end(
    result: Done<(program::Program, Steps)>,
    plan: &ProcessPlan,
    hooks: Option<&GuestHooks>,
    parts: &Parts<'_>,
) -> Infallible {
    let channel = parts.channel.as_fd();
    let failure = match result {
        Ok((program, steps)) => {
            await_start(parts, &steps);
            match hooks.map_or(Ok(()), |hooks| start(hooks, &program)) {
                Ok(()) => program.execute(plan),
                Err(failure) => failure,
            }
        }
        Err(failure) => failure,
    };
    // Without the agent nobody is left to tell.
    let _ = report::send_failure(channel, &failure);
    exit_now(EXIT_FAILED)
}

/// Runs what comes before the program.
fn start(hooks: &GuestHooks, program: &program::Program) -> Done<()> {
    if hooks.start_container.is_empty() {
        return Ok(());
    }
    let state = hooks.state("created", std::process::id());
    hooks::run_all(&hooks.start_container, &state, program.env())
}

/// The agent is exempt from the OOM killer, its children are not. The file is
/// written only when the value changes: lowering it takes a privilege.
fn set_oom_score(wanted: i32) -> Done<()> {
    let path = "/proc/self/oom_score_adj";
    let now = fs::read_to_string(path).at("read", path)?;
    if now.trim().parse() == Ok(wanted) {
        return Ok(());
    }
    fs::write(path, wanted.to_string()).at("write", path)
}

/// A working directory that is missing is made, as root.
fn make_cwd(cwd: &Path) -> Done<()> {
    let slash = fs::File::open("/").at("open", "/")?;
    match path::make_directory(slash.as_fd(), cwd) {
        // On a read-only file system, or not a directory: entering it will say.
        Err(failure) if matches!(failure.errno, libc::EROFS | libc::ENOTDIR) => Ok(()),
        other => other.map(drop),
    }
}
