// SPDX-License-Identifier: Apache-2.0
//! Who may call what, and what for.

use super::seccomp::Worker;

/// A system call, under one of some tests.
#[derive(Debug)]
pub struct Rule {
    /// Its number.
    pub call: i64,
    /// It is allowed when one of them holds; always when there is none.
    pub tests: &'static [&'static Test],
    /// Who makes it.
    pub why: &'static str,
}

/// All of these must hold.
pub type Test = [Condition];

/// What an argument, counted from 0, must be. The lower 32 bits count.
#[derive(Debug, Clone, Copy)]
pub enum Condition {
    /// This value.
    Is(u8, u64),
    /// Of the bits of the mask, exactly these.
    Bits(u8, u64, u64),
    /// This process's id.
    OwnProcess(u8),
}

use Condition::{Bits, Is, OwnProcess};

const fn any(call: i64, why: &'static str) -> Rule {
    Rule {
        call,
        tests: &[],
        why,
    }
}

const fn tested(call: i64, tests: &'static [&'static Test], why: &'static str) -> Rule {
    Rule { call, tests, why }
}

/// All rules for a kind of thread: everybody's, and its own.
pub const fn tables(worker: Worker) -> [&'static [Rule]; 2] {
    let own = match worker {
        Worker::Control => CONTROL,
        Worker::Vcpu => VCPU,
        Worker::Devices => DEVICES,
        Worker::Files => FILES,
    };
    [EVERYBODY, own]
}

/// The same, one after the other.
pub fn rules(worker: Worker) -> impl Iterator<Item = &'static Rule> {
    tables(worker).into_iter().flatten()
}

/// One thing that is allowed: what would be missed if it were not.
#[derive(Debug, Clone, Copy)]
pub struct Allowed {
    /// The call.
    pub call: i64,
    /// What must hold; none: nothing.
    pub test: Option<&'static Test>,
    /// Who makes it.
    pub why: &'static str,
}

/// All that a kind of thread is allowed, each by itself, in the order of the
/// rules.
pub fn allowed(worker: Worker) -> impl Iterator<Item = Allowed> {
    rules(worker).flat_map(|rule| {
        let one = |test| Allowed {
            call: rule.call,
            test,
            why: rule.why,
        };
        let always = rule.tests.is_empty().then_some(None);
        let tests = rule.tests.iter().map(|test| Some(*test));
        always.into_iter().chain(tests).map(one)
    })
}

const PROT_EXEC: u64 = libc::PROT_EXEC as u64;
const ANONYMOUS: u64 = (libc::MAP_ANONYMOUS | libc::MAP_SHARED) as u64;
const FIXED: u64 = libc::MAP_FIXED as u64;

/// Locks, memory of one's own, logging, and ending.
const EVERYBODY: &[Rule] = &[
    any(libc::SYS_futex, "locks and joining"),
    any(libc::SYS_read, "eventfds"),
    any(
        libc::SYS_write,
        "eventfds; standard error; the serial port's output",
    ),
    any(libc::SYS_close, "whatever is dropped"),
    // Never executable, and of no file.
    tested(
        libc::SYS_mmap,
        &[&[
            Bits(2, PROT_EXEC, 0),
            Bits(3, ANONYMOUS, libc::MAP_ANONYMOUS as u64),
        ]],
        "allocator, signal stacks",
    ),
    any(
        libc::SYS_munmap,
        "allocator, ended threads' stacks, windows",
    ),
    any(libc::SYS_mremap, "allocator: growing large blocks"),
    any(libc::SYS_brk, "allocator"),
    tested(
        libc::SYS_madvise,
        &[&[Is(2, libc::MADV_DONTNEED as u64)]],
        "allocator: trimming; an ending thread's stack",
    ),
    any(
        libc::SYS_getrandom,
        "seeds of hash maps; the entropy device",
    ),
    any(
        libc::SYS_rt_sigprocmask,
        "starting and ending threads, abort",
    ),
    any(
        libc::SYS_rt_sigreturn,
        "the signal that takes a vCPU out of the guest",
    ),
    any(
        libc::SYS_restart_syscall,
        "waits that a stop signal interrupted",
    ),
    any(libc::SYS_sigaltstack, "starting and ending threads"),
    any(libc::SYS_clock_gettime, "clocks where the vDSO has none"),
    any(libc::SYS_getpid, "sending signals to threads, abort"),
    tested(
        libc::SYS_tgkill,
        &[&[OwnProcess(0)]],
        "taking vCPUs out of the guest, abort",
    ),
    tested(
        libc::SYS_fcntl,
        &[&[Is(1, libc::F_GETFD as u64)]],
        "unoptimised builds look at what they close",
    ),
    tested(libc::SYS_ioctl, &[&[Is(1, kvm::SIGNAL_MSI)]], "interrupts"),
    // The panic hook's event to the client.
    any(
        libc::SYS_sendmsg,
        "messages to the client, sockets of the guest",
    ),
    any(libc::SYS_exit, "a thread's end"),
    any(libc::SYS_exit_group, "the process's end"),
];

