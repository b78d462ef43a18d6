// SPDX-License-Identifier: Apache-2.0
//! Moving bytes between a process's pipes and its streams.
//!
//! Data goes by splice(2), from pipe to socket without passing through the
//! agent's memory; terminals, and kernels that cannot splice to the socket, go
//! by read and write.
//!
//! When a process has ended its output is forwarded until end of file. Another
//! process may hold the pipe open, so there is a bound: what was in the pipe
//! when the process ended is always forwarded, however slow the host is, and
//! then a further [`GRACE`] is given. After that the stream is closed and the
//! pipe read and forgotten, so that the process that holds it does not die of
//! SIGPIPE.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use tokio::io::unix::AsyncFd;
use tokio::sync::{oneshot, watch};
use tokio::time::{sleep_until, timeout, Instant};

use crate::sys::fd;

/// How long a process's output stays connected after it has ended while
/// another process holds the pipe open.
const GRACE: Duration = Duration::from_secs(1);
/// How long a closed stream waits for the host to close its side, so that no
/// reset overtakes the data.
const LINGER: Duration = Duration::from_secs(5);
/// Bytes per splice: a pipe's usual capacity.
const CHUNK: usize = 64 * 1024;
/// Bytes per read where splice does not serve.
const BUFFER: usize = 16 * 1024;
/// Chunks moved before other tasks get a turn.
const TURN: u32 = 16;
/// Bytes that a terminal may hold; it cannot say how many it does.
const TERMINAL_BACKLOG: usize = 64 * 1024;

/// The end of the process as an output task sees it.
struct Ending {
    exited: watch::Receiver<bool>,
    deadline: Option<Instant>,
    /// Bytes that must be forwarded whatever the time.
    owed: usize,
}

impl Ending {
    fn new(exited: watch::Receiver<bool>) -> Self {
        Self {
            exited,
            deadline: None,
            owed: 0,
        }
    }

    /// Notes the end when it has come; `backlog` tells what is in the pipe.
    fn observe(&mut self, backlog: impl FnOnce() -> usize) {
        // An error means that the sender is gone: the process is forgotten.
        let ended = *self.exited.borrow() || self.exited.has_changed().is_err();
        if ended && self.deadline.is_none() {
            self.deadline = Some(Instant::now() + GRACE);
            self.owed = backlog();
        }
    }

    fn moved(&mut self, count: usize) {
        self.owed = self.owed.saturating_sub(count);
    }

    /// Whether to stop although there may be more.
    fn over(&self) -> bool {
        self.owed == 0 && self.deadline.is_some_and(|end| Instant::now() >= end)
    }

    /// Ends when there is news: the process has ended, or the grace is over.
    async fn news(&mut self) {
        match self.deadline {
            Some(end) => sleep_until(end).await,
            None => {
                let _ = self.exited.changed().await;
            }
        }
    }
}

/// How one attempt to move data went.
enum Step {
    Moved(usize),
    EndOfFile,
    SourceEmpty,
    SinkFull,
    /// The kernel cannot splice between these two.
    NoSplice,
    /// Nobody reads the sink any more.
    SinkGone,
}

