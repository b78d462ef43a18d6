// SPDX-License-Identifier: Apache-2.0
//! Processes: clone3, pidfds, waiting, capabilities, prctl.

use std::convert::Infallible;
use std::ffi::CString;
use std::mem::{size_of, zeroed, MaybeUninit};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::ptr;

use libc::{c_int, c_long, c_ulong, pid_t};
use nix::errno::Errno;

/// clone3: `cgroup` is a descriptor of the group to start in.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
/// What a child that lost its way exits with.
const EXIT_LOST: c_int = 70;

/// clone3: signals that are handled have their default action in the child.
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;

/// Starts a child with `flags` (CLONE_NEW*) in `cgroup` that runs `body`, which
/// does not return. No signal is handled in it; those that are ignored stay so. Gives the child's pid and pidfd.
///
/// The agent has one thread and never starts another (no `spawn_blocking`, no
/// `std::thread`), so the child finds the heap and all locks in order and may
/// run ordinary Rust.
///
/// # Errors
/// clone3(2)'s. EBUSY: `cgroup` hands controllers to children of its own.
pub fn spawn(
    flags: c_int,
    cgroup: Option<BorrowedFd<'_>>,
    body: impl FnOnce() -> Infallible,
) -> nix::Result<(pid_t, OwnedFd)> {
    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is plain integers; zero is valid for each.
    let mut args: libc::clone_args = unsafe { zeroed() };
    args.flags = flags as u64 | libc::CLONE_PIDFD as u64 | CLONE_CLEAR_SIGHAND;
    args.exit_signal = libc::SIGCHLD as u64;
    args.pidfd = ptr::addr_of_mut!(pidfd) as u64;
    if let Some(fd) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = fd.as_raw_fd() as u64;
    }
    // SAFETY: no CLONE_VM and no new stack, so this behaves as fork(2) does;
    // `args` and `pidfd` outlive the call. See above for why the child may go
    // on running Rust.
    let pid = Errno::result(unsafe {
        libc::syscall(
            libc::SYS_clone3,
            ptr::addr_of_mut!(args),
            size_of::<libc::clone_args>(),
        )
    })?;
    if pid == 0 {
        // A panic must not unwind into the parent's frames, of which this
        // process has a copy.
        let _ = catch_unwind(AssertUnwindSafe(body));
        exit_now(EXIT_LOST);
    }
    // SAFETY: the kernel stored a new descriptor, which nobody else owns.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok((pid as pid_t, pidfd))
}

/// Starts a child as fork(2) does, for who may not use clone3: a seccomp
/// profile is in force. The same holds as for [`spawn`].
pub fn fork(body: impl FnOnce() -> Infallible) -> nix::Result<pid_t> {
    // SAFETY: this process has one thread, so the child may go on running Rust.
    let pid = Errno::result(unsafe { libc::fork() })?;
    if pid == 0 {
        // As in `spawn`.
        let _ = catch_unwind(AssertUnwindSafe(body));
        exit_now(EXIT_LOST);
    }
    Ok(pid)
}

/// Ends the process without running exit handlers or flushing buffers, which
/// are copies of the parent's.
pub fn exit_now(code: c_int) -> ! {
    // SAFETY: _exit(2) has no preconditions.
    unsafe { libc::_exit(code) }
}

/// Sends `signal` to the process of `pidfd`. ESRCH when it has ended.
pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: c_int) -> nix::Result<()> {
    // SAFETY: no pointer but the null siginfo, which the kernel fills itself.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            ptr::null::<libc::siginfo_t>(),
            0,
        )
    })
    .map(drop)
}

/// Joins the namespaces `flags` of the process or namespace file `fd`.
pub fn setns(fd: BorrowedFd<'_>, flags: c_int) -> nix::Result<()> {
    // SAFETY: setns(2) takes no pointers.
    Errno::result(unsafe { libc::setns(fd.as_raw_fd(), flags) }).map(drop)
}

/// How a child ended: its exit code, or 128 plus the signal that ended it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The child.
    pub pid: pid_t,
    /// Exit code, or 128 plus the signal's number.
    pub status: u32,
}

