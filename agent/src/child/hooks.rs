// SPDX-License-Identifier: Apache-2.0
//! Running a hook from a container's child. By the time of startContainer a
//! seccomp profile is in force, so this does with what every program may do.

use std::ffi::CString;
use std::fs::OpenOptions;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{kill, Signal};
use nix::sys::wait::{waitpid, WaitPidFlag, WaitStatus};
use nix::unistd::Pid;

use super::report::{At, Done, Failure};
use crate::container::hooks::HookPlan;
use crate::sys::fd;
use crate::sys::process::{execve, exit_now, fork};

/// How often a hook is looked after.
const STEP: Duration = Duration::from_millis(5);

/// How much of what a hook says is told, in bytes.
const KEPT: usize = 1024;

/// What a shell says of a program that cannot be run.
const NOT_RUN: i32 = 127;

/// Runs hooks one after the other, with `state` as their standard input, up to
/// the first that fails. `env`: the environment of one that has none.
pub fn run_all(hooks: &[HookPlan], state: &str, env: &[CString]) -> Done<()> {
    hooks.iter().try_for_each(|hook| run(hook, state, env))
}

fn run(hook: &HookPlan, state: &str, env: &[CString]) -> Done<()> {
    let (input, state_end) = fd::pipe().at("make pipe for", &hook.name)?;
    let (said_end, output) = fd::pipe().at("make pipe for", &hook.name)?;
    for end in [&state_end, &said_end] {
        fd::set_nonblocking(end.as_fd()).at("make pipe for", &hook.name)?;
    }
    let env = hook.env.as_deref().unwrap_or(env);
    let pid = fork(|| become_hook(hook, env, &input, &output)).at("run", &hook.name)?;
    drop((input, output));
    let mut talk = Talk {
        state: state.as_bytes(),
        state_end: Some(state_end),
        said_end,
        said: Vec::new(),
    };
    let status = attend(Pid::from_raw(pid), hook, &mut talk);
    let said = talk.said();
    match status.at("wait for", &hook.name)? {
        Some(WaitStatus::Exited(_, 0)) => Ok(()),
        Some(WaitStatus::Exited(_, status)) => {
            Err(failed(hook, &format!("exit status {status}"), &said))
        }
        Some(WaitStatus::Signaled(_, signal, _)) => Err(failed(hook, signal.as_str(), &said)),
        Some(other) => Err(failed(hook, &format!("{other:?}"), &said)),
        None => Err(failed(hook, "killed after its timeout", &said)),
    }
}

fn failed(hook: &HookPlan, how: &str, said: &str) -> Failure {
    let (name, path) = (&hook.name, hook.path.to_string_lossy());
    let said = match said.trim() {
        "" => String::new(),
        text => format!("; it said: {text}"),
    };
    Failure::other(format!("{name} {path}: {how}{said}"))
}

/// Waits for a hook's end; `None`: it took too long and was killed.
fn attend(pid: Pid, hook: &HookPlan, talk: &mut Talk<'_>) -> nix::Result<Option<WaitStatus>> {
    let begin = Instant::now();
    loop {
        talk.go_on();
        match waitpid(pid, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::EINTR) => {}
            other => {
                // What it said last.
                talk.go_on();
                return other.map(Some);
            }
        }
        if hook.timeout.is_some_and(|limit| begin.elapsed() >= limit) {
            // It leads a session of its own. One that has just ended needs none.
            let _ = kill(Pid::from_raw(-pid.as_raw()), Signal::SIGKILL);
            let _ = kill(pid, Signal::SIGKILL);
            return waitpid(pid, None).map(|_| None);
        }
        std::thread::sleep(STEP);
    }
}

/// What is told to a hook and what it says, without ever waiting for it.
struct Talk<'a> {
    state: &'a [u8],
    state_end: Option<OwnedFd>,
    said_end: OwnedFd,
    said: Vec<u8>,
}

impl Talk<'_> {
    fn go_on(&mut self) {
        while let Some(end) = &self.state_end {
            match fd::write(end.as_fd(), self.state) {
                Ok(count) if count < self.state.len() => self.state = &self.state[count..],
                Err(Errno::EAGAIN) => break,
                // All of it is told, or it does not want to know.
                _ => self.state_end = None,
            }
        }
        let mut buffer = [0; 512];
        while let Ok(count @ 1..) = fd::read(self.said_end.as_fd(), &mut buffer) {
            let room = KEPT.saturating_sub(self.said.len()).min(count);
            self.said.extend(&buffer[..room]);
        }
    }

    fn said(&self) -> String {
        String::from_utf8_lossy(&self.said).into_owned()
    }
}

/// In the hook's process.
fn become_hook(
    hook: &HookPlan,
    env: &[CString],
    input: &OwnedFd,
    output: &OwnedFd,
) -> std::convert::Infallible {
    // Killed with all that it has started.
    let _ = nix::unistd::setsid();
    let null = OpenOptions::new().write(true).open("/dev/null");
    let quiet = null
        .as_ref()
        .map_or(output.as_raw_fd(), |null| null.as_raw_fd());
    let ready = fd::dup_onto(input.as_raw_fd(), 0)
        .and_then(|()| fd::dup_onto(quiet, 1))
        .and_then(|()| fd::dup_onto(output.as_raw_fd(), 2))
        .and_then(|()| fd::cloexec_from_three());
    let errno = match ready {
        Ok(()) => execve(&hook.path, &hook.args, env),
        Err(errno) => errno,
    };
    // Its parent tells it.
    let _ = fd::write(output.as_fd(), errno.desc().as_bytes());
    exit_now(NOT_RUN)
}
