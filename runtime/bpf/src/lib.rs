// SPDX-License-Identifier: Apache-2.0
//! bpf(2), as far as the agent (device rules of a cgroup) and the runtime
//! (sockets of a network namespace) use it: programs, given as the kernel's
//! instructions, and where they are attached.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_LINK_CREATE: libc::c_int = 28;

const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_F_ALLOW_MULTI: u32 = 2;

const LICENSE: &CStr = c"Apache-2.0";

/// What a program is asked about (Linux `enum bpf_prog_type`, and the
/// `enum bpf_attach_type` that goes with it).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Whether processes of a cgroup may use a device.
    CgroupDevice,
    /// Which socket gets a connection of a network namespace (Linux 5.9).
    SocketLookup,
}

impl Kind {
    fn program(self) -> u32 {
        match self {
            Self::CgroupDevice => 15,
            Self::SocketLookup => 30,
        }
    }

    fn attached(self) -> u32 {
        match self {
            Self::CgroupDevice => 6,
            Self::SocketLookup => 36,
        }
    }
}

/// The parts of `union bpf_attr` that these calls need; what the kernel has
/// beyond is zero for it.
#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
}

#[repr(C)]
struct MapUpdate {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

#[repr(C)]
struct Attach {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
}

#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

fn bpf<T>(command: libc::c_int, attr: &T) -> io::Result<RawFd> {
    // SAFETY: `attr` is one of the structures above with its own size, which
    // has no padding that is not a field; the pointers in it are alive for
    // the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr, size_of::<T>()) };
    match result {
        0.. => Ok(result as RawFd),
        _ => Err(io::Error::last_os_error()),
    }
}

fn descriptor(fd: RawFd) -> OwnedFd {
    // SAFETY: a new descriptor of bpf(2)'s, which nobody else owns.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Loads a program; each instruction is eight bytes as the kernel lays them
/// out.
///
/// # Errors
/// What the kernel says: EPERM without rights, EINVAL of a program that it
/// does not take or a kind that it does not have.
pub fn load(kind: Kind, instructions: &[u64]) -> io::Result<OwnedFd> {
    bpf(
        BPF_PROG_LOAD,
        &Load {
            prog_type: kind.program(),
            insn_cnt: instructions.len() as u32,
            insns: instructions.as_ptr().addr() as u64,
            license: LICENSE.as_ptr().addr() as u64,
            log_level: 0,
            log_size: 0,
            log_buf: 0,
            kern_version: 0,
            prog_flags: 0,
            prog_name: *b"bulkhead\0\0\0\0\0\0\0\0",
            prog_ifindex: 0,
            expected_attach_type: kind.attached(),
        },
    )
    .map(descriptor)
}

/// Attaches a [`Kind::CgroupDevice`] program to a cgroup, beside those that are
/// attached already, for as long as there is the cgroup.
///
/// # Errors
/// What the kernel says.
pub fn attach_to_cgroup(program: BorrowedFd<'_>, cgroup: BorrowedFd<'_>) -> io::Result<()> {
    bpf(
        BPF_PROG_ATTACH,
        &Attach {
            target_fd: cgroup.as_raw_fd() as u32,
            attach_bpf_fd: program.as_raw_fd() as u32,
            attach_type: Kind::CgroupDevice.attached(),
            attach_flags: BPF_F_ALLOW_MULTI,
        },
    )
    .map(drop)
}

/// Has a [`Kind::SocketLookup`] program look up the sockets of `namespace`, for
/// as long as what is returned is open.
///
/// # Errors
/// What the kernel says.
pub fn link_to_namespace(
    program: BorrowedFd<'_>,
    namespace: BorrowedFd<'_>,
) -> io::Result<OwnedFd> {
    bpf(
        BPF_LINK_CREATE,
        &LinkCreate {
            prog_fd: program.as_raw_fd() as u32,
            target_fd: namespace.as_raw_fd() as u32,
            attach_type: Kind::SocketLookup.attached(),
            flags: 0,
        },
    )
    .map(descriptor)
}

/// A map whose entry 0 is `socket`.
///
/// # Errors
/// What the kernel says: EOPNOTSUPP of a socket that cannot be in a map.
pub fn map_of_socket(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let map = descriptor(bpf(
        BPF_MAP_CREATE,
        &MapCreate {
            map_type: BPF_MAP_TYPE_SOCKMAP,
            key_size: 4,
            value_size: 8,
            max_entries: 1,
            map_flags: 0,
        },
    )?);
    let key = 0_u32;
    let value = socket.as_raw_fd() as u64;
    let update = MapUpdate {
        map_fd: map.as_raw_fd() as u32,
        padding: 0,
        key: (&raw const key).addr() as u64,
        value: (&raw const value).addr() as u64,
        flags: 0,
    };
    bpf(BPF_MAP_UPDATE_ELEM, &update)?;
    Ok(map)
}
