// SPDX-License-Identifier: Apache-2.0
//! The few system calls that have no safe wrapper.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Makes a tap for a VMM, in this thread's network namespace; it is gone when
/// its descriptor is.
///
/// # Errors
/// The kernel's; a name that is too long.
pub fn open_tap(name: &str) -> io::Result<OwnedFd> {
    open_tap_as(name, 0)
}

/// As [`open_tap`], with several queues.
///
/// # Errors
/// As there.
pub fn open_tap_queues(name: &str, count: usize) -> io::Result<Vec<OwnedFd>> {
    let queues = (0..count).map(|_| open_tap_as(name, libc::IFF_MULTI_QUEUE));
    queues.collect()
}

fn open_tap_as(name: &str, more: libc::c_int) -> io::Result<OwnedFd> {
    let tap = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // SAFETY: plain data, of which all zeroes are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | more) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which `request` is.
    match unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } {
        0 => Ok(tap.into()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The processor's time-stamp counter.
pub fn time_stamp_counter() -> u64 {
    // SAFETY: RDTSC reads a register; Linux lets every program use it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// Makes the command die with the thread that starts it, and lets it inherit
/// the descriptors `keep` under their own numbers.
///
/// The thread must outlive the command: the kernel counts the end of the
/// thread that forked, not that of the process.
pub fn tie_to_this_thread(command: &mut Command, keep: Vec<RawFd>) {
    let parent = std::process::id() as libc::pid_t;
    let prepare = move || {
        // SAFETY: prctl, getppid and fcntl are async-signal-safe and take no
        // pointers here.
        unsafe {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            // The parent may have died before the line above.
            if libc::getppid() != parent {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            for fd in &keep {
                if libc::fcntl(*fd, libc::F_SETFD, 0) != 0 {
                    return Err(io::Error::last_os_error());
                }
            }
        }
        Ok(())
    };
    // SAFETY: `prepare` calls async-signal-safe functions only and does not
    // allocate: io::Error from an errno or a kind is a plain value.
    unsafe { command.pre_exec(prepare) };
}

/// Gives the command a session of its own, enters the cgroup whose open
/// `cgroup.procs` is given, and with `tty` makes its standard input the
/// controlling terminal.
pub fn own_session(command: &mut Command, cgroup_procs: Option<File>, tty: bool) {
    let prepare = move || {
        // SAFETY: async-signal-safe calls; the only pointer is to a literal.
        unsafe {
            if libc::setsid() < 0 {
                return Err(io::Error::last_os_error());
            }
            if tty && libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                return Err(io::Error::last_os_error());
            }
            if let Some(procs) = &cgroup_procs {
                if libc::write(procs.as_raw_fd(), c"0".as_ptr().cast(), 1) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
        }
        Ok(())
    };
    // SAFETY: as in `tie_to_this_thread`; `File` is only borrowed.
    unsafe { command.pre_exec(prepare) };
}

/// Makes the command's standard input its controlling terminal, in a session
/// of its own.
pub fn in_terminal(command: &mut Command) {
    own_session(command, None, true);
}

/// Inserts a kernel module with its parameters.
///
/// # Errors
/// The kernel's; `AlreadyExists` when it is in.
pub fn insert_module(file: &File, params: &CStr) -> io::Result<()> {
    // SAFETY: the descriptor is open and the string ends with a NUL.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_finit_module,
            file.as_raw_fd(),
            params.as_ptr(),
            0 as libc::c_int,
        )
    };
    if rc == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Sets a terminal's size in rows and columns.
///
/// # Errors
/// The kernel's, such as `ENOTTY`.
pub fn set_window_size(fd: BorrowedFd<'_>, rows: u16, cols: u16) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads one winsize, which `size` is.
    match unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSWINSZ, &size) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The size of a terminal in rows and columns; `None` when it is none.
pub fn window_size(fd: BorrowedFd<'_>) -> Option<(u16, u16)> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCGWINSZ writes one winsize, which `size` has room for.
    let rc = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ, &mut size) };
    (rc == 0).then_some((size.ws_row, size.ws_col))
}

/// Brings the loopback interface up.
///
/// # Errors
/// The kernel's.
pub fn loopback_up() -> io::Result<()> {
    // SAFETY: plain system calls; `request` is zeroed, holds a terminated name
    // and lives over both of them. Reading the union's flags is what
    // SIOCGIFFLAGS fills in.
    unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[0] = b'l' as libc::c_char;
        request.ifr_name[1] = b'o' as libc::c_char;
        let mut rc = libc::ioctl(socket, libc::SIOCGIFFLAGS, &mut request);
        if rc == 0 {
            request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short;
            rc = libc::ioctl(socket, libc::SIOCSIFFLAGS, &request);
        }
        let result = match rc {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        };
        libc::close(socket);
        result
    }
}

