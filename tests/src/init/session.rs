// SPDX-License-Identifier: Apache-2.0
//! One command in the box.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{fcntl, FcntlArg, OFlag};
use nix::pty::openpty;
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::boxed::proto::{Exit, Frame, Kind, Spec, CHUNK, WINDOW};
use crate::sys;

/// cgroup of the commands, one below it for each.
const CGROUP: &str = "/sys/fs/cgroup/box";
/// Ctrl-D, which ends input on a terminal.
const END_OF_INPUT: u8 = 4;

/// An output channel.
struct Channel {
    kind: Kind,
    file: Option<File>,
    credit: usize,
    /// Nothing was there when the command had ended already.
    drained: bool,
}

/// A command and its descriptors.
pub struct Session {
    id: u32,
    pid: Pid,
    stdin: Option<File>,
    pending: VecDeque<u8>,
    eof: bool,
    tty: bool,
    outputs: Vec<Channel>,
    ended: Option<ExitStatus>,
    deadline: Option<Instant>,
    timed_out: bool,
    cgroup: PathBuf,
}

/// What reading a descriptor gave.
enum Got {
    Data(Vec<u8>),
    Nothing,
    End,
}

fn read_some(file: &mut File, most: usize) -> Got {
    let mut buf = vec![0; most];
    loop {
        match file.read(&mut buf) {
            Ok(0) => return Got::End,
            Ok(n) => {
                buf.truncate(n);
                return Got::Data(buf);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Got::Nothing,
            // A terminal gives EIO once nobody has it open.
            Err(_) => return Got::End,
        }
    }
}

fn nonblocking(fd: impl Into<OwnedFd>) -> io::Result<File> {
    let fd = fd.into();
    let flags = fcntl(&fd, FcntlArg::F_GETFL)?;
    let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
    fcntl(&fd, FcntlArg::F_SETFL(flags))?;
    Ok(File::from(fd))
}

impl Session {
    /// Starts the command of `spec`.
    ///
    /// # Errors
    /// Those of `exec` and of what it needs: terminal, cgroup, pipes.
    pub fn start(id: u32, spec: &Spec) -> io::Result<Self> {
        let (program, arguments) = spec
            .argv
            .split_first()
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no command"))?;
        let cgroup = PathBuf::from(CGROUP).join(id.to_string());
        fs::create_dir_all(&cgroup)?;
        let procs = OpenOptions::new()
            .write(true)
            .open(cgroup.join("cgroup.procs"))?;
        let mut command = Command::new(program);
        command.args(arguments).env_clear();
        command.envs(spec.env.iter().map(|(k, v)| (k, v)));
        command.current_dir(if spec.cwd.is_empty() { "/" } else { &spec.cwd });
        let mut master = None;
        if let Some((rows, cols)) = spec.tty {
            let pty = openpty(None, None)?;
            sys::set_window_size(pty.master.as_fd(), rows, cols)?;
            command
                .stdin(pty.slave.try_clone()?)
                .stdout(pty.slave.try_clone()?)
                .stderr(pty.slave);
            fcntl(
                &pty.master,
                FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC),
            )?;
            master = Some(pty.master);
        } else {
            let stdin = if spec.stdin {
                Stdio::piped()
            } else {
                Stdio::null()
            };
            command
                .stdin(stdin)
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
        }
        sys::own_session(&mut command, Some(procs), spec.tty.is_some());
        let mut child = command.spawn()?;
        // The terminal must not stay open here, or it never ends.
        drop(command);
        let pid = Pid::from_raw(child.id() as i32);
        let channel = |kind, fd: io::Result<File>| {
            fd.map(|file| Channel {
                kind,
                file: Some(file),
                credit: WINDOW as usize,
                drained: false,
            })
        };
        let (stdin, outputs) = match master {
            Some(master) => (
                Some(nonblocking(master.try_clone()?)?),
                vec![channel(Kind::Stdout, nonblocking(master))?],
            ),
            None => {
                let mut outputs = Vec::new();
                if let Some(out) = child.stdout.take() {
                    outputs.push(channel(Kind::Stdout, nonblocking(OwnedFd::from(out)))?);
                }
                if let Some(err) = child.stderr.take() {
                    outputs.push(channel(Kind::Stderr, nonblocking(OwnedFd::from(err)))?);
                }
                let stdin = child.stdin.take().map(OwnedFd::from);
                (stdin.map(nonblocking).transpose()?, outputs)
            }
        };
        Ok(Self {
            id,
            pid,
            stdin,
            pending: VecDeque::new(),
            eof: false,
            tty: spec.tty.is_some(),
            outputs,
            ended: None,
            deadline: (spec.timeout_ms > 0)
                .then(|| Instant::now() + Duration::from_millis(spec.timeout_ms)),
            timed_out: false,
            cgroup,
        })
    }

    /// The process that was started.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Whether the process has not been reaped; only then is its number its.
    pub fn running(&self) -> bool {
        self.ended.is_none()
    }

    /// Notes that the process has ended.
    pub fn ended(&mut self, status: ExitStatus) {
        self.ended = Some(status);
        self.deadline = None;
    }

    /// When [`Session::kill`] is due for exceeding the time limit.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Kills all for exceeding the time limit.
    pub fn time_out(&mut self) {
        self.timed_out = true;
        self.deadline = None;
        self.kill();
    }

    /// Kills everything the command started and that stayed in its cgroup.
    pub fn kill(&self) {
        if fs::write(self.cgroup.join("cgroup.kill"), "1").is_err() && self.ended.is_none() {
            // Not reaped yet, so the number is still that process's.
            let _ = kill(self.pid, Signal::SIGKILL);
        }
    }

    /// Acts on a frame from the owner.
    pub fn receive(&mut self, frame: Frame) {
        let word = |at| crate::boxed::proto::word(&frame.payload, at);
        match frame.kind {
            Kind::Stdin => self.pending.extend(frame.payload),
            Kind::StdinEof => {
                self.eof = true;
                if self.tty {
                    self.pending.push_back(END_OF_INPUT);
                }
            }
            Kind::Resize => {
                let size = word(0);
                if let Some(stdin) = self.stdin.as_ref().filter(|_| self.tty) {
                    // A terminal whose process has gone has no size.
                    let _ = sys::set_window_size(stdin.as_fd(), size as u16, (size >> 16) as u16);
                }
            }
            Kind::Signal => {
                if let (None, Ok(signal)) = (self.ended, Signal::try_from(word(0) as i32)) {
                    // It may have ended a moment ago and not be reaped yet.
                    let _ = kill(self.pid, signal);
                }
            }
            Kind::Credit => {
                let kind = if word(0) == 1 {
                    Kind::Stdout
                } else {
                    Kind::Stderr
                };
                if let Some(out) = self.outputs.iter_mut().find(|o| o.kind == kind) {
                    out.credit += word(4) as usize;
                }
            }
            Kind::Kill => self.kill(),
            _ => {}
        }
    }

    /// Descriptors to wait for: (descriptor, whether for writing).
    pub fn interests(&self) -> impl Iterator<Item = (BorrowedFd<'_>, bool)> {
        let input = self.stdin.iter().filter(|_| !self.pending.is_empty());
        let outputs = self
            .outputs
            .iter()
            .filter(|o| o.credit > 0)
            .filter_map(|o| o.file.as_ref());
        input
            .map(|f| (f.as_fd(), true))
            .chain(outputs.map(|f| (f.as_fd(), false)))
    }

    /// Moves what can be moved; frames for the owner go to `send`.
    pub fn work(&mut self, send: &mut impl FnMut(Frame)) {
        self.feed(send);
        for out in &mut self.outputs {
            while let Some(file) = out.file.as_mut().filter(|_| out.credit > 0) {
                match read_some(file, out.credit.min(CHUNK)) {
                    Got::Data(data) => {
                        out.credit -= data.len();
                        send(Frame::new(self.id, out.kind, data));
                        // Others have their turn; after the command's end no
                        // event may come that would bring this one back.
                        if self.ended.is_none() {
                            break;
                        }
                    }
                    Got::Nothing => {
                        // Everything the command itself wrote was read; what
                        // those still write that it left behind is not its.
                        out.drained = self.ended.is_some();
                        break;
                    }
                    Got::End => out.file = None,
                }
            }
        }
    }

    fn feed(&mut self, send: &mut impl FnMut(Frame)) {
        let mut consumed = 0;
        while !self.pending.is_empty() {
            let Some(stdin) = &mut self.stdin else {
                // Nobody reads: it is gone as if it had been read.
                consumed += self.pending.len();
                self.pending.clear();
                break;
            };
            match stdin.write(self.pending.make_contiguous()) {
                Ok(n) => {
                    consumed += n;
                    self.pending.drain(..n);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => self.stdin = None,
            }
        }
        if self.eof && self.pending.is_empty() && !self.tty {
            self.stdin = None;
        }
        if consumed > 0 {
            let bytes = (consumed as u32).to_le_bytes();
            send(Frame::new(self.id, Kind::StdinCredit, bytes));
        }
    }

    /// How the command ended, once all its output has been sent.
    pub fn finished(&self) -> Option<Exit> {
        let status = self.ended?;
        let done = self.outputs.iter().all(|o| o.file.is_none() || o.drained);
        done.then(|| {
            let signal = status.signal().unwrap_or(0);
            Exit {
                code: status.code().unwrap_or(128 + signal),
                signal,
                timed_out: self.timed_out,
            }
        })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Stays while something runs in it that the command left behind.
        let _ = fs::remove_dir(&self.cgroup);
    }
}
