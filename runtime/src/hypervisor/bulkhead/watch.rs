// SPDX-License-Identifier: Apache-2.0
//! Watching the VMM: its answers and events, its words, its end.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::ExitStatusExt,
    },
    process::Child,
    sync::Arc,
    time::Duration,
};

use bulkhead_vmm_api::{ChannelError, Event, ExitReason, FromVmm};
use rustix::{
    fs::{fcntl_setfl, OFlags},
    process::{pidfd_send_signal, Signal},
};
use tokio::{
    io::{unix::AsyncFd, Interest},
    task::JoinHandle,
    time::{sleep_until, timeout, Instant},
};

use super::{lock, Inner};
use crate::{
    hypervisor::{
        tail::{printable, Tail},
        Ending,
    },
    sys,
};

/// How long the process may take to end once it has said that it does.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How long what it has written last may take to be read.
const STDERR_DRAIN: Duration = Duration::from_millis(100);

/// Longest line that is logged, in bytes.
const LINE: usize = 1024;

/// Lines of its standard error that an error tells.
const TOLD: usize = 3;

/// Follows the process until its end, and tells it.
pub async fn watch(
    inner: Arc<Inner>,
    mut child: Child,
    pidfd: AsyncFd<OwnedFd>,
    tail: Tail,
    said: JoinHandle<()>,
) {
    let mut reason = None;
    let mut open = true;
    let mut deadline: Option<Instant> = None;
    loop {
        tokio::select! {
            ended = pidfd.readable() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "VMM cannot be watched");
                }
                break;
            }
            message = receive(&inner), if open => match message {
                Ok(message) => take(&inner, message, &mut reason),
                Err(ChannelError::Malformed(error)) => {
                    tracing::warn!(%error, "message of the VMM is not understood");
                }
                Err(_) => open = false,
            },
            () = overdue(deadline), if deadline.is_some() => {
                let _ = pidfd_send_signal(&inner.pidfd, Signal::KILL);
                deadline = None;
            }
        }
        if deadline.is_none() && (reason.is_some() || !open) {
            deadline = Some(Instant::now() + LAST_WORDS);
        }
    }
    // What it sent before it ended.
    while let Ok((message, _)) = inner.control.get_ref().receive() {
        take(&inner, message, &mut reason);
    }
    let status = child.wait();
    let _ = timeout(STDERR_DRAIN, said).await;
    let (code, signal) = match &status {
        Ok(status) => (status.code(), status.signal()),
        Err(error) => {
            tracing::error!(%error, "VMM's exit status is lost");
            (None, None)
        }
    };
    let ending = Ending {
        reason: reason.or_else(|| code.and_then(ExitReason::from_code)),
        signal,
        code,
        stderr: tail.lines(TOLD).join(" | "),
    };
    if ending.is_orderly() {
        tracing::debug!(pid = inner.pid, %ending, "VMM ended");
    } else {
        tracing::warn!(pid = inner.pid, %ending, "VMM ended");
    }
    inner.ending.send_replace(Some(ending));
    // Who waits for an answer learns the ending instead.
    lock(&inner.calls).waiting.clear();
}

async fn overdue(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

async fn receive(inner: &Inner) -> Result<FromVmm, ChannelError> {
    loop {
        let mut ready = inner
            .control
            .readable()
            .await
            .map_err(ChannelError::Socket)?;
        match inner.control.get_ref().receive() {
            // The VMM hands nothing over: what came along is closed.
            Ok((message, _fds)) => return Ok(message),
            Err(error) if error.would_block() => ready.clear_ready(),
            Err(error) => return Err(error),
        }
    }
}

fn take(inner: &Inner, message: FromVmm, reason: &mut Option<ExitReason>) {
    match message {
        FromVmm::Reply(reply) => {
            let waiting = lock(&inner.calls).waiting.remove(&reply.id);
            match waiting {
                // The caller may have given up.
                Some(waiting) => drop(waiting.send(reply.outcome)),
                None => tracing::warn!(?reply, "VMM answers what was not asked"),
            }
        }
        FromVmm::Event(Event::GuestReady(timeline)) => *lock(&inner.timeline) = timeline,
        FromVmm::Event(Event::GenerationRead) => {
            tracing::debug!(pid = inner.pid, "guest kernel has its own generation id");
        }
        FromVmm::Event(Event::GuestPanicked) => {
            tracing::warn!(pid = inner.pid, "guest kernel panicked");
        }
        FromVmm::Event(Event::Ended(why)) => *reason = Some(why),
    }
}

/// Logs what the VMM writes to its standard error, and keeps the end.
pub async fn log_stderr(pipe: OwnedFd, tail: Tail, pid: u32) {
    let watched = fcntl_setfl(&pipe, OFlags::NONBLOCK)
        .map_err(io::Error::from)
        .and_then(|()| {
            sys::watch(File::from(pipe), Interest::READABLE).map_err(|(_, error)| error)
        });
    let watched = match watched {
        Ok(watched) => watched,
        Err(error) => {
            tracing::warn!(%error, "VMM's standard error cannot be read");
            return;
        }
    };
    let mut line = Vec::new();
    let mut buffer = [0; 1024];
    loop {
        let Ok(mut ready) = watched.readable().await else {
            return;
        };
        let count = match ready.try_io(|file| {
            rustix::io::read(file.get_ref().as_fd(), &mut buffer).map_err(Into::into)
        }) {
            Ok(Ok(0) | Err(_)) => break,
            Ok(Ok(count)) => count,
            Err(_would_block) => continue,
        };
        tail.push(&buffer[..count]);
        for byte in &buffer[..count] {
            if *byte == b'\n' || line.len() == LINE {
                tracing::info!(
                    pid,
                    line = printable(&String::from_utf8_lossy(&line)),
                    "VMM"
                );
                line.clear();
            }
            if *byte != b'\n' {
                line.push(*byte);
            }
        }
    }
    if !line.is_empty() {
        tracing::info!(
            pid,
            line = printable(&String::from_utf8_lossy(&line)),
            "VMM"
        );
    }
}
