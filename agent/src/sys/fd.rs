// SPDX-License-Identifier: Apache-2.0
//! Descriptors: pipes, splice, non-blocking reads and writes, closing ranges.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use libc::c_int;
use nix::errno::Errno;

/// A close-on-exec pipe: read end, write end.
pub fn pipe() -> nix::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [-1; 2];
    // SAFETY: `fds` has room for the two descriptors.
    Errno::result(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) })?;
    // SAFETY: both are new and nobody else owns them.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

/// Sets or clears O_NONBLOCK on the open file.
pub fn set_nonblocking(fd: BorrowedFd<'_>) -> nix::Result<()> {
    // SAFETY: integers only.
    let flags = Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })?;
    // SAFETY: integers only.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) })
        .map(drop)
}

/// Moves up to `len` bytes from `from` to `to`, one of which is a pipe,
/// without waiting. 0: end of file.
pub fn splice(from: BorrowedFd<'_>, to: BorrowedFd<'_>, len: usize) -> nix::Result<usize> {
    let flags = libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK;
    // SAFETY: null offsets mean the files' own positions.
    Errno::result(unsafe {
        libc::splice(
            from.as_raw_fd(),
            ptr::null_mut(),
            to.as_raw_fd(),
            ptr::null_mut(),
            len,
            flags,
        )
    })
    .map(|n| n as usize)
}

/// read(2) into `buffer`.
pub fn read(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> nix::Result<usize> {
    // SAFETY: the pointer and the length describe one live buffer.
    Errno::result(unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) })
        .map(|n| n as usize)
}

/// write(2) from `buffer`.
pub fn write(fd: BorrowedFd<'_>, buffer: &[u8]) -> nix::Result<usize> {
    // SAFETY: the pointer and the length describe one live buffer.
    Errno::result(unsafe { libc::write(fd.as_raw_fd(), buffer.as_ptr().cast(), buffer.len()) })
        .map(|n| n as usize)
}

/// Bytes waiting to be read (FIONREAD).
pub fn waiting(fd: BorrowedFd<'_>) -> nix::Result<usize> {
    let mut count: c_int = 0;
    // SAFETY: `count` is a valid place for the kernel to write to.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &mut count) })?;
    Ok(count.max(0) as usize)
}

/// What poll(2) with a zero timeout says about `fd` for `events`.
pub fn poll_now(fd: BorrowedFd<'_>, events: i16) -> nix::Result<i16> {
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events,
        revents: 0,
    };
    // SAFETY: one live pollfd.
    Errno::result(unsafe { libc::poll(&mut poll, 1, 0) })?;
    Ok(poll.revents)
}

/// Shuts down the receiving, sending or both halves of a socket.
pub fn shutdown(fd: BorrowedFd<'_>, how: c_int) -> nix::Result<()> {
    // SAFETY: integers only.
    Errno::result(unsafe { libc::shutdown(fd.as_raw_fd(), how) }).map(drop)
}

/// Duplicates `fd` onto the descriptor number `target`, without close-on-exec.
pub fn dup_onto(fd: RawFd, target: RawFd) -> nix::Result<()> {
    if fd == target {
        // SAFETY: integers only; clears close-on-exec, which dup2 of a
        // descriptor onto itself would not.
        return Errno::result(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) }).map(drop);
    }
    // SAFETY: integers only.
    Errno::result(unsafe { libc::dup2(fd, target) }).map(drop)
}

/// Closes every descriptor of the process but those in `keep`. For a child
/// that never drops what its parent owned.
pub fn close_all_but(keep: &mut [RawFd]) -> nix::Result<()> {
    keep.sort_unstable();
    let mut first: u32 = 0;
    for &fd in keep.iter() {
        let fd = fd as u32;
        if fd > first {
            close_range(first, fd - 1, 0)?;
        }
        first = first.max(fd + 1);
    }
    close_range(first, u32::MAX, 0)
}

/// Marks every descriptor from 3 up close-on-exec.
pub fn cloexec_from_three() -> nix::Result<()> {
    close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC)
}

fn close_range(first: u32, last: u32, flags: u32) -> nix::Result<()> {
    // SAFETY: integers only; the callers say why no owner is surprised.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) }).map(drop)
}

/// Sends `data` and a descriptor over a Unix socket.
pub fn send_with_fd(socket: BorrowedFd<'_>, data: &[u8], fd: BorrowedFd<'_>) -> nix::Result<()> {
    let mut iov = libc::iovec {
        iov_base: data.as_ptr().cast_mut().cast(),
        iov_len: data.len(),
    };
    let mut control = [0u64; 4];
    // SAFETY: zero is valid for every field of msghdr; the control buffer is
    // aligned for cmsghdr and larger than the one record written into it.
    let sent = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &mut iov;
        message.msg_iovlen = 1;
        let payload = size_of::<RawFd>() as u32;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(payload) as usize;
        let header = libc::CMSG_FIRSTHDR(&message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(payload) as usize;
        ptr::write_unaligned(libc::CMSG_DATA(header).cast::<RawFd>(), fd.as_raw_fd());
        libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL)
    };
    Errno::result(sent).map(drop)
}

/// Receives one message and the descriptor that came with it, if any.
pub fn receive_with_fd(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> nix::Result<(usize, Option<OwnedFd>)> {
    let mut iov = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    let mut control = [0u64; 8];
    let mut received = None;
    // SAFETY: as in `send_with_fd`; the control records are walked with the
    // macros made for it, and each descriptor is taken exactly once.
    let count = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &mut iov;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        let count = Errno::result(libc::recvmsg(
            socket.as_raw_fd(),
            &mut message,
            libc::MSG_CMSG_CLOEXEC,
        ))?;
        let mut header = libc::CMSG_FIRSTHDR(&message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let payload = (*header).cmsg_len as usize - libc::CMSG_LEN(0) as usize;
                for index in 0..payload / size_of::<RawFd>() {
                    let place = libc::CMSG_DATA(header).cast::<RawFd>().add(index);
                    received = Some(OwnedFd::from_raw_fd(ptr::read_unaligned(place)));
                }
            }
            header = libc::CMSG_NXTHDR(&message, header);
        }
        count
    };
    Ok((count as usize, received))
}

/// A connected pair of close-on-exec SEQPACKET sockets.
pub fn packet_pair() -> nix::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [-1; 2];
    // SAFETY: `fds` has room for the two descriptors.
    Errno::result(unsafe {
        libc::socketpair(
            libc::AF_UNIX,
            libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC,
            0,
            fds.as_mut_ptr(),
        )
    })?;
    // SAFETY: both are new and nobody else owns them.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

/// A descriptor that tokio watches; the kernel's file stays non-blocking.
pub fn watched(fd: OwnedFd) -> io::Result<tokio::io::unix::AsyncFd<OwnedFd>> {
    set_nonblocking(fd.as_fd())?;
    // SAFETY: an OwnedFd keeps its descriptor open until it is dropped, and an
    // AsyncFd gives no access that could replace it.
    Ok(unsafe { tokio::io::unix::AsyncFd::register(fd) }?)
}

/// One of the descriptors 0, 1 and 2, which the agent never closes.
pub fn standard(number: RawFd) -> BorrowedFd<'static> {
    debug_assert!((0..=2).contains(&number));
    // SAFETY: these three are open from boot to the end.
    unsafe { BorrowedFd::borrow_raw(number) }
}