/// Reaps one child that has ended, if there is one.
pub fn reap_one() -> nix::Result<Option<Ended>> {
    let mut status: c_int = 0;
    loop {
        // SAFETY: `status` is a valid place for the kernel to write to.
        let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG | libc::__WALL) };
        match Errno::result(pid) {
            Ok(0) | Err(Errno::ECHILD) => return Ok(None),
            Ok(pid) if libc::WIFEXITED(status) => {
                let status = libc::WEXITSTATUS(status) as u32;
                return Ok(Some(Ended { pid, status }));
            }
            Ok(pid) if libc::WIFSIGNALED(status) => {
                let status = 128 + libc::WTERMSIG(status) as u32;
                return Ok(Some(Ended { pid, status }));
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// prctl(2) with up to one argument.
pub fn prctl(option: c_int, argument: c_ulong) -> nix::Result<c_int> {
    // SAFETY: callers pass options whose arguments are integers.
    Errno::result(unsafe {
        libc::prctl(option, argument, 0 as c_ulong, 0 as c_ulong, 0 as c_ulong)
    })
}

/// PR_CAP_AMBIENT with an operation and a capability.
pub fn prctl_ambient(operation: c_int, capability: c_ulong) -> nix::Result<()> {
    // SAFETY: the option takes integers only.
    Errno::result(unsafe {
        libc::prctl(
            libc::PR_CAP_AMBIENT,
            operation as c_ulong,
            capability,
            0 as c_ulong,
            0 as c_ulong,
        )
    })
    .map(drop)
}

/// _LINUX_CAPABILITY_VERSION_3.
const VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Capability sets as bit masks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CapSets {
    /// Effective set.
    pub effective: u64,
    /// Permitted set.
    pub permitted: u64,
    /// Inheritable set.
    pub inheritable: u64,
}

/// Sets the calling thread's three classic capability sets.
pub fn capset(sets: CapSets) -> nix::Result<()> {
    let header = CapHeader {
        version: VERSION_3,
        pid: 0,
    };
    let half = |shift: u32| CapData {
        effective: (sets.effective >> shift) as u32,
        permitted: (sets.permitted >> shift) as u32,
        inheritable: (sets.inheritable >> shift) as u32,
    };
    let data = [half(0), half(32)];
    // SAFETY: version 3 takes one header and two data records, both alive.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, &header, data.as_ptr()) }).map(drop)
}

/// The calling thread's permitted set.
pub fn permitted_capabilities() -> nix::Result<u64> {
    let header = CapHeader {
        version: VERSION_3,
        pid: 0,
    };
    let mut data = [CapData::default(); 2];
    // SAFETY: version 3 takes one header and has room for two data records.
    Errno::result(unsafe { libc::syscall(libc::SYS_capget, &header, data.as_mut_ptr()) })?;
    Ok(u64::from(data[0].permitted) | u64::from(data[1].permitted) << 32)
}

/// Gives the process a session keyring of its own.
pub fn new_session_keyring() -> nix::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: c_int = 1;
    // SAFETY: a null name asks for an anonymous keyring.
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            KEYCTL_JOIN_SESSION_KEYRING,
            ptr::null::<libc::c_char>(),
        )
    })
    .map(drop)
}

/// Puts every signal but SIGPIPE, which Rust ignores, and those the kernel keeps
/// back to its default action, whatever this process was started with.
pub fn ignore_no_signals() {
    (1..=64)
        .filter(|signal| *signal != libc::SIGPIPE)
        .for_each(set_default_action);
}

fn set_default_action(signal: c_int) {
    // SAFETY: SIG_DFL is valid for every signal; the kernel refuses those it
    // keeps for itself.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigaction,
            signal as c_long,
            &KernelSigaction::default(),
            ptr::null::<KernelSigaction>(),
            8 as c_long,
        );
    }
}

/// Puts every signal back to its default action in a child of [`spawn`] after
/// [`ignore_no_signals`], and unblocks all of them.
pub fn reset_signals() {
    set_default_action(libc::SIGPIPE);
    // SAFETY: the set is initialised before use.
    unsafe {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, set.as_ptr(), ptr::null_mut());
    }
}

