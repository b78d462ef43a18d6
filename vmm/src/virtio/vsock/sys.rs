// SPDX-License-Identifier: Apache-2.0
//! Socket calls on guest memory, which is no Rust slice: the guest changes it
//! at any time. Nothing here blocks or raises a signal.

use std::{
    io::{self, IoSlice},
    os::{
        fd::{AsFd, AsRawFd, FromRawFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout},
    sys::socket::{
        accept4, connect as connect_socket, sendmsg, socket, AddressFamily, MsgFlags, SockFlag,
        SockType, UnixAddr,
    },
};
use vm_memory::VolatileSlice;

/// Most pieces of one call (the kernel's UIO_MAXIOV).
pub const MAX_PIECES: usize = 1024;

fn vectors(pieces: &[VolatileSlice<'_>]) -> Vec<libc::iovec> {
    pieces
        .iter()
        .take(MAX_PIECES)
        .map(|piece| libc::iovec {
            iov_base: piece.ptr_guard_mut().as_ptr().cast(),
            iov_len: piece.len(),
        })
        .collect()
}

fn message(vectors: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all fields are integers and pointers, for which zero is a value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len();
    message
}

/// Receives into guest memory, at most [`MAX_PIECES`] of it; 0 at the end.
pub fn receive(socket: &UnixStream, pieces: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let mut vectors = vectors(pieces);
    let mut message = message(&mut vectors);
    loop {
        // SAFETY: the vectors cover the volatile slices, which are mapped and
        // writable for as long as they are borrowed, and nobody holds Rust
        // references into them.
        let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) };
        match usize::try_from(got) {
            Ok(got) => return Ok(got),
            Err(_) => retry(io::Error::last_os_error())?,
        }
    }
}

/// Sends from guest memory, at most [`MAX_PIECES`] of it; how much was taken.
pub fn send(socket: &UnixStream, pieces: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let mut vectors = vectors(pieces);
    let message = message(&mut vectors);
    loop {
        // SAFETY: the vectors cover the volatile slices, which are mapped for
        // as long as they are borrowed; the kernel only reads them.
        let sent = unsafe {
            libc::sendmsg(
                socket.as_raw_fd(),
                &message,
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        };
        match usize::try_from(sent) {
            Ok(sent) => return Ok(sent),
            Err(_) => retry(io::Error::last_os_error())?,
        }
    }
}

fn retry(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::Interrupted {
        Ok(())
    } else {
        Err(error)
    }
}

/// Sends bytes of our own; how many were taken.
pub fn send_bytes(socket: &UnixStream, parts: &[&[u8]]) -> io::Result<usize> {
    let parts: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    loop {
        match sendmsg::<UnixAddr>(socket.as_raw_fd(), &parts, &[], flags, None) {
            Ok(sent) => return Ok(sent),
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Takes a client from the listener. The socket does not block.
pub fn accept(listener: &UnixListener) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = accept4(listener.as_raw_fd(), flags)?;
    // SAFETY: the kernel has just made it for us, and nobody else knows it.
    Ok(unsafe { UnixStream::from_raw_fd(socket) })
}

/// Connects to the socket at `path` without waiting: a listener whose backlog
/// is full refuses (EAGAIN). The socket does not block.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    let socket = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    connect_socket(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(UnixStream::from(socket))
}

/// Whether the other side has closed the socket altogether, or both sides have
/// ended both directions.
pub fn is_hung_up(socket: &UnixStream) -> bool {
    let mut poll = [PollFd::new(socket.as_fd(), PollFlags::empty())];
    match nix::poll::poll(&mut poll, PollTimeout::ZERO) {
        Ok(_) => poll[0]
            .revents()
            .is_some_and(|events| events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR)),
        Err(_) => false,
    }
}
