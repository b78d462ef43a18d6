// SPDX-License-Identifier: Apache-2.0
//! The loopback interface of the pod's namespace on the host. What a
//! container listens at is in the guest; containerd's port-forward connects
//! here. A BPF program gives every TCP connection to a loopback address,
//! whichever the port, to one socket; the local address of what that socket
//! accepts tells the port that is wanted.
//!
//! There is nothing to give back: socket and program are descriptors, and are
//! gone with the process.

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, Ipv6Addr, TcpListener},
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
    path::Path,
    thread,
};

use bulkhead_bpf::Kind;
use nix::sched::{setns, CloneFlags};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;

/// Takes the connections to the loopback interface of a network namespace.
#[derive(Debug)]
pub struct Loopback {
    /// Non-blocking.
    pub listener: TcpListener,
    /// While this is open they are given to `listener`. The kernel keeps the
    /// program and its map for it.
    pub link: OwnedFd,
}

impl Loopback {
    /// Takes the connections in the namespace at `netns`. Blocks.
    ///
    /// # Errors
    /// The namespace cannot be entered; the host's kernel has no programs that
    /// look sockets up (Linux 5.9), or does not let this process have them.
    pub fn open(netns: &Path) -> io::Result<Self> {
        let namespace = File::open(netns)?;
        let listener = thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&namespace, CloneFlags::CLONE_NEWNET)?;
                listen()
            });
            match thread.join() {
                Ok(listener) => listener,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })?;
        listener.set_nonblocking(true)?;
        rustix::net::listen(&listener, BACKLOG)?;
        let map = bulkhead_bpf::map_of_socket(listener.as_fd())?;
        let program = bulkhead_bpf::load(Kind::SocketLookup, &program(map.as_raw_fd()))?;
        let link = bulkhead_bpf::link_to_namespace(program.as_fd(), namespace.as_fd())?;
        Ok(Self { listener, link })
    }
}

/// A socket for both families, or for IPv4 where there is no other. Its own
/// port does not matter.
fn listen() -> io::Result<TcpListener> {
    TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0))
        .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)))
}

/// Instructions (linux/bpf_common.h, linux/bpf.h): class, operation, source.
const LOAD_WORD: u8 = 0x61;
const LOAD_CONSTANT: u8 = 0x18;
const STORE_WORD: u8 = 0x62;
const MOVE: u8 = 0xbf;
const MOVE_CONSTANT: u8 = 0xb7;
const ADD_CONSTANT: u8 = 0x07;
const AND_CONSTANT: u8 = 0x57;
const JUMP: u8 = 0x05;
const JUMP_EQUAL: u8 = 0x15;
const JUMP_UNEQUAL: u8 = 0x55;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;

/// Of LOAD_CONSTANT: the constant is a map's descriptor.
const MAP_DESCRIPTOR: u8 = 1;

/// The helpers that the program calls.
const MAP_LOOKUP: i32 = 1;
const RELEASE_SOCKET: i32 = 86;
const ASSIGN_SOCKET: i32 = 124;

/// Offsets in `struct bpf_sk_lookup`.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;

/// The verdict: as the program has chosen, or as without it.
const PASS: i32 = 1;

fn instruction(code: u8, to: u8, from: u8, offset: i16, constant: i32) -> u64 {
    u64::from(code)
        | u64::from(to | from << 4) << 8
        | u64::from(offset as u16) << 16
        | u64::from(constant as u32) << 32
}

/// The program. Jumps that go to its end have no offset until all of it is
/// there.
fn program(map: RawFd) -> [u64; 34] {
    // 127.0.0.0/8 by its first byte, ::1 by its last word, in the network's
    // order.
    let first_byte = u32::from_ne_bytes([0xff, 0, 0, 0]) as i32;
    let loopback4 = u32::from_ne_bytes([127, 0, 0, 0]) as i32;
    let loopback6 = u32::from_ne_bytes([0, 0, 0, 1]) as i32;
    let mut program = [
        instruction(MOVE, 6, 1, 0, 0),
        // Only TCP.
        instruction(LOAD_WORD, 2, 6, PROTOCOL, 0),
        instruction(JUMP_UNEQUAL, 2, 0, END, libc::IPPROTO_TCP),
        instruction(LOAD_WORD, 2, 6, FAMILY, 0),
        instruction(JUMP_EQUAL, 2, 0, 5, libc::AF_INET6),
        instruction(JUMP_UNEQUAL, 2, 0, END, libc::AF_INET),
        // To 127.0.0.0/8.
        instruction(LOAD_WORD, 2, 6, LOCAL_IP4, 0),
        instruction(AND_CONSTANT, 2, 0, 0, first_byte),
        instruction(JUMP_UNEQUAL, 2, 0, END, loopback4),
        instruction(JUMP, 0, 0, 8, 0),
        // To ::1.
        instruction(LOAD_WORD, 2, 6, LOCAL_IP6, 0),
        instruction(JUMP_UNEQUAL, 2, 0, END, 0),
        instruction(LOAD_WORD, 2, 6, LOCAL_IP6 + 4, 0),
        instruction(JUMP_UNEQUAL, 2, 0, END, 0),
        instruction(LOAD_WORD, 2, 6, LOCAL_IP6 + 8, 0),
        instruction(JUMP_UNEQUAL, 2, 0, END, 0),
        instruction(LOAD_WORD, 2, 6, LOCAL_IP6 + 12, 0),
        instruction(JUMP_UNEQUAL, 2, 0, END, loopback6),
        // The socket is the map's entry 0.
        instruction(STORE_WORD, 10, 0, -4, 0),
        instruction(MOVE, 2, 10, 0, 0),
        instruction(ADD_CONSTANT, 2, 0, 0, -4),
        instruction(LOAD_CONSTANT, 1, MAP_DESCRIPTOR, 0, map),
        0,
        instruction(CALL, 0, 0, 0, MAP_LOOKUP),
        instruction(JUMP_EQUAL, 0, 0, END, 0),
        instruction(MOVE, 7, 0, 0, 0),
        instruction(MOVE, 1, 6, 0, 0),
        instruction(MOVE, 2, 7, 0, 0),
        instruction(MOVE_CONSTANT, 3, 0, 0, 0),
        instruction(CALL, 0, 0, 0, ASSIGN_SOCKET),
        instruction(MOVE, 1, 7, 0, 0),
        instruction(CALL, 0, 0, 0, RELEASE_SOCKET),
        instruction(MOVE_CONSTANT, 0, 0, 0, PASS),
        instruction(EXIT, 0, 0, 0, 0),
    ];
    let end = program.len() - 2;
    for (at, word) in program.iter_mut().enumerate() {
        let code = *word as u8;
        let jumps = code == JUMP_EQUAL || code == JUMP_UNEQUAL;
        if jumps && (*word >> 16) as i16 == END {
            *word = *word & !(0xffff << 16) | ((end - at - 1) as u64) << 16;
        }
    }
    program
}

/// Stands for the way to the end of the program.
const END: i16 = i16::MAX;

#[cfg(test)]
mod tests;
