// SPDX-License-Identifier: Apache-2.0
//! The filters of the VMM's threads, installed in processes made for it.

use std::collections::BTreeSet;

use bulkhead_vmm::confine::{
    rules::rules,
    seccomp::{program, Worker},
};
use seccompiler::{apply_filter, BpfProgram, SeccompAction};

/// Above the last call that any kernel knows yet.
const LAST_CALL: i64 = 500;

/// uretprobe and uprobe, which newer kernels put into programs by themselves and
/// let pass all filters; made otherwise, they fail or kill (SIGILL).
const PROBES: [i64; 2] = [335, 336];

/// How a process ends that has the filter and makes the call: the signal, or
/// none.
fn outcome(filter: &BpfProgram, call: i64, arguments: [u64; 6]) -> Option<i32> {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: the child makes system calls only, whose arguments point nowhere,
    // and ends without running anything of the parent's.
    let child = unsafe {
        match libc::fork() {
            0 => {
                let installed = apply_filter(filter).is_ok();
                if installed {
                    libc::syscall(call, a, b, c, d, e, f);
                }
                libc::_exit(i32::from(!installed));
            }
            child => child,
        }
    };
    assert!(child > 0, "no process can be made");
    let mut status = 0;
    // SAFETY: the status outlives the call.
    let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!(waited, child);
    if libc::WIFSIGNALED(status) {
        return Some(libc::WTERMSIG(status));
    }
    assert_eq!(libc::WEXITSTATUS(status), 0, "the filter is not installed");
    None
}

fn filter(worker: Worker) -> BpfProgram {
    program(worker, SeccompAction::KillProcess)
}

#[track_caller]
fn assert_kills(workers: &[Worker], call: i64, arguments: [u64; 6]) {
    for worker in workers {
        let signal = outcome(&filter(*worker), call, arguments);
        assert_eq!(
            signal,
            Some(libc::SIGSYS),
            "{worker:?}: {call} {arguments:x?}"
        );
    }
}

#[track_caller]
fn assert_allows(workers: &[Worker], call: i64, arguments: [u64; 6]) {
    for worker in workers {
        let signal = outcome(&filter(*worker), call, arguments);
        assert_eq!(signal, None, "{worker:?}: {call} {arguments:x?}");
    }
}

#[test]
fn every_call_without_a_rule_kills() {
    for worker in Worker::ALL {
        let filter = filter(worker);
        let allowed: BTreeSet<i64> = rules(worker).map(|rule| rule.call).collect();
        for call in (0..LAST_CALL).filter(|call| !allowed.contains(call)) {
            let signal = outcome(&filter, call, [0; 6]);
            let killed = signal == Some(libc::SIGSYS);
            assert!(
                killed || PROBES.contains(&call),
                "{worker:?}: call {call}: {signal:?}"
            );
        }
    }
}

#[test]
fn no_thread_can_do_what_an_intruder_would_want() {
    let never = [
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_clone,
        libc::SYS_clone3,
        libc::SYS_fork,
        libc::SYS_vfork,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_kill,
        libc::SYS_pidfd_open,
        libc::SYS_pidfd_getfd,
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_pivot_root,
        libc::SYS_open_tree,
        libc::SYS_move_mount,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_chroot,
        libc::SYS_open,
        libc::SYS_openat2,
        libc::SYS_open_by_handle_at,
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_userfaultfd,
        libc::SYS_keyctl,
        libc::SYS_init_module,
        libc::SYS_prctl,
        libc::SYS_seccomp,
        libc::SYS_memfd_create,
        libc::SYS_shmat,
        libc::SYS_listen,
        libc::SYS_bind,
    ];
    for worker in Worker::ALL {
        let allowed: BTreeSet<i64> = rules(worker).map(|rule| rule.call).collect();
        for call in never {
            assert!(!allowed.contains(&call), "{worker:?}: {call}");
        }
        assert_eq!(worker == Worker::Files, allowed.contains(&libc::SYS_openat));
        let rings = [libc::SYS_io_uring_setup, libc::SYS_io_uring_register];
        for call in rings {
            assert_eq!(worker == Worker::Control, allowed.contains(&call));
        }
    }
}

#[test]
fn memory_never_becomes_executable() {
    let (read, exec) = (libc::PROT_READ as u64, libc::PROT_EXEC as u64);
    let anonymous = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    let none = u64::MAX;
    let map = |protection, flags| [0, 4096, protection, flags, none, 0];
    let all = &Worker::ALL;
    assert_allows(all, libc::SYS_mmap, map(read, anonymous));
    assert_kills(all, libc::SYS_mmap, map(read | exec, anonymous));
    // Of no file, and shared with nobody; but for who plugs persistent memory, and
    // who puts files into a window.
    assert_kills(all, libc::SYS_mmap, map(read, libc::MAP_PRIVATE as u64));
    let file = libc::MAP_SHARED as u64;
    let others = [Worker::Vcpu, Worker::Devices, Worker::Files];
    assert_allows(&[Worker::Control], libc::SYS_mmap, map(read, file));
    assert_kills(&others, libc::SYS_mmap, map(read, file));
    let window = (libc::MAP_SHARED | libc::MAP_FIXED) as u64;
    let others = [Worker::Vcpu, Worker::Devices];
    assert_allows(&[Worker::Files], libc::SYS_mmap, map(read, window));
    assert_kills(&others, libc::SYS_mmap, map(read, window));
    assert_kills(all, libc::SYS_mmap, map(read | exec, window));
    assert_kills(all, libc::SYS_mmap, map(read | exec, file));
    let shared = (libc::MAP_SHARED | libc::MAP_ANONYMOUS) as u64;
    assert_kills(all, libc::SYS_mmap, map(read, shared));
    assert_kills(all, libc::SYS_mprotect, [0, 0, exec, 0, 0, 0]);
    let advice = |advice: i32| [0, 0, advice as u64, 0, 0, 0];
    assert_allows(all, libc::SYS_madvise, advice(libc::MADV_DONTNEED));
    assert_kills(all, libc::SYS_madvise, advice(libc::MADV_DONTFORK));
}