/// `_IO` and its kin of KVM's interface (linux/kvm.h), for x86_64.
mod kvm {
    pub const CHECK_EXTENSION: u64 = 0xae03;
    pub const GET_MSR_INDEX_LIST: u64 = 0xc004_ae02;
    pub const SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
    pub const GET_IRQCHIP: u64 = 0xc208_ae62;
    pub const GET_CLOCK: u64 = 0x8030_ae7c;
    pub const SIGNAL_MSI: u64 = 0x4020_aea5;
    pub const REGISTER_COALESCED_MMIO: u64 = 0x4010_ae67;
    pub const IOEVENTFD: u64 = 0x4040_ae79;
    pub const RUN: u64 = 0xae80;
    pub const KVMCLOCK_CTRL: u64 = 0xaead;
    pub const GET_REGS: u64 = 0x8090_ae81;
    pub const GET_SREGS: u64 = 0x8138_ae83;
    pub const GET_MSRS: u64 = 0xc008_ae88;
    pub const GET_LAPIC: u64 = 0x8400_ae8e;
    pub const GET_CPUID2: u64 = 0xc008_ae91;
    pub const GET_MP_STATE: u64 = 0x8004_ae98;
    pub const GET_VCPU_EVENTS: u64 = 0x8040_ae9f;
    pub const GET_DEBUGREGS: u64 = 0x8080_aea1;
    pub const GET_TSC_KHZ: u64 = 0xaea3;
    pub const GET_XSAVE: u64 = 0x9000_aea4;
    pub const GET_XSAVE2: u64 = 0x9000_aecf;
    pub const GET_XCRS: u64 = 0x8188_aea6;
}

/// TUNSETOFFLOAD and TUNSETVNETHDRSZ (linux/if_tun.h).
const TUN_SET_OFFLOAD: u64 = 0x4004_54d0;
const TUN_SET_HEADER_SIZE: u64 = 0x4004_54d8;

/// /dev/vhost-net's requests (linux/vhost.h).
mod vhost {
    pub const GET_FEATURES: u64 = 0x8008_af00;
    pub const SET_FEATURES: u64 = 0x4008_af00;
    pub const SET_OWNER: u64 = 0xaf01;
    pub const SET_MEM_TABLE: u64 = 0x4008_af03;
    pub const SET_VRING_NUM: u64 = 0x4008_af10;
    pub const SET_VRING_ADDR: u64 = 0x4028_af11;
    pub const SET_VRING_BASE: u64 = 0x4008_af12;
    pub const GET_VRING_BASE: u64 = 0xc008_af12;
    pub const SET_VRING_KICK: u64 = 0x4008_af20;
    pub const SET_VRING_CALL: u64 = 0x4008_af21;
    pub const SET_VRING_ERR: u64 = 0x4008_af22;
    pub const NET_SET_BACKEND: u64 = 0x4008_af30;
}

