// SPDX-License-Identifier: Apache-2.0
//! The rights of threads, and limits of the process.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// SECBIT_NO_SETUID_FIXUP (Linux's securebits.h).
const NO_SETUID_FIXUP: libc::c_int = 1 << 2;

/// Lets this thread keep its capabilities while it takes a user's identity to
/// make a file of that user's. The guest's kernel has decided that the user
/// may: of his supplementary groups and capabilities nothing is known here.
pub fn keep_capabilities() -> io::Result<()> {
    // SAFETY: neither call takes pointers; they change this thread only.
    let result = unsafe {
        match libc::prctl(libc::PR_GET_SECUREBITS) {
            bits if bits < 0 => bits,
            bits => libc::prctl(libc::PR_SET_SECUREBITS, bits | NO_SETUID_FIXUP),
        }
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Capabilities by their number (Linux's capability.h), as bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities(pub u64);

/// None at all.
pub const NO_CAPABILITIES: Capabilities = Capabilities(0);

/// What making, owning and reading files takes in whatever user's name:
/// CAP_CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETGID, SETUID,
/// MKNOD and SETFCAP.
pub const FILE_CAPABILITIES: Capabilities =
    Capabilities(1 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 27 | 1 << 31);

/// _LINUX_CAPABILITY_VERSION_3.
const CAPABILITY_VERSION: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    thread: libc::c_int,
}

/// 32 capabilities each.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Sets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Takes all capabilities but `kept` from this thread, for good; the ambient
/// ones go with them.
///
/// # Errors
/// What the kernel says.
pub fn keep_only(kept: Capabilities) -> io::Result<()> {
    // 0: the calling thread.
    let mut header = Header {
        version: CAPABILITY_VERSION,
        thread: 0,
    };
    let mut sets = [Sets::default(); 2];
    // SAFETY: header and both sets have the kernel's layout and outlive the
    // calls.
    let result = unsafe {
        match libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()) {
            0 => {
                for (half, set) in sets.iter_mut().enumerate() {
                    let kept = (kept.0 >> (32 * half)) as u32;
                    set.permitted &= kept;
                    set.effective = set.permitted;
                    set.inheritable = 0;
                }
                libc::syscall(libc::SYS_capset, &raw mut header, sets.as_ptr())
            }
            failed => failed,
        }
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Nothing that this process executes gains rights, and nothing of the guest's
/// memory is dumped.
///
/// # Errors
/// What the kernel says.
pub fn no_new_privileges_no_dumps() -> io::Result<()> {
    let none = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: neither call keeps its arguments; the limit outlives the call.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::setrlimit(libc::RLIMIT_CORE, &raw const none) == 0
    };
    if !done {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// No set-user-id bits, no device nodes, no programs.
pub const NO_PROGRAMS: u64 =
    libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;

/// Sets attributes and the propagation of a mount and all below it
/// (mount_setattr(2)).
///
/// # Errors
/// What the kernel says.
pub fn change_mount(mount: BorrowedFd<'_>, set: u64, propagation: u64) -> io::Result<()> {
    mount_setattr(mount, libc::AT_RECURSIVE, set, propagation)
}

/// Sets attributes of one mount.
///
/// # Errors
/// What the kernel says.
pub fn change_one_mount(mount: BorrowedFd<'_>, set: u64) -> io::Result<()> {
    mount_setattr(mount, 0, set, 0)
}

fn mount_setattr(
    mount: BorrowedFd<'_>,
    flags: libc::c_int,
    set: u64,
    propagation: u64,
) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: set,
        attr_clr: 0,
        propagation,
        userns_fd: 0,
    };
    // SAFETY: the path is a valid empty string and the structure is as long as
    // the size says; the kernel only reads both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Gives the process, while it has but one thread, mount, IPC and UTS
/// namespaces of its own, and with `network` an empty network.
///
/// # Errors
/// What the kernel says.
pub fn unshare_namespaces(network: bool) -> io::Result<()> {
    let network = if network { libc::CLONE_NEWNET } else { 0 };
    let flags = libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | network;
    // SAFETY: takes no pointers; descriptors stay shared among threads.
    if unsafe { libc::unshare(flags) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
