// SPDX-License-Identifier: Apache-2.0
//! What cannot be said without `unsafe`: starting a child that inherits a
//! descriptor, watching descriptors, attributes of mounts.

#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Child, Command},
};

use bulkhead_vmm_api::Channel;
use tokio::io::{unix::AsyncFd, Interest};

/// Lets the child die with the thread that spawns it.
pub fn die_with_parent(command: &mut Command) {
    let parent = std::process::id();
    // SAFETY: between fork and exec only system calls are made, which are
    // async-signal-safe, and nothing is allocated.
    unsafe {
        command.pre_exec(move || die_with(parent));
    }
}

/// A child's, between fork and exec: dies with its parent from here on.
fn die_with(parent: u32) -> io::Result<()> {
    // SAFETY: takes no pointers.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // The parent may have died before. Without a number it is in another
    // namespace of processes, and who has died leaves no control socket either.
    // SAFETY: takes nothing and cannot fail.
    if !matches!(unsafe { libc::getppid() }.unsigned_abs(), found if found == parent || found == 0)
    {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    Ok(())
}

/// Lets the child inherit `fd` under its number, and die with the thread that
/// spawns it. Its parent's other descriptors are close-on-exec. With
/// `own_network` it gets a network namespace, which is empty.
pub fn inherit_and_die_with_parent(command: &mut Command, fd: BorrowedFd<'_>, own_network: bool) {
    let fd = fd.as_raw_fd();
    let parent = std::process::id();
    // SAFETY: between fork and exec only system calls are made, which are
    // async-signal-safe, and nothing is allocated: the errors are errnos. The
    // descriptor's number stays open until then, for the caller spawns while
    // it still holds it.
    unsafe {
        command.pre_exec(move || {
            die_with(parent)?;
            if own_network && libc::unshare(libc::CLONE_NEWNET) != 0 {
                return Err(io::Error::last_os_error());
            }
            if libc::fcntl(fd, libc::F_SETFD, 0) != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
}

/// Starts a child in a namespace of processes of its own, whose first it is.
///
/// # Errors
/// The namespace cannot be made, or the child not started.
pub fn spawn_apart(command: &mut Command) -> io::Result<Child> {
    let ours = File::open("/proc/self/ns/pid")?;
    // The calling thread's children are born in it from here on; others' not.
    // SAFETY: takes no pointers.
    if unsafe { libc::unshare(libc::CLONE_NEWPID) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let child = command.spawn();
    // Before anything else: a thread that is born meanwhile would have to be
    // in two namespaces, which cannot be.
    // SAFETY: the descriptor is open.
    if unsafe { libc::setns(ours.as_raw_fd(), libc::CLONE_NEWPID) } != 0 {
        let error = io::Error::last_os_error();
        if let Ok(mut child) = child {
            let _ = child.kill();
            let _ = child.wait();
        }
        return Err(error);
    }
    child
}

/// A process that has ended, and that nobody has waited for; that happens when
/// this is dropped.
#[derive(Debug)]
pub struct Ended(libc::pid_t);

impl Ended {
    /// Its id, which is nobody else's as long as this is there.
    pub fn pid(&self) -> libc::pid_t {
        self.0
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        // It sends no signal, and so is a child that only __WALL finds.
        // SAFETY: no status is asked for.
        while unsafe { libc::waitpid(self.0, std::ptr::null_mut(), libc::__WALL) } < 0
            && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
        {}
    }
}

/// A process that did nothing but end, in a user namespace of its own: as long
/// as it is not waited for, that can be filled in and opened by its id.
///
/// # Errors
/// The namespace cannot be made.
pub fn ended_in_user_namespace() -> io::Result<Ended> {
    let none = 0 as libc::c_ulong;
    // SAFETY: as fork(2), in whose child nothing but the one system call is
    // made; no stack, thread id or storage is given.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone,
            libc::CLONE_NEWUSER as libc::c_ulong,
            none,
            none,
            none,
            none,
        )
    };
    match pid {
        // SAFETY: ends the process and runs nothing that it has from its parent.
        0 => unsafe { libc::_exit(0) },
        pid if pid < 0 => Err(io::Error::last_os_error()),
        pid => Ok(Ended(pid as libc::pid_t)), // process ids fit
    }
}

/// Gives a mount that is attached nowhere, and with `recursive` everything
/// below it, the ids of a user namespace (mount_setattr(2)).
///
/// # Errors
/// EINVAL: a file system cannot have that; EPERM: one has it already, or is
/// another user namespace's.
pub fn map_mount(
    mount: BorrowedFd<'_>,
    recursive: bool,
    namespace: BorrowedFd<'_>,
) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::from(namespace.as_raw_fd().unsigned_abs()),
    };
    set_attributes(mount, recursive, &attributes)
}

/// A value that owns one open descriptor and never changes which.
pub trait Owner: AsRawFd {}

impl Owner for OwnedFd {}
impl Owner for File {}
impl Owner for Channel {}

/// Watches a non-blocking descriptor; hands it back where that fails.
pub fn watch<T: Owner>(owner: T, interest: Interest) -> Result<AsyncFd<T>, (T, io::Error)> {
    // SAFETY: an `Owner` keeps its descriptor open for as long as it lives,
    // and returns the same one every time.
    let registered = unsafe { AsyncFd::register_with_interest(owner, interest) };
    registered.map_err(|error| error.into_parts())
}

/// Changes a mount, and with `recursive` everything below it, in one step
/// (mount_setattr(2)): no longer sends mounts, receives them only with
/// `receives`, and with `read_only` cannot be written through.
pub fn isolate_mount(
    mount: BorrowedFd<'_>,
    recursive: bool,
    read_only: bool,
    receives: bool,
) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: if read_only {
            libc::MOUNT_ATTR_RDONLY
        } else {
            0
        },
        attr_clr: 0,
        propagation: if receives {
            libc::MS_SLAVE
        } else {
            libc::MS_PRIVATE
        },
        userns_fd: 0,
    };
    set_attributes(mount, recursive, &attributes)
}

