// SPDX-License-Identifier: Apache-2.0
//! Running one program to its end or to its timeout.

use std::{
    collections::BTreeSet,
    future::Future,
    io,
    os::{fd::OwnedFd, unix::process::CommandExt},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustix::process::{kill_process_group, pidfd_open, Pid, PidfdFlags, Signal};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::unix::pipe,
    time::timeout,
};

use super::{Hook, HookError};
use crate::sys;

/// How much of what a hook says is kept, in bytes.
const KEPT: usize = 4096;

/// How long a hook's last words may take once it has ended. Something that it
/// has started may hold its standard error for ever.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// Hooks that run now.
static RUNNING: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

fn running() -> MutexGuard<'static, BTreeSet<u32>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Process ids of the hooks that run now: nobody else may wait for them.
pub fn children() -> BTreeSet<u32> {
    running().clone()
}

/// A hook's process. Killed when nobody waits for it any more.
struct Running {
    child: Child,
    ended: bool,
}

impl Running {
    fn kill(&mut self) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid {
            // It has a group of its own, and has not been waited for. A group
            // that is gone needs no signal.
            let _ = kill_process_group(pid, Signal::KILL);
        }
        // It may have gone to another one.
        let _ = self.child.kill();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended {
            self.kill();
            let _ = self.child.wait();
        }
        running().remove(&self.child.id());
    }
}

/// Runs a hook in `bundle` with `state` as its standard input.
pub async fn run(hook: &Hook, bundle: &Path, state: &[u8]) -> Result<(), HookError> {
    let failed = |source| HookError::Run {
        hook: hook.name.clone(),
        source,
    };
    let mut process = spawn(hook, bundle).map_err(failed)?;
    let said = Arc::new(Mutex::new(Vec::new()));
    let conversation = converse(&mut process.child, state.to_vec(), said.clone());
    let conversation = tokio::spawn(conversation.map_err(failed)?);
    let ended = end_of(&process.child).map_err(failed)?;
    let in_time = match hook.timeout {
        Some(limit) => timeout(limit, ended).await,
        None => Ok(ended.await),
    };
    if in_time.is_err() {
        process.kill();
    }
    // It has ended, or is about to.
    let status = process.child.wait().map_err(failed)?;
    process.ended = true;
    let stop = conversation.abort_handle();
    let _ = timeout(LAST_WORDS, conversation).await;
    stop.abort();
    let stderr = {
        let said = said.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&said).into_owned()
    };
    let hook_name = || hook.name.clone();
    match (in_time, hook.timeout) {
        (Err(_), Some(timeout)) => Err(HookError::TimedOut {
            hook: hook_name(),
            timeout,
            stderr,
        }),
        (Ok(watched), _) => {
            watched.map_err(failed)?;
            match status.success() {
                true => Ok(()),
                false => Err(HookError::Failed {
                    hook: hook_name(),
                    status,
                    stderr,
                }),
            }
        }
        // Without a timeout there is none to pass.
        (Err(_), None) => unreachable!("a timeout that was not set"),
    }
}

fn spawn(hook: &Hook, bundle: &Path) -> io::Result<Running> {
    let mut command = Command::new(&hook.path);
    if let Some((name, args)) = hook.args.split_first() {
        command.arg0(name).args(args);
    }
    if let Some(env) = &hook.env {
        command.env_clear();
        command.envs(env.iter().filter_map(|entry| entry.split_once('=')));
    }
    // A front end may have removed it when the container is deleted.
    command.current_dir(if bundle.is_dir() {
        bundle
    } else {
        Path::new("/")
    });
    command
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    // Nobody would end it at its timeout, nor tell anybody how it ended.
    sys::die_with_parent(&mut command);
    // Held meanwhile, so that nobody sees the child without its being known.
    let mut running = running();
    let child = command.spawn()?;
    running.insert(child.id());
    Ok(Running {
        child,
        ended: false,
    })
}

/// Tells the state and keeps what is said.
fn converse(
    child: &mut Child,
    state: Vec<u8>,
    said: Arc<Mutex<Vec<u8>>>,
) -> io::Result<impl Future<Output = ()>> {
    let closed = || io::Error::from(io::ErrorKind::BrokenPipe);
    let stdin = OwnedFd::from(child.stdin.take().ok_or_else(closed)?);
    let stderr = OwnedFd::from(child.stderr.take().ok_or_else(closed)?);
    let mut stdin = pipe::Sender::from_owned_fd(stdin)?;
    let mut stderr = pipe::Receiver::from_owned_fd(stderr)?;
    let tell = async move {
        // A hook need not read it.
        let _ = stdin.write_all(&state).await;
    };
    let listen = async move {
        let mut buffer = [0; 1024];
        while let Ok(count @ 1..) = stderr.read(&mut buffer).await {
            let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
            let room = KEPT.saturating_sub(said.len()).min(count);
            said.extend(&buffer[..room]);
        }
    };
    Ok(async move {
        tokio::join!(tell, listen);
    })
}

/// Waits for the end of a child without reaping it.
fn end_of(child: &Child) -> io::Result<impl Future<Output = io::Result<()>>> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let pidfd = pidfd_open(pid, PidfdFlags::NONBLOCK)?;
    let watched = sys::watch(pidfd, Interest::READABLE).map_err(|(_, error)| error)?;
    Ok(async move { watched.readable().await.map(drop) })
}