fn splice(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Step {
    match fd::splice(from, to, CHUNK) {
        Ok(0) => Step::EndOfFile,
        Ok(count) => Step::Moved(count),
        Err(Errno::EINTR) => Step::Moved(0),
        // Which of the two is not ready?
        Err(Errno::EAGAIN) => match fd::poll_now(from, libc::POLLIN) {
            Ok(0) => Step::SourceEmpty,
            _ => match fd::poll_now(to, libc::POLLOUT) {
                Ok(0) => Step::SinkFull,
                _ => Step::NoSplice,
            },
        },
        Err(Errno::EINVAL | Errno::ENOSYS | Errno::EOPNOTSUPP) => Step::NoSplice,
        Err(_) => Step::SinkGone,
    }
}

/// Forwards a process's output pipe to the host.
pub async fn output(
    pipe: AsyncFd<OwnedFd>,
    stream: AsyncFd<OwnedFd>,
    exited: watch::Receiver<bool>,
    done: oneshot::Sender<()>,
) {
    let mut ending = Ending::new(exited);
    let finished = forward(&pipe, &stream, &mut ending).await;
    finish(&stream);
    // The process is forgotten: nobody waits.
    let _ = done.send(());
    tokio::join!(linger(&stream), async {
        if !finished {
            discard(&pipe).await;
        }
    });
}

/// Whether the source came to its end.
async fn forward(pipe: &AsyncFd<OwnedFd>, stream: &AsyncFd<OwnedFd>, ending: &mut Ending) -> bool {
    let mut turn = 0;
    loop {
        ending.observe(|| fd::waiting(pipe.as_fd()).unwrap_or(0));
        if ending.over() {
            return false;
        }
        match splice(pipe.as_fd(), stream.as_fd()) {
            Step::Moved(count) => {
                ending.moved(count);
                turn += 1;
                if turn % TURN == 0 {
                    tokio::task::yield_now().await;
                }
            }
            Step::EndOfFile => return true,
            Step::SourceEmpty => {
                // Nothing in the pipe: nothing is owed.
                ending.owed = 0;
                tokio::select! {
                    ready = pipe.readable() => match ready {
                        Ok(mut guard) => forget_stale(&mut guard, pipe.as_fd(), libc::POLLIN),
                        Err(_) => return true,
                    },
                    () = ending.news() => {}
                }
            }
            Step::SinkFull => match stream.writable().await {
                Ok(mut guard) => forget_stale(&mut guard, stream.as_fd(), libc::POLLOUT),
                Err(_) => return false,
            },
            Step::NoSplice => return copy(pipe, Some(stream), ending, false).await,
            Step::SinkGone => return false,
        }
    }
}

/// Readiness is remembered from the last event; drops it when poll(2) knows
/// better, so that the next wait is a real one.
fn forget_stale(
    guard: &mut tokio::io::unix::AsyncFdReadyGuard<'_, OwnedFd>,
    fd: BorrowedFd<'_>,
    events: i16,
) {
    if fd::poll_now(fd, events) == Ok(0) {
        guard.clear_ready();
    }
}

/// As [`forward`], by read and write. Without a stream the data is dropped.
async fn copy(
    source: &AsyncFd<OwnedFd>,
    stream: Option<&AsyncFd<OwnedFd>>,
    ending: &mut Ending,
    terminal: bool,
) -> bool {
    let mut buffer = vec![0; BUFFER];
    loop {
        ending.observe(|| {
            if terminal {
                TERMINAL_BACKLOG
            } else {
                fd::waiting(source.as_fd()).unwrap_or(0)
            }
        });
        if ending.over() {
            return false;
        }
        let count = match fd::read(source.as_fd(), &mut buffer) {
            Ok(0) => return true,
            Ok(count) => count,
            Err(Errno::EINTR) => continue,
            Err(Errno::EAGAIN) => {
                ending.owed = 0;
                tokio::select! {
                    ready = source.readable() => match ready {
                        Ok(mut guard) => forget_stale(&mut guard, source.as_fd(), libc::POLLIN),
                        Err(_) => return true,
                    },
                    () = ending.news() => {}
                }
                continue;
            }
            // A terminal whose last user has closed it says EIO.
            Err(_) => return true,
        };
        if let Some(stream) = stream {
            if write_all(stream, &buffer[..count]).await.is_err() {
                return false;
            }
        }
        ending.moved(count);
        tokio::task::yield_now().await;
    }
}

async fn write_all(sink: &AsyncFd<OwnedFd>, mut data: &[u8]) -> std::io::Result<()> {
    while !data.is_empty() {
        match fd::write(sink.as_fd(), data) {
            Ok(count) => data = &data[count..],
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => {
                let mut guard = sink.writable().await?;
                forget_stale(&mut guard, sink.as_fd(), libc::POLLOUT);
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Tells the host that there is no more.
fn finish(stream: &AsyncFd<OwnedFd>) {
    // A stream that the host has reset already has nothing to shut down.
    let _ = fd::shutdown(stream.as_fd(), libc::SHUT_WR);
}

/// Waits for the host to close its side; what it still sends is dropped.
async fn linger(stream: &AsyncFd<OwnedFd>) {
    let _ = timeout(LINGER, discard(stream)).await;
}

/// Reads and forgets until end of file.
async fn discard(source: &AsyncFd<OwnedFd>) {
    let mut buffer = vec![0; BUFFER];
    loop {
        match fd::read(source.as_fd(), &mut buffer) {
            Ok(0) => return,
            Ok(_) => tokio::task::yield_now().await,
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => match source.readable().await {
                Ok(mut guard) => forget_stale(&mut guard, source.as_fd(), libc::POLLIN),
                Err(_) => return,
            },
            Err(_) => return,
        }
    }
}

/// Forwards the host's input to a process's pipe; end of file closes the pipe.
pub async fn input(stream: AsyncFd<OwnedFd>, pipe: AsyncFd<OwnedFd>) {
    let mut turn = 0;
    loop {
        let waited = match splice(stream.as_fd(), pipe.as_fd()) {
            Step::Moved(_) => {
                turn += 1;
                if turn % TURN == 0 {
                    tokio::task::yield_now().await;
                }
                Ok(())
            }
            Step::EndOfFile | Step::SinkGone => return,
            Step::SourceEmpty => tokio::select! {
                ready = stream.readable() => ready.map(|mut guard| {
                    forget_stale(&mut guard, stream.as_fd(), libc::POLLIN);
                }),
                // The only event of a pipe that is writable already: its last
                // reader has gone.
                () = closed(&pipe) => return,
            },
            Step::SinkFull => pipe.writable().await.map(|mut guard| {
                forget_stale(&mut guard, pipe.as_fd(), libc::POLLOUT);
            }),
            Step::NoSplice => return copy_input(&stream, &pipe).await,
        };
        if waited.is_err() {
            return;
        }
    }
}

/// Ends when nobody can read the pipe any more.
async fn closed(pipe: &AsyncFd<OwnedFd>) {
    loop {
        match pipe.ready(tokio::io::Interest::ERROR).await {
            Ok(mut guard) => {
                if fd::poll_now(pipe.as_fd(), 0) == Ok(0) {
                    guard.clear_ready();
                } else {
                    return;
                }
            }
            Err(_) => return,
        }
    }
}

async fn copy_input(stream: &AsyncFd<OwnedFd>, sink: &AsyncFd<OwnedFd>) {
    let mut buffer = vec![0; BUFFER];
    loop {
        match fd::read(stream.as_fd(), &mut buffer) {
            Ok(0) => return,
            Ok(count) => {
                if write_all(sink, &buffer[..count]).await.is_err() {
                    return;
                }
            }
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => match stream.readable().await {
                Ok(mut guard) => forget_stale(&mut guard, stream.as_fd(), libc::POLLIN),
                Err(_) => return,
            },
            Err(_) => return,
        }
    }
}

/// Moves bytes both ways between two sockets until both ways have ended. The
/// end of one way is passed on, and the other goes on.
pub async fn both(one: AsyncFd<OwnedFd>, other: AsyncFd<OwnedFd>) {
    tokio::join!(one_way(&one, &other), one_way(&other, &one));
}

async fn one_way(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>) {
    copy_input(from, to).await;
    finish(to);
}

/// Forwards what a terminal shows to the host; drops it without a stream.
pub async fn terminal_output(
    master: Arc<AsyncFd<OwnedFd>>,
    stream: Option<Arc<AsyncFd<OwnedFd>>>,
    exited: watch::Receiver<bool>,
    done: oneshot::Sender<()>,
) {
    let mut ending = Ending::new(exited);
    let finished = copy(&master, stream.as_deref(), &mut ending, true).await;
    if let Some(stream) = &stream {
        finish(stream);
    }
    let _ = done.send(());
    if !finished {
        discard(&master).await;
    }
    if let Some(stream) = stream {
        linger(&stream).await;
    }
}

/// Forwards what the user types to a terminal. The end of the stream is not
/// the end of the terminal.
pub async fn terminal_input(stream: Arc<AsyncFd<OwnedFd>>, master: Arc<AsyncFd<OwnedFd>>) {
    copy_input(&stream, &master).await;
}