fn set_attributes(
    mount: BorrowedFd<'_>,
    recursive: bool,
    attributes: &libc::mount_attr,
) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a valid empty string and the structure is as long
    // as the size says; the kernel only reads both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// What events of fanotify(7) that report names call a file: the id of its
/// file system, then its handle with length and type before.
///
/// # Errors
/// Its file system has no handles.
pub fn event_name_of(file: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    #[repr(C)]
    struct Handle {
        length: u32,
        kind: i32,
        bytes: [u8; 128],
    }
    let mut handle = Handle {
        length: 128,
        kind: 0,
        bytes: [0; 128],
    };
    let mut mount = 0;
    // SAFETY: the path is a valid empty string, `handle` has as much room as
    // it says, and the kernel writes to it and to `mount` only.
    let result = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            file.as_raw_fd(),
            c"".as_ptr(),
            &raw mut handle,
            &raw mut mount as *mut libc::c_int,
            libc::AT_EMPTY_PATH,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: plain integers; zero is valid for each.
    let mut system: libc::statfs64 = unsafe { std::mem::zeroed() };
    // SAFETY: `system` is alive and of the type that is written.
    if unsafe { libc::fstatfs64(file.as_raw_fd(), &raw mut system) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: two integers, whose names the library keeps to itself.
    let id: [u8; 8] = unsafe { std::mem::transmute(system.f_fsid) };
    let length = handle.length.min(128) as usize;
    let mut name = Vec::with_capacity(16 + length);
    name.extend_from_slice(&id);
    name.extend_from_slice(&handle.length.to_ne_bytes());
    name.extend_from_slice(&handle.kind.to_ne_bytes());
    name.extend_from_slice(&handle.bytes[..length]);
    Ok(name)
}