const CONTROL: &[Rule] = &[
    any(libc::SYS_poll, "waiting for the client"),
    any(libc::SYS_recvmsg, "the client's requests"),
    any(libc::SYS_clock_nanosleep, "stopping vCPUs"),
    tested(
        libc::SYS_ioctl,
        &[
            &[Is(1, kvm::CHECK_EXTENSION)],
            &[Is(1, kvm::GET_MSR_INDEX_LIST)],
            &[Is(1, kvm::GET_IRQCHIP)],
            &[Is(1, kvm::GET_CLOCK)],
            &[Is(1, kvm::GET_REGS)],
            &[Is(1, kvm::GET_SREGS)],
            &[Is(1, kvm::GET_MSRS)],
            &[Is(1, kvm::GET_LAPIC)],
            &[Is(1, kvm::GET_CPUID2)],
            &[Is(1, kvm::GET_MP_STATE)],
            &[Is(1, kvm::GET_VCPU_EVENTS)],
            &[Is(1, kvm::GET_DEBUGREGS)],
            &[Is(1, kvm::GET_TSC_KHZ)],
            &[Is(1, kvm::GET_XSAVE)],
            &[Is(1, kvm::GET_XSAVE2)],
            &[Is(1, kvm::GET_XCRS)],
        ],
        "saving the machine",
    ),
    any(
        libc::SYS_lseek,
        "saving: which pages there are; plugging: how large a file is",
    ),
    any(libc::SYS_ftruncate, "saving: emptying the files"),
    any(libc::SYS_pwrite64, "saving: guest memory"),
    tested(
        libc::SYS_ioctl,
        &[
            &[Is(1, kvm::SET_USER_MEMORY_REGION)],
            &[Is(1, kvm::IOEVENTFD)],
            &[Is(1, TUN_SET_OFFLOAD)],
            &[Is(1, TUN_SET_HEADER_SIZE)],
        ],
        "plugging: pmem's window, taps; unplugging: notifications",
    ),
    tested(
        libc::SYS_ioctl,
        &[
            &[Is(1, vhost::GET_FEATURES)],
            &[Is(1, vhost::SET_OWNER)],
            &[Is(1, vhost::SET_MEM_TABLE)],
            &[Is(1, vhost::GET_VRING_BASE)],
            &[Is(1, vhost::NET_SET_BACKEND)],
        ],
        "plugging: vhost-net; growing: its memory; saving: it rests",
    ),
    // Never executable, and shared with the file.
    tested(
        libc::SYS_mmap,
        &[&[
            Bits(2, PROT_EXEC, 0),
            Bits(3, ANONYMOUS, libc::MAP_SHARED as u64),
        ]],
        "plugging: pmem",
    ),
    tested(
        libc::SYS_madvise,
        &[
            &[Is(2, libc::MADV_NOHUGEPAGE as u64)],
            &[Is(2, libc::MADV_HUGEPAGE as u64)],
            &[Is(2, libc::MADV_MERGEABLE as u64)],
        ],
        "growing: new memory is backed as the rest is",
    ),
    any(libc::SYS_statx, "plugging: what a descriptor is"),
    tested(
        libc::SYS_fcntl,
        &[
            &[Is(1, libc::F_GETFL as u64)],
            &[Is(1, libc::F_SETFL as u64)],
        ],
        "plugging: taps do not block",
    ),
    tested(
        libc::SYS_fcntl,
        &[&[Is(1, libc::F_DUPFD_CLOEXEC as u64)]],
        "plugging: pmem that can be flushed",
    ),
    any(libc::SYS_epoll_ctl, "unplugging: nothing is watched"),
    any(libc::SYS_io_uring_setup, "plugging: a disk's ring"),
    any(
        libc::SYS_io_uring_register,
        "plugging: a disk's ring can do what it is for, and nothing else",
    ),
    any(
        libc::SYS_io_uring_enter,
        "saving, unplugging: what a disk is at is waited for",
    ),
];

const VCPU: &[Rule] = &[
    any(libc::SYS_gettid, "whose priority the client may set"),
    tested(
        libc::SYS_ioctl,
        &[
            &[Is(1, kvm::RUN)],
            &[Is(1, kvm::KVMCLOCK_CTRL)],
            &[Is(1, kvm::IOEVENTFD)],
            &[Is(1, kvm::REGISTER_COALESCED_MMIO)],
            &[Is(1, TUN_SET_OFFLOAD)],
        ],
        "the guest, its notifications and gathered writes, what a tap may send it",
    ),
    tested(
        libc::SYS_ioctl,
        &[
            &[Is(1, vhost::SET_FEATURES)],
            &[Is(1, vhost::SET_MEM_TABLE)],
            &[Is(1, vhost::SET_VRING_NUM)],
            &[Is(1, vhost::SET_VRING_ADDR)],
            &[Is(1, vhost::SET_VRING_BASE)],
            &[Is(1, vhost::SET_VRING_KICK)],
            &[Is(1, vhost::SET_VRING_CALL)],
            &[Is(1, vhost::SET_VRING_ERR)],
            &[Is(1, vhost::NET_SET_BACKEND)],
        ],
        "a network whose driver starts, and whose packets the kernel moves",
    ),
    tested(
        libc::SYS_eventfd2,
        &[&[Is(0, 0)]],
        "notifications that a driver uses for the first time",
    ),
    tested(
        libc::SYS_fcntl,
        &[&[Is(1, libc::F_DUPFD_CLOEXEC as u64)]],
        "a device that starts has notifications",
    ),
    any(libc::SYS_epoll_ctl, "a device that starts is watched"),
    any(
        libc::SYS_timerfd_create,
        "a vsock device, one with limits, or a directory with locks, that starts",
    ),
    any(
        libc::SYS_io_uring_enter,
        "a disk that is reset: what it is at is waited for",
    ),
];

