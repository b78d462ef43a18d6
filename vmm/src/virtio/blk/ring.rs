// SPDX-License-Identifier: Apache-2.0
//! Transfers and flushes by io_uring: many at once, and nobody waits for them.
//!
//! The ring can do nothing but read, write and flush the one file, whoever gets
//! hold of it: so it is restricted before it is enabled. Guest memory stays
//! mapped for as long as the kernel may access it.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, RawFd},
    sync::Arc,
};

use io_uring::{opcode, register::Restriction, squeue, types::Fixed, types::FsyncFlags, IoUring};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};
use vm_memory::{GuestMemory, GuestMemoryMmap};

use super::{
    disk::Direction,
    request::{Done, Request, Transfer},
};
use crate::virtio::chain::{Broken, Segment};

/// Most requests at once.
const ENTRIES: u32 = 128;
/// The file's number in the ring.
const FILE: Fixed = Fixed(0);
/// IOSQE_FIXED_FILE.
const FIXED_FILE: u8 = 1;
/// Most pieces of memory in a transfer (UIO_MAXIOV).
const PIECES: usize = 1024;

/// The ring, with the requests that the kernel is at.
pub struct Ring {
    ring: IoUring,
    flights: Vec<Option<Flight>>,
    /// Indices of those that are none.
    free: Vec<usize>,
}

/// A piece of guest memory.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Piece(libc::iovec);

// SAFETY: an address is only used by the kernel; the memory belongs to no
// thread.
unsafe impl Send for Piece {}

/// A request that the kernel is at.
pub struct Flight {
    /// Its queue.
    pub queue: usize,
    /// As the guest made it.
    pub request: Request,
    /// Where it lies; the pieces' too.
    pub memory: Arc<GuestMemoryMmap>,
    /// None: a flush.
    direction: Option<Direction>,
    /// What is left of it.
    pieces: Vec<Piece>,
    first: usize,
    offset: u64,
    left: u64,
    moved: u32,
}

impl Ring {
    /// A ring for that file.
    ///
    /// # Errors
    /// The host has none, or does not let this process have one.
    pub fn new(file: &File) -> io::Result<Self> {
        Self::sized(file, ENTRIES)
    }

    /// As [`Self::new`], for so many requests at once.
    pub(super) fn sized(file: &File, entries: u32) -> io::Result<Self> {
        let ring = IoUring::builder().setup_r_disabled().build(entries)?;
        let submitter = ring.submitter();
        submitter.register_files(&[file.as_raw_fd()])?;
        submitter.register_restrictions(&mut [
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_flags_required(FIXED_FILE),
        ])?;
        submitter.register_enable_rings()?;
        Ok(Self {
            ring,
            flights: (0..entries).map(|_| None).collect(),
            free: (0..entries as usize).rev().collect(),
        })
    }

    /// Whether there is room for one more.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Whether the kernel is at something.
    pub fn is_busy(&self) -> bool {
        self.free.len() < self.flights.len()
    }

    /// Takes a flight; it is on its way with [`Self::submit`]. The flight, where
    /// there is no room.
    pub fn take(&mut self, flight: Flight) -> Result<(), Box<Flight>> {
        let Some(index) = self.free.pop() else {
            return Err(Box::new(flight));
        };
        let flight = self.flights[index].insert(flight);
        if push(&mut self.ring, index, flight) {
            return Ok(());
        }
        self.free.push(index);
        self.flights[index]
            .take()
            .map_or(Ok(()), |flight| Err(Box::new(flight)))
    }

