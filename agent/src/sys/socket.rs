// SPDX-License-Identifier: Apache-2.0
//! Sockets that neither tokio nor ttrpc opens for us: non-blocking vsock
//! connections and netlink.

use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use libc::c_int;
use nix::errno::Errno;

/// A close-on-exec socket.
fn socket(family: c_int, kind: c_int, protocol: c_int) -> nix::Result<OwnedFd> {
    // SAFETY: integers only.
    let fd = Errno::result(unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) })?;
    // SAFETY: a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Starts a non-blocking stream connection to a vsock address. The connection
/// stands, or has failed ([`take_error`]), when the socket becomes writable.
pub fn vsock_connect(cid: u32, port: u32) -> nix::Result<OwnedFd> {
    let fd = socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0)?;
    // SAFETY: sockaddr_vm is plain integers; zero is valid for each.
    let mut address: libc::sockaddr_vm = unsafe { zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    // SAFETY: the address is alive and its own size is passed.
    let connected = Errno::result(unsafe {
        libc::connect(
            fd.as_raw_fd(),
            std::ptr::addr_of!(address).cast(),
            size_of::<libc::sockaddr_vm>() as libc::socklen_t,
        )
    });
    match connected {
        Ok(_) | Err(Errno::EINPROGRESS) => Ok(fd),
        Err(errno) => Err(errno),
    }
}

/// Connects to the Unix stream socket that `place` is (O_PATH), without waiting
/// for a place in its queue: EAGAIN. So its path may be of any length.
pub fn unix_connect(place: BorrowedFd<'_>) -> nix::Result<OwnedFd> {
    let fd = socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0)?;
    let path = format!("/proc/self/fd/{}", place.as_raw_fd());
    // SAFETY: sockaddr_un is plain integers; zero is valid for each.
    let mut address: libc::sockaddr_un = unsafe { zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    // Shorter than the field, whose last byte stays 0.
    for (to, from) in address.sun_path.iter_mut().zip(path.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: the address is alive and its own size is passed.
    Errno::result(unsafe {
        libc::connect(
            fd.as_raw_fd(),
            std::ptr::addr_of!(address).cast(),
            size_of::<libc::sockaddr_un>() as libc::socklen_t,
        )
    })?;
    Ok(fd)
}

/// The pending error of a socket (SO_ERROR), which this clears.
pub fn take_error(fd: BorrowedFd<'_>) -> nix::Result<()> {
    let mut error: c_int = 0;
    let mut len = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: `error` and `len` describe one live int.
    Errno::result(unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ERROR,
            std::ptr::addr_of_mut!(error).cast(),
            &mut len,
        )
    })?;
    match error {
        0 => Ok(()),
        raw => Err(Errno::from_raw(raw)),
    }
}

/// A blocking route netlink socket.
pub fn netlink_route() -> nix::Result<OwnedFd> {
    socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE)
}

/// Sends one datagram to the kernel, or to a connected peer.
pub fn send(fd: BorrowedFd<'_>, data: &[u8]) -> nix::Result<()> {
    // SAFETY: the pointer and the length describe one live buffer.
    Errno::result(unsafe {
        libc::send(
            fd.as_raw_fd(),
            data.as_ptr().cast(),
            data.len(),
            libc::MSG_NOSIGNAL,
        )
    })
    .map(drop)
}

/// Receives one datagram.
pub fn receive(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> nix::Result<usize> {
    // SAFETY: the pointer and the length describe one live buffer.
    Errno::result(unsafe {
        libc::recv(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0)
    })
    .map(|n| n as usize)
}
