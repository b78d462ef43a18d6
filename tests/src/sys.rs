// SPDX-License-Identifier: Apache-2.0
//! The few system calls that have no safe wrapper.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

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
