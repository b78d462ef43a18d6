// SPDX-License-Identifier: Apache-2.0
//! Requests for locks. One that has to wait is answered later, and nobody waits
//! for it: the lock is tried again whenever the guest may have let go of one, and
//! from time to time, for the host does not tell when others have.

use std::{collections::VecDeque, io, time::Duration};

use fuse_backend_rs::{
    abi::fuse_abi::{FileLock, InHeader, InterruptIn, LkIn, LkOut, Opcode, OutHeader, LK_FLOCK},
    transport::Reader,
};
use vm_memory::{ByteValued, Bytes, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::timerfd::TimerFd;

use super::{
    device::QUEUES,
    passthrough::{Kind, Passthrough, Record},
};
use crate::virtio::chain::{segments, Broken, Chain, Queues, Segment};

/// Most requests that wait. Each takes a place in the queue, which others need,
/// too: those who would let go.
pub const MOST_WAITING: usize = 128;
/// How soon a lock is tried again, at first; then each time twice as late, up to
/// the last.
const SOON: Duration = Duration::from_millis(5);
const LATE: Duration = Duration::from_millis(160);

/// Requests that wait for locks.
pub struct Locks {
    waiting: VecDeque<Waiting>,
    /// Fires when they are to be tried again.
    pub timer: TimerFd,
    pause: Duration,
    /// Something may have changed for those who wait.
    changed: bool,
}

struct Waiting {
    queue: usize,
    head: u16,
    unique: u64,
    answer: Vec<Segment>,
    wanted: Wanted,
    interrupted: bool,
}

#[derive(Debug, Clone, Copy)]
struct Wanted {
    inode: u64,
    request: LkIn,
}

/// What became of a request.
pub enum Outcome {
    /// It was answered in so many bytes.
    Answered(u32),
    /// It will be.
    Waits,
    /// It is not for locks.
    Other,
}

impl Wanted {
    fn record(&self) -> io::Result<Record> {
        let FileLock {
            start, end, type_, ..
        } = self.request.lk;
        let kind = match i32::try_from(type_) {
            Ok(libc::F_RDLCK) => Kind::Shared,
            Ok(libc::F_WRLCK) => Kind::Exclusive,
            Ok(libc::F_UNLCK) => Kind::Unlocked,
            _ => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
        };
        Ok(Record { start, end, kind })
    }

    /// Whether it is of an open file as a whole.
    fn is_flock(&self) -> bool {
        self.request.lk_flags & LK_FLOCK != 0
    }

    /// Tries to have it; false: others do.
    fn attempt(&self, files: &Passthrough) -> io::Result<bool> {
        let record = self.record()?;
        let (handle, owner) = (self.request.fh, self.request.owner);
        match self.is_flock() {
            true => files.flock(self.inode, handle, record.kind),
            false => files.lock(self.inode, handle, owner, record),
        }
    }

    /// Who is in the way.
    fn holder(&self, files: &Passthrough) -> io::Result<LkOut> {
        let (handle, owner) = (self.request.fh, self.request.owner);
        let found = files.locked(self.inode, handle, owner, self.record()?)?;
        let lk = match found {
            None => FileLock {
                type_: libc::F_UNLCK as u32,
                ..self.request.lk
            },
            // Of no process that the guest has.
            Some(Record { start, end, kind }) => FileLock {
                start,
                end,
                type_: match kind {
                    Kind::Shared => libc::F_RDLCK,
                    Kind::Exclusive => libc::F_WRLCK,
                    Kind::Unlocked => libc::F_UNLCK,
                } as u32,
                pid: 0,
            },
        };
        Ok(LkOut { lk })
    }
}

impl Locks {
    /// Nobody waits.
    ///
    /// # Errors
    /// There is no timer.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            waiting: VecDeque::new(),
            timer: TimerFd::new().map_err(io::Error::from)?,
            pause: SOON,
            changed: false,
        })
    }

    /// Takes a request, if it is about locks.
    pub fn take(
        &mut self,
        files: &Passthrough,
        memory: &GuestMemoryMmap,
        queue: usize,
        chain: Chain<'_>,
    ) -> Result<Outcome, Broken> {
        let mut reader =
            Reader::from_descriptor_chain(memory, chain.clone()).map_err(|_| Broken)?;
        let Ok(header) = reader.read_obj::<InHeader>() else {
            return Ok(Outcome::Other);
        };
        let is = |opcode: Opcode| header.opcode == opcode as u32;
        if is(Opcode::Interrupt) {
            if let Ok(InterruptIn { unique }) = reader.read_obj() {
                let mut waiting = self.waiting.iter_mut();
                if let Some(one) = waiting.find(|one| one.unique == unique) {
                    one.interrupted = true;
                    self.changed = true;
                }
            }
            return Ok(Outcome::Answered(0));
        }
        let (asks, waits) = (is(Opcode::Getlk), is(Opcode::Setlkw));
        // Locks go with what is closed.
        self.changed |= is(Opcode::Flush) || is(Opcode::Release) || is(Opcode::Destroy);
        if !asks && !waits && !is(Opcode::Setlk) {
            return Ok(Outcome::Other);
        }
        let head = chain.head_index();
        let (_, answer) = segments(chain);
        let Ok(request) = reader.read_obj::<LkIn>() else {
            return reply(memory, &answer, header.unique, Err(libc::EINVAL), &[]);
        };
        let wanted = Wanted {
            inode: header.nodeid,
            request,
        };
        if asks {
            return match wanted.holder(files) {
                Ok(holder) => reply(memory, &answer, header.unique, Ok(()), holder.as_slice()),
                Err(error) => reply(memory, &answer, header.unique, Err(number(&error)), &[]),
            };
        }
        let result = match wanted.attempt(files) {
            Ok(true) => {
                // It may be less than before.
                self.changed = true;
                Ok(())
            }
            Ok(false) if !waits => Err(libc::EAGAIN),
            Ok(false) if self.waiting.len() >= MOST_WAITING => Err(libc::ENOLCK),
            Ok(false) => {
                self.waiting.push_back(Waiting {
                    queue,
                    head,
                    unique: header.unique,
                    answer,
                    wanted,
                    interrupted: false,
                });
                self.pause = SOON;
                self.changed = true;
                return Ok(Outcome::Waits);
            }
            Err(error) => Err(number(&error)),
        };
        reply(memory, &answer, header.unique, result, &[])
    }

    /// The timer has fired.
    pub fn look_again(&mut self) {
        // It is not ready any more; what it was ready for follows.
        let _ = self.timer.clear();
        self.pause = (self.pause * 2).min(LATE);
        self.changed = true;
    }

    /// Answers those who need not wait any more.
    pub fn settle(&mut self, files: &Passthrough, queues: &mut Queues) -> Result<(), Broken> {
        if !std::mem::take(&mut self.changed) || self.waiting.is_empty() {
            return Ok(());
        }
        let memory = queues.memory.memory();
        let mut told = [false; QUEUES];
        for one in std::mem::take(&mut self.waiting) {
            let result = match one.interrupted {
                true => Err(libc::EINTR),
                false => match one.wanted.attempt(files) {
                    Ok(false) => {
                        self.waiting.push_back(one);
                        continue;
                    }
                    Ok(true) => Ok(()),
                    Err(error) => Err(number(&error)),
                },
            };
            if let Outcome::Answered(length) = reply(&memory, &one.answer, one.unique, result, &[])?
            {
                queues.complete(one.queue, one.head, length)?;
            }
            told[one.queue] = true;
        }
        for (queue, told) in told.into_iter().enumerate() {
            if told {
                queues.signal(queue);
            }
        }
        if self.waiting.is_empty() {
            return Ok(());
        }
        self.timer.reset(self.pause, None).map_err(|error| {
            limited!(error, %error, "a shared directory's timer cannot be set");
            Broken
        })
    }
}

fn number(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

/// Answers a request; nothing, where there is no room.
fn reply(
    memory: &GuestMemoryMmap,
    answer: &[Segment],
    unique: u64,
    result: Result<(), i32>,
    content: &[u8],
) -> Result<Outcome, Broken> {
    let length = size_of::<OutHeader>() + content.len();
    let room: u64 = answer.iter().map(|part| u64::from(part.length)).sum();
    if room < length as u64 {
        return Ok(Outcome::Answered(0));
    }
    let header = OutHeader {
        len: length as u32,
        error: result.err().map_or(0, |error| -error),
        unique,
    };
    let bytes = [header.as_slice(), content].concat();
    let mut rest = &bytes[..];
    for part in answer {
        let (now, later) = rest.split_at(rest.len().min(part.length as usize));
        memory.write_slice(now, part.address).map_err(|_| Broken)?;
        rest = later;
    }
    Ok(Outcome::Answered(length as u32))
}
