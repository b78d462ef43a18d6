// SPDX-License-Identifier: Apache-2.0
//! What happens in the child of clone3, between the agent and the user's
//! program. Everything here may block or fail without harm to the agent: the
//! child reports what went wrong and ends.

mod devices;
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

use crate::container::plan::{ContainerPlan, ProcessPlan};
use crate::seccomp::Filter;
use crate::stdio::ChildEnds;
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
    let result = begin(parts, &[]).and_then(|()| set_up_init(plan, parts));
    end(result, &plan.process, parts)
}

/// Runs a further process in the container of `init` (its pidfd).
pub fn run_exec(
    plan: &ProcessPlan,
    seccomp: Option<&Filter>,
    init: &OwnedFd,
    namespaces: libc::c_int,
    parts: &Parts<'_>,
) -> Infallible {
    let result =
        begin(parts, &[init]).and_then(|()| set_up_exec(plan, seccomp, init, namespaces, parts));
    end(result, plan, parts)
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
fn set_up_init(plan: &ContainerPlan, parts: &Parts<'_>) -> Done<program::Program> {
    set_oom_score(plan.process.oom_score_adj)?;
    if plan.own_cgroup_namespace {
        // Now, in the container's cgroup, so that it is the root seen.
        unshare(CloneFlags::CLONE_NEWCGROUP).at("create cgroup namespace", "")?;
    }
    for (path, value) in &plan.sysctls {
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
    let root = rootfs::prepare_root(plan)?;
    rootfs::mount_all(plan, root.as_fd())?;
    devices::make_all(plan, root.as_fd())?;
    rootfs::pivot(root.as_fd())?;
    make_cwd(&plan.process.cwd)?;
    terminal::set_up(&plan.process, parts.ends, parts.channel.as_fd(), true)?;
    rootfs::finish(plan)?;
    rootfs::protect(&plan.read_only_paths)?;
    rootfs::mask(&plan.masked_paths)?;
    program::limit(&plan.process)?;
    program::become_user(&plan.process, plan.seccomp.as_deref())
}

fn set_up_exec(
    plan: &ProcessPlan,
    seccomp: Option<&Filter>,
    init: &OwnedFd,
    namespaces: libc::c_int,
    parts: &Parts<'_>,
) -> Done<program::Program> {
    set_oom_score(plan.oom_score_adj)?;
    // The pid namespace was joined by being born into it.
    match setns(init.as_fd(), namespaces & !libc::CLONE_NEWPID) {
        Err(Errno::ESRCH) => {
            return Err(Failure::invalid("the container's first process has ended"))
        }
        other => other.at("join namespaces", "")?,
    }
    nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    terminal::set_up(plan, parts.ends, parts.channel.as_fd(), false)?;
    program::limit(plan)?;
    program::become_user(plan, seccomp)
}

/// Reports, waits for the start and runs the program.
fn end(result: Done<program::Program>, plan: &ProcessPlan, parts: &Parts<'_>) -> Infallible {
    let channel = parts.channel.as_fd();
    let failure = match result {
        Ok(program) => {
            if parts.die_with_agent {
                let _ = prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong);
            }
            let told = report::send_ready(channel).and_then(|()| report::await_go(channel));
            match told {
                Ok(true) => program.execute(plan),
                // The agent has given up on this process.
                _ => exit_now(EXIT_FAILED),
            }
        }
        Err(failure) => failure,
    };
    // Without the agent nobody is left to tell.
    let _ = report::send_failure(channel, &failure);
    exit_now(EXIT_FAILED)
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