    /// Tells the kernel of what was taken.
    ///
    /// # Errors
    /// It takes nothing now; once more later.
    pub fn submit(&mut self) -> io::Result<()> {
        loop {
            match self.ring.submit() {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether something that was taken has not been submitted.
    pub fn has_unsubmitted(&mut self) -> bool {
        !self.ring.submission().is_empty()
    }

    /// Requests that have come to something.
    pub fn reap(&mut self) -> Vec<(Flight, Done)> {
        let mut landed = Vec::new();
        let completions: Vec<_> = self
            .ring
            .completion()
            .map(|entry| (entry.user_data() as usize, entry.result()))
            .collect();
        for (index, result) in completions {
            let Some(Some(flight)) = self.flights.get_mut(index) else {
                continue;
            };
            let done = match flight.advance(result) {
                None if push(&mut self.ring, index, flight) => continue,
                None => flight.done(VIRTIO_BLK_S_IOERR),
                Some(done) => done,
            };
            self.free.push(index);
            landed.extend(self.flights[index].take().map(|flight| (flight, done)));
        }
        landed
    }

    /// Waits until the kernel is at nothing any more; what came of it.
    ///
    /// # Errors
    /// One cannot wait.
    pub fn finish(&mut self) -> io::Result<Vec<(Flight, Done)>> {
        let mut landed = self.reap();
        while self.is_busy() {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR | libc::EAGAIN | libc::EBUSY) => {}
                    _ => return Err(error),
                },
            }
            landed.extend(self.reap());
        }
        Ok(landed)
    }
}

impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl Drop for Ring {
    /// The kernel is not to write to memory that is not the guest's any more.
    fn drop(&mut self) {
        if let Err(error) = self.finish() {
            limited!(error, %error, "a disk's requests cannot be waited for");
            // What they are at stays mapped.
            std::mem::forget(std::mem::take(&mut self.flights));
        }
    }
}

/// Puts what is left of a flight into the ring; false where there is no room,
/// which there is for all that there can be.
fn push(ring: &mut IoUring, index: usize, flight: &Flight) -> bool {
    let entry = flight.entry().user_data(index as u64);
    // SAFETY: the pieces and the memory that they name stay until the kernel has
    // told that it is done with them: flights are only given up then.
    unsafe { ring.submission().push(&entry).is_ok() }
}

impl Flight {
    /// A request that flushes.
    pub fn flush(queue: usize, request: Request, memory: Arc<GuestMemoryMmap>) -> Self {
        Self {
            queue,
            request,
            memory,
            direction: None,
            pieces: Vec::new(),
            first: 0,
            offset: 0,
            left: 0,
            moved: 0,
        }
    }

    /// A request that is this transfer; back it comes where it has nothing to
    /// move, or is in too many pieces.
    pub fn transfer(
        queue: usize,
        request: Request,
        memory: Arc<GuestMemoryMmap>,
        disk: &super::disk::Disk,
    ) -> Result<Result<Self, Request>, Broken> {
        let Some(Transfer {
            direction,
            offset,
            segments,
        }) = request.transfer(disk)
        else {
            return Ok(Err(request));
        };
        let pieces = pieces(&memory, segments)?;
        let left: u64 = pieces.iter().map(|piece| piece.0.iov_len as u64).sum();
        // More than one call can move, or tell.
        if left == 0 || left > i32::MAX as u64 || pieces.len() > PIECES {
            return Ok(Err(request));
        }
        Ok(Ok(Self {
            queue,
            request,
            memory,
            direction: Some(direction),
            pieces,
            first: 0,
            offset,
            left,
            moved: 0,
        }))
    }

    /// Bytes that it moves.
    pub fn length(&self) -> u64 {
        self.left
    }

    fn entry(&self) -> squeue::Entry {
        let pieces = self.pieces[self.first..].as_ptr().cast::<libc::iovec>();
        let count = (self.pieces.len() - self.first) as u32;
        match self.direction {
            Some(Direction::In) => opcode::Readv::new(FILE, pieces, count)
                .offset(self.offset)
                .build(),
            Some(Direction::Out) => opcode::Writev::new(FILE, pieces, count)
                .offset(self.offset)
                .build(),
            None => opcode::Fsync::new(FILE).flags(FsyncFlags::DATASYNC).build(),
        }
    }

    fn done(&self, status: u32) -> Done {
        match self.direction {
            Some(direction) => Done::moved(status, direction, self.moved),
            None => Done::plain(status),
        }
    }