const DEVICES: &[Rule] = &[
    any(libc::SYS_epoll_wait, "the event loop"),
    any(
        libc::SYS_epoll_pwait,
        "the event loop, with other C libraries",
    ),
    any(libc::SYS_epoll_ctl, "connections that come and go"),
    any(
        libc::SYS_timerfd_settime,
        "vsock timeouts, limits of disks and networks",
    ),
    any(libc::SYS_poll, "vsock: whether a socket is hung up"),
    any(libc::SYS_accept4, "vsock: the host's clients"),
    tested(
        libc::SYS_socket,
        &[&[
            Is(0, libc::AF_UNIX as u64),
            Bits(1, 0xf, libc::SOCK_STREAM as u64),
        ]],
        "vsock: connections of the guest",
    ),
    any(libc::SYS_connect, "vsock: connections of the guest"),
    any(libc::SYS_recvmsg, "vsock: data of the host"),
    any(libc::SYS_recvfrom, "vsock: a client's first line"),
    any(libc::SYS_shutdown, "vsock: one direction ends"),
    tested(
        libc::SYS_madvise,
        &[&[Is(2, libc::MADV_NOHUGEPAGE as u64)]],
        "balloon: memory given back by a clone",
    ),
    any(libc::SYS_readv, "net: packets from the tap"),
    tested(
        libc::SYS_ioctl,
        &[&[Is(1, vhost::NET_SET_BACKEND)]],
        "net: the kernel moves packets again, or none any more",
    ),
    any(libc::SYS_writev, "net: packets to the tap"),
    any(libc::SYS_pread64, "blk: reading"),
    any(libc::SYS_pwrite64, "blk: writing"),
    any(libc::SYS_fdatasync, "blk and pmem: flushing"),
    any(libc::SYS_fallocate, "blk: discarding and zeroing"),
    any(libc::SYS_io_uring_enter, "blk: all but these, by a ring"),
];

const FILES: &[Rule] = &[
    any(libc::SYS_epoll_wait, "the event loop"),
    any(
        libc::SYS_epoll_pwait,
        "the event loop, with other C libraries",
    ),
    // By descriptor and name; there is nothing else below this process's root.
    any(libc::SYS_openat, "lookup, open, create"),
    any(libc::SYS_statx, "attributes"),
    any(libc::SYS_fstatfs, "statfs"),
    any(libc::SYS_readlinkat, "readlink"),
    any(libc::SYS_getdents64, "readdir"),
    any(libc::SYS_lseek, "readdir, lseek"),
    any(libc::SYS_mkdirat, "mkdir"),
    any(libc::SYS_mknodat, "mknod"),
    any(libc::SYS_symlinkat, "symlink"),
    any(libc::SYS_linkat, "link"),
    any(libc::SYS_unlinkat, "unlink, rmdir"),
    any(libc::SYS_renameat2, "rename"),
    any(libc::SYS_fchmodat, "setattr"),
    any(libc::SYS_fchownat, "setattr"),
    any(libc::SYS_ftruncate, "setattr"),
    any(libc::SYS_utimensat, "setattr"),
    any(libc::SYS_setxattr, "setxattr"),
    any(libc::SYS_getxattr, "getxattr"),
    any(libc::SYS_listxattr, "listxattr"),
    any(libc::SYS_removexattr, "removexattr"),
    any(libc::SYS_preadv, "read"),
    any(libc::SYS_pwritev, "write"),
    any(libc::SYS_fallocate, "fallocate"),
    any(libc::SYS_fsync, "fsync"),
    any(libc::SYS_fdatasync, "fsync"),
    any(libc::SYS_dup, "flush"),
    tested(
        libc::SYS_fcntl,
        &[&[Is(1, libc::F_SETFL as u64)]],
        "read and write, when the guest changed an open file's flags",
    ),
    tested(
        libc::SYS_fcntl,
        &[
            &[Is(1, libc::F_DUPFD_CLOEXEC as u64)],
            &[Is(1, libc::F_OFD_GETLK as u64)],
            &[Is(1, libc::F_OFD_SETLK as u64)],
        ],
        "readdir, getlk, setlk",
    ),
    any(libc::SYS_flock, "setlk of a whole file"),
    any(libc::SYS_timerfd_settime, "setlkw: trying again"),
    // Never executable, shared with the file, and where it is said to be.
    tested(
        libc::SYS_mmap,
        &[&[
            Bits(2, PROT_EXEC, 0),
            Bits(3, ANONYMOUS | FIXED, libc::MAP_SHARED as u64 | FIXED),
        ]],
        "setupmapping: the DAX window",
    ),
    any(libc::SYS_umask, "a session after the first"),
    // Only the effective id, for as long as it takes to make a file.
    tested(
        libc::SYS_setresuid,
        &[&[Is(0, KEEP), Is(2, KEEP)]],
        "files are made by their owner",
    ),
    tested(
        libc::SYS_setresgid,
        &[&[Is(0, KEEP), Is(2, KEEP)]],
        "files are made by their owner",
    ),
    any(libc::SYS_capget, "clearing set-user-id bits"),
    any(libc::SYS_capset, "clearing set-user-id bits"),
];

/// An id that setresuid and its kin leave as it is: -1.
const KEEP: u64 = u32::MAX as u64;