#[test]
fn signals_go_to_the_own_process_only() {
    // The filter was made for this process, and the call is another's.
    let me = u64::from(std::process::id());
    assert_allows(&Worker::ALL, libc::SYS_tgkill, [me, 0, 0, 0, 0, 0]);
    assert_kills(&Worker::ALL, libc::SYS_tgkill, [1, 1, 0, 0, 0, 0]);
    assert_kills(&Worker::ALL, libc::SYS_tkill, [me, 0, 0, 0, 0, 0]);
}

#[test]
fn devices_are_controlled_as_far_as_needed() {
    const KVM_RUN: u64 = 0xae80;
    const KVM_GET_REGS: u64 = 0x8090_ae81;
    const KVM_CREATE_VM: u64 = 0xae01;
    const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
    const TIOCSTI: u64 = 0x5412;
    let number = |number| [u64::MAX, number, 0, 0, 0, 0];
    let ioctl = libc::SYS_ioctl;
    assert_allows(&[Worker::Vcpu], ioctl, number(KVM_RUN));
    assert_allows(&[Worker::Control], ioctl, number(KVM_GET_REGS));
    assert_kills(&[Worker::Control], ioctl, number(KVM_RUN));
    assert_kills(&[Worker::Vcpu], ioctl, number(KVM_GET_REGS));
    for other in [KVM_CREATE_VM, TIOCSTI] {
        assert_kills(&Worker::ALL, ioctl, number(other));
    }
    // Only who plugs devices changes what the guest's memory is.
    let memory = number(KVM_SET_USER_MEMORY_REGION);
    assert_allows(&[Worker::Control], ioctl, memory);
    let others = [Worker::Vcpu, Worker::Devices, Worker::Files];
    assert_kills(&others, ioctl, memory);
    // A number is 32 bits wide to the kernel, whatever stands above them.
    let wide = KVM_RUN | 1 << 32;
    assert_allows(&[Worker::Vcpu], ioctl, number(wide));
}

#[test]
fn who_moves_packets_is_told_by_those_who_must() {
    const SET_OWNER: u64 = 0xaf01;
    const SET_MEM_TABLE: u64 = 0x4008_af03;
    const SET_LOG_BASE: u64 = 0x4008_af04;
    const SET_VRING_ADDR: u64 = 0x4028_af11;
    const NET_SET_BACKEND: u64 = 0x4008_af30;
    let number = |number| [u64::MAX, number, 0, 0, 0, 0];
    let ioctl = libc::SYS_ioctl;
    let (control, vcpu, devices) = (Worker::Control, Worker::Vcpu, Worker::Devices);
    // Whose memory it is, is settled before any driver starts; where in it a ring
    // is, when it does.
    assert_allows(&[control], ioctl, number(SET_OWNER));
    assert_kills(&[vcpu, devices], ioctl, number(SET_OWNER));
    assert_allows(&[vcpu], ioctl, number(SET_VRING_ADDR));
    assert_kills(&[control, devices], ioctl, number(SET_VRING_ADDR));
    assert_allows(&[control, vcpu], ioctl, number(SET_MEM_TABLE));
    assert_kills(&[devices], ioctl, number(SET_MEM_TABLE));
    assert_allows(&[control, vcpu, devices], ioctl, number(NET_SET_BACKEND));
    assert_kills(&Worker::ALL, ioctl, number(SET_LOG_BASE));
    assert_kills(&[Worker::Files], ioctl, number(NET_SET_BACKEND));
}

#[test]
fn sockets_are_local_streams() {
    let socket = |family: i32, kind: i32| [family as u64, kind as u64, 0, 0, 0, 0];
    let call = libc::SYS_socket;
    let stream = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    assert_allows(&[Worker::Devices], call, socket(libc::AF_UNIX, stream));
    assert_kills(
        &[Worker::Devices],
        call,
        socket(libc::AF_UNIX, libc::SOCK_DGRAM),
    );
    for family in [
        libc::AF_INET,
        libc::AF_INET6,
        libc::AF_NETLINK,
        libc::AF_VSOCK,
    ] {
        assert_kills(&Worker::ALL, call, socket(family, stream));
    }
    for worker in [Worker::Control, Worker::Vcpu, Worker::Files] {
        assert_kills(&[worker], call, socket(libc::AF_UNIX, stream));
    }
}

#[test]
fn only_the_effective_user_changes_and_only_where_files_are_served() {
    const KEEP: u64 = u32::MAX as u64;
    for call in [libc::SYS_setresuid, libc::SYS_setresgid] {
        assert_allows(&[Worker::Files], call, [KEEP, KEEP, KEEP, 0, 0, 0]);
        assert_kills(&[Worker::Files], call, [0, 0, KEEP, 0, 0, 0]);
        assert_kills(&[Worker::Files], call, [KEEP, 0, 0, 0, 0, 0]);
    }
}