/// Memory of this process that KSM may merge.
#[derive(Debug)]
pub struct Mergeable {
    address: *mut libc::c_void,
    length: usize,
}

impl Mergeable {
    /// As many pages of 4 KiB, all with the same bytes in them.
    ///
    /// # Errors
    /// The kernel's; `EINVAL` when it has no KSM.
    pub fn new(pages: usize) -> io::Result<Self> {
        let length = pages * 4096;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = Self { address, length };
        for advice in [libc::MADV_NOHUGEPAGE, libc::MADV_MERGEABLE] {
            // SAFETY: of this mapping alone; neither changes its contents.
            if unsafe { libc::madvise(address, length, advice) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        // SAFETY: the mapping is that long and writable, and nobody else has
        // its address.
        unsafe { address.cast::<u8>().write_bytes(0xb5, length) };
        Ok(memory)
    }
}

impl Drop for Mergeable {
    fn drop(&mut self) {
        // SAFETY: the whole of a mapping that nothing points into.
        unsafe { libc::munmap(self.address, self.length) };
    }
}

/// Resets the machine; with QEMU's `-no-reboot` this ends it.
pub fn reset() -> ! {
    // SAFETY: plain calls; in a box there is nothing to flush.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_AUTOBOOT);
    }
    std::process::exit(1)
}

/// Creates a virtual machine on an open `/dev/kvm` and returns the API
/// version, which proves that KVM works here.
///
/// # Errors
/// The kernel's.
pub fn kvm_create_vm(kvm: &File) -> io::Result<i32> {
    const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;
    const KVM_CREATE_VM: libc::c_ulong = 0xae01;
    // SAFETY: both ioctls take an integer; the second returns a descriptor
    // that nobody else has.
    unsafe {
        let version = libc::ioctl(kvm.as_raw_fd(), KVM_GET_API_VERSION as _, 0);
        let vm = libc::ioctl(kvm.as_raw_fd(), KVM_CREATE_VM as _, 0);
        if version < 0 || vm < 0 {
            return Err(io::Error::last_os_error());
        }
        libc::close(vm);
        Ok(version)
    }
}

/// Receives a message with a descriptor: the bytes, and the descriptor.
///
/// # Errors
/// Those of recvmsg(2), or that none came.
pub fn receive_descriptor(stream: &UnixStream) -> io::Result<(Vec<u8>, OwnedFd)> {
    let mut bytes = vec![0u8; 16 * 1024];
    let mut control = [0u64; 8];
    // SAFETY: every pointer is to a live buffer of the length that is given;
    // the one descriptor that there is room for is taken once.
    let (count, fd) = unsafe {
        let mut iov = libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        };
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &mut iov;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(size_of::<RawFd>() as u32) as usize;
        let count = libc::recvmsg(stream.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC);
        if count < 0 {
            return Err(io::Error::last_os_error());
        }
        let header = libc::CMSG_FIRSTHDR(&message);
        if header.is_null() || (*header).cmsg_type != libc::SCM_RIGHTS {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let fd = std::ptr::read_unaligned(libc::CMSG_DATA(header).cast::<RawFd>());
        (count as usize, OwnedFd::from_raw_fd(fd))
    };
    bytes.truncate(count);
    Ok((bytes, fd))
}

/// Waits for a call that a seccomp filter's listener is asked about, and
/// refuses it (seccomp_unotify(2)). Gives the call's number.
///
/// # Errors
/// Those of the two ioctls; ENOENT also when the caller has ended.
pub fn refuse_call(filter: &OwnedFd, errno: i32) -> io::Result<i32> {
    // _IOWR('!', 0, struct seccomp_notif) and _IOWR('!', 1, struct seccomp_notif_resp).
    const RECEIVE: libc::c_ulong = 0xc050_2100;
    const SEND: libc::c_ulong = 0xc018_2101;
    // SAFETY: both structures are plain integers, zero at first as the kernel
    // wants them, and alive.
    unsafe {
        let mut asked: libc::seccomp_notif = std::mem::zeroed();
        if libc::ioctl(filter.as_raw_fd(), RECEIVE, &mut asked) != 0 {
            return Err(io::Error::last_os_error());
        }
        let mut answer: libc::seccomp_notif_resp = std::mem::zeroed();
        answer.id = asked.id;
        answer.error = -errno;
        if libc::ioctl(filter.as_raw_fd(), SEND, &mut answer) != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(asked.data.nr)
    }
}