    /// The kernel's answer; what came of the request, or nothing yet: it is to
    /// go on.
    fn advance(&mut self, result: i32) -> Option<Done> {
        let Ok(count) = u32::try_from(result) else {
            return match -result {
                libc::EINTR | libc::EAGAIN => None,
                _ => Some(self.done(VIRTIO_BLK_S_IOERR)),
            };
        };
        if self.direction.is_none() {
            return Some(self.done(VIRTIO_BLK_S_OK));
        }
        if count == 0 {
            // The file has become shorter than it was.
            return Some(self.done(VIRTIO_BLK_S_IOERR));
        }
        self.moved = self.moved.saturating_add(count);
        self.offset += u64::from(count);
        self.left = self.left.saturating_sub(count.into());
        if self.left == 0 {
            return Some(self.done(VIRTIO_BLK_S_OK));
        }
        let mut count = count as usize;
        while let Some(Piece(piece)) = self.pieces.get_mut(self.first) {
            if count < piece.iov_len {
                piece.iov_base = piece.iov_base.wrapping_byte_add(count);
                piece.iov_len -= count;
                break;
            }
            count -= piece.iov_len;
            self.first += 1;
        }
        None
    }
}

/// Where segments lie in this process.
fn pieces(memory: &GuestMemoryMmap, segments: &[Segment]) -> Result<Vec<Piece>, Broken> {
    let mut pieces = Vec::with_capacity(segments.len());
    for segment in segments {
        for slice in memory.get_slices(segment.address, segment.length as usize) {
            let slice = slice.map_err(|_| Broken)?;
            pieces.push(Piece(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            }));
        }
    }
    Ok(pieces)
}

#[cfg(test)]
impl Ring {
    /// What comes of something that is not a disk's: to open the root directory.
    pub fn try_other(&mut self) -> Option<i32> {
        let path = c"/";
        let entry = opcode::OpenAt::new(io_uring::types::Fd(libc::AT_FDCWD), path.as_ptr())
            .build()
            .user_data(u64::MAX);
        // SAFETY: the path is never freed.
        unsafe { self.ring.submission().push(&entry) }.ok()?;
        self.ring.submit_and_wait(1).ok()?;
        let completion = self.ring.completion().next()?;
        Some(completion.result())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flight(lengths: &[usize]) -> Flight {
        let at = |index: usize| std::ptr::without_provenance_mut(0x1000 * (index + 1));
        let pieces = lengths.iter().enumerate().map(|(index, length)| {
            Piece(libc::iovec {
                iov_base: at(index),
                iov_len: *length,
            })
        });
        Flight {
            queue: 0,
            request: Request::nothing(),
            memory: Arc::new(GuestMemoryMmap::new()),
            direction: Some(Direction::Out),
            pieces: pieces.collect(),
            first: 0,
            offset: 512,
            left: lengths.iter().map(|length| *length as u64).sum(),
            moved: 0,
        }
    }

    #[test]
    fn what_was_cut_short_goes_on_where_it_was() {
        let mut flight = flight(&[100, 200, 300]);
        assert_eq!(flight.advance(-libc::EINTR), None);
        assert_eq!(flight.advance(150), None);
        let piece = flight.pieces[flight.first].0;
        assert_eq!((piece.iov_base.addr(), piece.iov_len), (0x2000 + 50, 150));
        assert_eq!(flight.offset, 512 + 150);
        assert_eq!(flight.advance(150), None);
        assert_eq!((flight.first, flight.pieces[2].0.iov_len), (2, 300));
        let done = flight.advance(300).unwrap();
        assert_eq!(done, Done::moved(VIRTIO_BLK_S_OK, Direction::Out, 600));
    }

    #[test]
    fn a_part_is_no_success() {
        for end in [0, -libc::EIO, -libc::ENOSPC, -libc::ECANCELED] {
            let mut flight = flight(&[512, 512]);
            assert_eq!(flight.advance(512), None);
            let done = flight.advance(end).unwrap();
            assert_eq!(done, Done::moved(VIRTIO_BLK_S_IOERR, Direction::Out, 512));
        }
    }
}
