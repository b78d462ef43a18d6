// SPDX-License-Identifier: Apache-2.0
//! The rights of threads, and limits of the process.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use seccompiler::sock_filter;

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

/// Takes all capabilities from this thread, for good.
///
/// # Errors
/// What the kernel says.
pub fn keep_none() -> io::Result<()> {
    let mut header = Header {
        version: CAPABILITY_VERSION,
        thread: 0,
    };
    let sets = [Sets::default(); 2];
    // SAFETY: header and both sets have the kernel's layout and outlive the
    // call.
    match unsafe { libc::syscall(libc::SYS_capset, &raw mut header, sets.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes this thread, and no other, a user's: `user`, in the group with the
/// same number and no other. What root's capabilities were goes, but where
/// [`keep_capabilities`] was called. The signal that the client wants it to get
/// when he dies stays, which is not so by itself.
///
/// # Errors
/// What the kernel says.
pub fn become_user(user: u32) -> io::Result<()> {
    let user = libc::c_long::from(user);
    let group = user;
    let mut signal: libc::c_int = 0;
    // The library's functions would change all threads.
    // SAFETY: the signal's number outlives the call that writes it, a list of
    // no groups is not looked at; the other calls take no pointers.
    let done = unsafe {
        libc::prctl(libc::PR_GET_PDEATHSIG, &raw mut signal) == 0
            && libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()) == 0
            && libc::syscall(libc::SYS_setresgid, group, group, group) == 0
            && libc::syscall(libc::SYS_setresuid, user, user, user) == 0
            && (signal == 0 || libc::prctl(libc::PR_SET_PDEATHSIG, signal) == 0)
    };
    match done {
        true => Ok(()),
        false => Err(io::Error::last_os_error()),
    }
}

/// Gives the process, while it has but one thread, a user namespace in which
/// nobody is mapped.
///
/// # Errors
/// What the kernel says; ENOSPC: there are to be none
/// (`user.max_user_namespaces`).
pub fn unshare_user() -> io::Result<()> {
    // SAFETY: takes no pointers.
    match unsafe { libc::unshare(libc::CLONE_NEWUSER) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
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

/// Installs a filter of system calls for this thread, which has no new
/// privileges.
///
/// # Errors
/// What the kernel says; EACCES: it has.
pub fn set_filter(program: &[sock_filter]) -> io::Result<()> {
    let length = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog {
        len: length,
        // The library's type has the kernel's layout; nothing writes there.
        filter: program.as_ptr().cast_mut().cast(),
    };
    // SAFETY: the structure and the instructions that it tells of outlive the
    // call, which copies them.
    let done = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0 as libc::c_ulong,
            &raw const program,
        )
    };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
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

/// `struct landlock_ruleset_attr` (linux/landlock.h), as of version 6.
#[repr(C)]
struct Ruleset {
    /// What is forbidden but where a rule allows it.
    files: u64,
    network: u64,
    scope: u64,
}

/// LANDLOCK_CREATE_RULESET_VERSION.
const RULESET_VERSION: libc::c_uint = 1;
/// LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET. Not signals: some kernels take another
/// thread of this process for a stranger.
const ABSTRACT_SOCKETS: u64 = 1;
/// Binding and connecting TCP sockets.
const TCP: u64 = 3;

/// Forbids this thread, by Landlock, to open anything by its path, to change
/// anything in the file system, and TCP and abstract Unix sockets; what is open
/// stays usable. As much of it as this kernel knows; false: nothing, for it has
/// no Landlock. The process has no new privileges.
///
/// # Errors
/// What the kernel says.
pub fn forbid_paths() -> io::Result<bool> {
    // SAFETY: without a structure its size is zero, and the version is asked for.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<Ruleset>(),
            0_usize,
            RULESET_VERSION,
        )
    };
    let Some((ruleset, size)) = ruleset(version) else {
        return Ok(false);
    };
    // SAFETY: the kernel reads `size` bytes of the structure, which is as long.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            &raw const ruleset,
            size,
            0 as libc::c_uint,
        )
    };
    let fd = match libc::c_int::try_from(fd) {
        Ok(fd) if fd >= 0 => fd,
        _ => return Err(io::Error::last_os_error()),
    };
    // SAFETY: the kernel has just made it, and nobody else knows it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: takes no pointers.
    let done = unsafe {
        libc::syscall(
            libc::SYS_landlock_restrict_self,
            fd.as_raw_fd(),
            0 as libc::c_uint,
        )
    };
    match done {
        0 => Ok(true),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What a version of Landlock can forbid, and the bytes of the structure that
/// tell it; none: there is no such version.
fn ruleset(version: libc::c_long) -> Option<(Ruleset, usize)> {
    // Each version knew some more of the file system's operations: of the first
    // 13, then of refer (2), truncate (3) and device ioctls (5).
    let files = match version {
        ..=0 => return None,
        1 => 13,
        2 => 14,
        3 | 4 => 15,
        _ => 16,
    };
    let (network, size) = match version {
        ..=3 => (0, 8),
        4 | 5 => (TCP, 16),
        _ => (TCP, 24),
    };
    let ruleset = Ruleset {
        files: (1 << files) - 1,
        network,
        scope: if size == 24 { ABSTRACT_SOCKETS } else { 0 },
    };
    Some((ruleset, size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_kernels_are_asked_for_what_they_know() {
        let of = |version| ruleset(version).map(|(r, size)| (r.files, r.network, r.scope, size));
        assert_eq!(of(-1), None);
        assert_eq!(of(0), None);
        assert_eq!(of(1), Some((0x1fff, 0, 0, 8)));
        assert_eq!(of(2), Some((0x3fff, 0, 0, 8)));
        assert_eq!(of(3), Some((0x7fff, 0, 0, 8)));
        assert_eq!(of(4), Some((0x7fff, 3, 0, 16)));
        assert_eq!(of(5), Some((0xffff, 3, 0, 16)));
        assert_eq!(of(6), Some((0xffff, 3, 1, 24)));
        assert_eq!(of(60), Some((0xffff, 3, 1, 24)));
    }

    #[test]
    fn a_thread_opens_nothing_any_more_and_uses_what_is_open() {
        use std::{
            fs::File,
            io::{ErrorKind, Read},
            os::unix::net::UnixStream,
        };
        let directory = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let path = directory.as_path().join("file");
        std::fs::write(&path, "content").unwrap();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let inner = path.clone();
        let thread = std::thread::spawn(move || {
            let mut open = File::open(&inner).unwrap();
            // SAFETY: takes no pointers.
            let done = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
            assert_eq!(done, 0);
            if !forbid_paths().unwrap() {
                println!("SKIPPED: a_thread_opens_nothing_any_more: no Landlock");
                return;
            }
            let mut text = String::new();
            open.read_to_string(&mut text).unwrap();
            assert_eq!(text, "content");
            assert_eq!(ours.read(&mut [0]).unwrap(), 0);
            let denied = ErrorKind::PermissionDenied;
            assert_eq!(File::open(&inner).unwrap_err().kind(), denied);
            assert_eq!(std::fs::remove_file(&inner).unwrap_err().kind(), denied);
            assert_eq!(std::fs::read_dir("/").unwrap_err().kind(), denied);
        });
        thread.join().unwrap();
        // Others are as they were.
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "content");
    }
}
