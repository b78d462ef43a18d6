// SPDX-License-Identifier: Apache-2.0
//! A descriptor that data comes from or goes to.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    event::{poll, PollFd, PollFlags, Timespec},
    fs::{fcntl_getfl, fcntl_setfl, fstat, FileType, OFlags},
};
use tokio::io::{unix::AsyncFd, Interest};

use crate::sys;

/// A source or sink of bytes.
#[derive(Debug)]
pub enum Endpoint {
    /// One that may have to be waited for.
    Watched(AsyncFd<OwnedFd>),
    /// One that the kernel does not watch, because it is always ready: a
    /// regular file, /dev/null.
    Ready(OwnedFd),
}

impl Endpoint {
    /// Takes a descriptor over and makes it non-blocking.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        if FileType::from_raw_mode(fstat(&fd)?.st_mode) == FileType::RegularFile {
            return Ok(Self::Ready(fd));
        }
        let flags = fcntl_getfl(&fd)?;
        if !flags.contains(OFlags::NONBLOCK) {
            fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        }
        match sys::watch(fd, Interest::READABLE | Interest::WRITABLE) {
            Ok(watched) => Ok(Self::Watched(watched)),
            // epoll refuses what is always ready.
            Err((fd, cause)) if cause.raw_os_error() == Some(libc::EPERM) => Ok(Self::Ready(fd)),
            Err((_, cause)) => Err(cause),
        }
    }

    /// Waits until there is something to read, or the end of it.
    pub async fn readable(&self) -> io::Result<()> {
        self.wait(Interest::READABLE, PollFlags::IN).await
    }

    /// Waits until something can be written, or never again.
    pub async fn writable(&self) -> io::Result<()> {
        self.wait(Interest::WRITABLE, PollFlags::OUT).await
    }

    /// Waits until whoever is at the other end has gone.
    pub async fn abandoned(&self) -> io::Result<()> {
        let Self::Watched(watched) = self else {
            return std::future::pending().await;
        };
        loop {
            let mut ready = watched
                .ready(Interest::READABLE | Interest::WRITABLE | Interest::ERROR)
                .await?;
            if holds(self.as_fd(), PollFlags::empty())? {
                return Ok(());
            }
            // Readiness to write never goes away by itself: only an edge
            // tells news.
            ready.clear_ready();
        }
    }

    async fn wait(&self, interest: Interest, events: PollFlags) -> io::Result<()> {
        let Self::Watched(watched) = self else {
            return Ok(());
        };
        loop {
            let mut ready = watched.ready(interest).await?;
            // What is remembered may be stale.
            if holds(self.as_fd(), events)? {
                return Ok(());
            }
            ready.clear_ready();
        }
    }

    /// Whether there is something to read, or the end, right now.
    pub fn is_readable(&self) -> io::Result<bool> {
        match self {
            Self::Watched(_) => holds(self.as_fd(), PollFlags::IN),
            Self::Ready(_) => Ok(true),
        }
    }

    /// Whether something can be written, or never again, right now.
    pub fn is_writable(&self) -> io::Result<bool> {
        match self {
            Self::Watched(_) => holds(self.as_fd(), PollFlags::OUT),
            Self::Ready(_) => Ok(true),
        }
    }
}

impl AsFd for Endpoint {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Watched(fd) => fd.get_ref().as_fd(),
            Self::Ready(fd) => fd.as_fd(),
        }
    }
}

/// Whether poll(2) reports any of `events`, an error or a hang-up.
fn holds(fd: BorrowedFd<'_>, events: PollFlags) -> io::Result<bool> {
    let mut fds = [PollFd::from_borrowed_fd(fd, events)];
    loop {
        match poll(&mut fds, Some(&Timespec::default())) {
            Ok(count) => return Ok(count > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