/// rt_sigaction's own layout: libc's refuses the real-time signals that it
/// keeps for itself.
#[repr(C)]
#[derive(Default)]
struct KernelSigaction {
    handler: usize,
    flags: c_ulong,
    restorer: usize,
    mask: u64,
}

/// Replaces the process. Returns only when that failed.
pub fn execve(path: &CString, args: &[CString], env: &[CString]) -> Errno {
    let list = |strings: &[CString]| {
        let mut list: Vec<_> = strings.iter().map(|s| s.as_ptr()).collect();
        list.push(ptr::null());
        list
    };
    let (argv, envp) = (list(args), list(env));
    // SAFETY: both lists are null-terminated and point to live C strings.
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    Errno::last()
}

/// setgroups(2) for this thread, which is the only one.
pub fn setgroups(groups: &[u32]) -> nix::Result<()> {
    // SAFETY: the pointer and the count describe one live slice.
    Errno::result(unsafe { libc::setgroups(groups.len(), groups.as_ptr()) }).map(drop)
}

/// Sets a resource limit of a process; 0: the calling one.
pub fn setrlimit(pid: pid_t, resource: c_int, soft: u64, hard: u64) -> nix::Result<()> {
    let limit = libc::rlimit64 {
        rlim_cur: soft,
        rlim_max: hard,
    };
    // SAFETY: `limit` is alive; a null old limit is allowed.
    Errno::result(unsafe {
        libc::prlimit64(
            pid,
            resource as libc::__rlimit_resource_t,
            &limit,
            ptr::null_mut(),
        )
    })
    .map(drop)
}

/// sched_setattr(2)'s argument, version 0.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SchedAttr {
    /// Size of this structure.
    pub size: u32,
    /// SCHED_*.
    pub policy: u32,
    /// SCHED_FLAG_*.
    pub flags: u64,
    /// Nice value for SCHED_OTHER and SCHED_BATCH.
    pub nice: i32,
    /// Priority for SCHED_FIFO and SCHED_RR.
    pub priority: u32,
    /// SCHED_DEADLINE, nanoseconds.
    pub runtime: u64,
    /// SCHED_DEADLINE, nanoseconds.
    pub deadline: u64,
    /// SCHED_DEADLINE, nanoseconds.
    pub period: u64,
}

/// Sets a thread's scheduling policy; 0: the calling one's.
pub fn sched_setattr(pid: pid_t, mut attr: SchedAttr) -> nix::Result<()> {
    attr.size = size_of::<SchedAttr>() as u32;
    // SAFETY: `attr` is alive and its size is in it.
    Errno::result(unsafe { libc::syscall(libc::SYS_sched_setattr, pid, &attr, 0) }).map(drop)
}

/// Sets a thread's I/O priority (class and data as ioprio_set(2) packs them);
/// 0: the calling one's.
pub fn ioprio_set(pid: pid_t, value: u32) -> nix::Result<()> {
    const IOPRIO_WHO_PROCESS: c_int = 1;
    // SAFETY: integers only.
    Errno::result(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, pid, value) })
        .map(drop)
}

/// Sets the execution domain.
pub fn personality(persona: c_ulong) -> nix::Result<()> {
    // SAFETY: integers only.
    Errno::result(unsafe { libc::personality(persona) }).map(drop)
}

/// Installs a seccomp filter on the calling thread. `listened`: the flags ask
/// for a descriptor by which somebody else decides, which is given.
pub fn seccomp_filter(
    flags: c_ulong,
    program: &[libc::sock_filter],
    listened: bool,
) -> nix::Result<Option<OwnedFd>> {
    const SECCOMP_SET_MODE_FILTER: c_ulong = 1;
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(|_| Errno::E2BIG)?,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the program outlives the call; the kernel copies it.
    let fd = Errno::result(unsafe {
        libc::syscall(libc::SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program)
    })?;
    // SAFETY: with that flag the answer is a new descriptor, which nobody else
    // owns.
    Ok(listened.then(|| unsafe { OwnedFd::from_raw_fd(fd as RawFd) }))
}

/// A copy of the descriptor `number` of the process of `pidfd`.
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, number: RawFd) -> nix::Result<OwnedFd> {
    // SAFETY: integers only.
    let fd = Errno::result(unsafe {
        libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0)
    })?;
    // SAFETY: a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}
