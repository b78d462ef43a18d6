// SPDX-License-Identifier: Apache-2.0
//! The box's main loop: one thread, one `poll`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Instant;

use anyhow::{bail, Context, Result};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{waitpid, WaitPidFlag, WaitStatus};

use super::session::Session;
use crate::boxed::proto::{Frame, Kind, Ready, Spec};

/// Bytes that may wait for the owner before outputs are left unread.
const BACKLOG: usize = 4 << 20;

struct Server {
    port: File,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    sent: usize,
    sessions: BTreeMap<u32, Session>,
}

/// Says that the box is ready and serves its owner.
///
/// # Errors
/// When the port breaks; the owner's going is a normal return.
pub fn serve(port: File, ready: Ready) -> Result<()> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    mask.thread_block().context("block SIGCHLD")?;
    let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
    let children = SignalFd::with_flags(&mask, flags).context("make a signalfd")?;
    let mut server = Server {
        port,
        incoming: Vec::new(),
        outgoing: Vec::new(),
        sent: 0,
        sessions: BTreeMap::new(),
    };
    server.send(Frame::new(0, Kind::Ready, serde_json::to_vec(&ready)?));
    loop {
        server.wait(&children)?;
        while let Ok(Some(_)) = children.read_signal() {}
        server.reap();
        if !server.receive()? {
            return Ok(());
        }
        server.work();
        server.flush()?;
    }
}

impl Server {
    fn send(&mut self, frame: Frame) {
        self.outgoing.extend(frame.encode());
    }

    fn backlog(&self) -> usize {
        self.outgoing.len() - self.sent
    }

    /// Sleeps until there is something to do.
    fn wait(&self, children: &SignalFd) -> Result<()> {
        let mut port = PollFlags::POLLIN;
        if self.backlog() > 0 {
            port |= PollFlags::POLLOUT;
        }
        let mut list = vec![
            PollFd::new(self.port.as_fd(), port),
            PollFd::new(children.as_fd(), PollFlags::POLLIN),
        ];
        let congested = self.backlog() > BACKLOG;
        let interests = self.sessions.values().flat_map(Session::interests);
        list.extend(interests.filter(|(_, write)| *write || !congested).map(
            |(fd, write): (BorrowedFd<'_>, bool)| {
                let flag = if write {
                    PollFlags::POLLOUT
                } else {
                    PollFlags::POLLIN
                };
                PollFd::new(fd, flag)
            },
        ));
        let next = self.sessions.values().filter_map(Session::deadline).min();
        let timeout = match next {
            None => PollTimeout::NONE,
            Some(at) => {
                let left = at.saturating_duration_since(Instant::now());
                // Rounded up, so that the deadline has passed afterwards.
                PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX)
            }
        };
        match poll(&mut list, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => Ok(()),
            Err(error) => Err(error).context("wait"),
        }
    }

    /// Collects every process that has ended: the commands, and whatever lost
    /// its parent.
    fn reap(&mut self) {
        loop {
            let (pid, status) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, ExitStatus::from_raw(code << 8)),
                Ok(WaitStatus::Signaled(pid, signal, _)) => {
                    (pid, ExitStatus::from_raw(signal as i32))
                }
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(_) => continue,
            };
            let mut running = self.sessions.values_mut().filter(|s| s.running());
            if let Some(session) = running.find(|s| s.pid() == pid) {
                session.ended(status);
            }
        }
    }

    /// Takes in what the owner sent; `false` when the owner has gone.
    fn receive(&mut self) -> Result<bool> {
        let mut buf = [0; 64 << 10];
        // Bounded, so that a flood of input does not starve the outputs.
        for _ in 0..16 {
            match self.port.read(&mut buf) {
                Ok(0) => return Ok(false),
                Ok(n) => self.incoming.extend_from_slice(&buf[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e).context("read from the owner"),
            }
        }
        let mut at = 0;
        while let Some((frame, used)) = Frame::decode(&self.incoming[at..])? {
            at += used;
            if frame.kind == Kind::PowerOff {
                return Ok(false);
            }
            self.dispatch(frame);
        }
        self.incoming.drain(..at);
        Ok(true)
    }

    fn dispatch(&mut self, frame: Frame) {
        let id = frame.session;
        if frame.kind != Kind::Spawn {
            // A frame for a session that has ended crossed its end.
            if let Some(session) = self.sessions.get_mut(&id) {
                session.receive(frame);
            }
            return;
        }
        let started = serde_json::from_slice::<Spec>(&frame.payload)
            .map_err(io::Error::from)
            .and_then(|spec| {
                Session::start(id, &spec).map_err(|error| {
                    let name = spec.argv.first().map_or("", String::as_str);
                    io::Error::new(error.kind(), format!("{name}: {error}"))
                })
            });
        match started {
            Ok(session) => {
                self.sessions.insert(id, session);
            }
            Err(error) => {
                self.send(Frame::new(id, Kind::SpawnFailed, error.to_string()));
            }
        }
    }

    /// Gives every session its turn and ends those that are finished.
    fn work(&mut self) {
        let now = Instant::now();
        let mut frames = Vec::new();
        let mut room = BACKLOG.saturating_sub(self.backlog());
        for session in self.sessions.values_mut() {
            if session.deadline().is_some_and(|at| at <= now) {
                session.time_out();
            }
            if room > 0 {
                session.work(&mut |frame: Frame| {
                    room = room.saturating_sub(frame.payload.len());
                    frames.push(frame.encode());
                });
            }
        }
        frames.into_iter().for_each(|f| self.outgoing.extend(f));
        let finished: Vec<_> = self
            .sessions
            .iter()
            .filter_map(|(id, session)| Some((*id, session.finished()?)))
            .collect();
        for (id, exit) in finished {
            self.sessions.remove(&id);
            let json = serde_json::to_vec(&exit).expect("an exit holds only numbers");
            self.send(Frame::new(id, Kind::Exit, json));
        }
    }

    fn flush(&mut self) -> Result<()> {
        while self.sent < self.outgoing.len() {
            match self.port.write(&self.outgoing[self.sent..]) {
                Ok(0) => bail!("the port takes nothing"),
                Ok(n) => self.sent += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e).context("write to the owner"),
            }
        }
        if self.sent == self.outgoing.len() {
            self.outgoing.clear();
            self.sent = 0;
        } else if self.sent > BACKLOG {
            self.outgoing.drain(..self.sent);
            self.sent = 0;
        }
        Ok(())
    }
}
