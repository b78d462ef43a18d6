// SPDX-License-Identifier: Apache-2.0
//! That the control thread and the vCPUs' are allowed nothing which nobody
//! needs: each rule is left out once, and the VMM is killed in the course of a
//! long life. Those of the devices' threads: `src/confine/tests.rs`.

use std::{
    os::{fd::OwnedFd, unix::process::ExitStatusExt},
    panic::{catch_unwind, AssertUnwindSafe},
    sync::Mutex,
    time::{Duration, Instant},
};

use bulkhead_vmm::confine::{
    rules::{allowed, Allowed, Condition},
    seccomp::{Worker, LEFT_OUT},
};
use bulkhead_vmm_api::{
    BalloonConfig, BalloonTarget, BlkConfig, BlkEngine, Call, FsCache, FsConfig, MemConfig,
    MemoryTarget, NetConfig, PlugConfig, PmemConfig, UnplugTarget,
};
use vmm_sys_util::tempdir::TempDir;

use crate::{
    guest::{zeros, Code},
    vmm::{kvm, Setup, Vmm, LONG},
};

/// What this life does not take each time, and what does: a call, and for those
/// that are told apart by an argument, that.
const ELSEWHERE: &[(i64, Option<u64>, &str)] = &[
    // The C library's and Rust's own, when they like.
    (
        libc::SYS_mremap,
        None,
        "a block that grows as the last of its kind",
    ),
    (libc::SYS_brk, None, "a heap that grows"),
    (libc::SYS_munmap, None, "a heap that shrinks"),
    (libc::SYS_futex, None, "locks that are taken just then"),
    (libc::SYS_restart_syscall, None, "a wait that was stopped"),
    (
        libc::SYS_clock_gettime,
        None,
        "a vDSO that cannot tell the time",
    ),
    (libc::SYS_getrandom, None, "a thread's first map"),
    (libc::SYS_madvise, Some(DONTNEED), "a heap that shrinks"),
    (
        libc::SYS_fcntl,
        Some(libc::F_DUPFD_CLOEXEC as u64),
        "a driver that starts",
    ),
    // Threads that end, which here the process does: tests/restores.rs.
    (libc::SYS_rt_sigprocmask, None, "a thread that ends"),
    (libc::SYS_sigaltstack, None, "a thread that ends"),
    (libc::SYS_exit, None, "a thread that ends"),
    (libc::SYS_clock_nanosleep, None, "a machine that is dropped"),
    (
        libc::SYS_rt_sigreturn,
        None,
        "a signal that this thread got",
    ),
    // A panic's last words: tests/panic.rs.
    (libc::SYS_gettid, None, "a panic"),
    (libc::SYS_rt_sigaction, None, "a panic"),
    // Settings and hosts that are not this life's.
    (
        libc::SYS_madvise,
        Some(libc::MADV_NOHUGEPAGE as u64),
        "no huge pages",
    ),
    (
        libc::SYS_madvise,
        Some(libc::MADV_MERGEABLE as u64),
        "a merge group",
    ),
    (
        libc::SYS_ioctl,
        Some(0x9000_aecf),
        "a processor with AMX (KVM_GET_XSAVE2)",
    ),
    (
        libc::SYS_ioctl,
        Some(0x4004_54d0),
        "a real tap (TUNSETOFFLOAD)",
    ),
    // Tests of networks, e2e: `the_kernel_moves_a_guests_packets`.
    (libc::SYS_ioctl, Some(0x8008_af00), "VHOST_GET_FEATURES"),
    (libc::SYS_ioctl, Some(0xaf01), "VHOST_SET_OWNER"),
    (libc::SYS_ioctl, Some(0x4008_af03), "VHOST_SET_MEM_TABLE"),
    (libc::SYS_ioctl, Some(0xc008_af12), "VHOST_GET_VRING_BASE"),
    (libc::SYS_ioctl, Some(0x4008_af30), "VHOST_NET_SET_BACKEND"),
    // A guest's driver that has let go: e2e, `disks_come_and_go_while_a_guest_runs`.
    (
        libc::SYS_ioctl,
        Some(0x4020_aea5),
        "a driver's interrupts (KVM_SIGNAL_MSI)",
    ),
    (
        libc::SYS_ioctl,
        Some(0x4040_ae79),
        "a driver's notifications (KVM_IOEVENTFD)",
    ),
    (libc::SYS_epoll_ctl, None, "a driver's queues"),
    (libc::SYS_io_uring_enter, None, "a driver's requests"),
];

const DONTNEED: u64 = libc::MADV_DONTNEED as u64;

/// What vCPUs do for guests' drivers and no tiny guest makes them do: every
/// end-to-end test.
const VCPUS_ELSEWHERE: &[i64] = &[
    libc::SYS_ioctl,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_io_uring_enter,
    libc::SYS_read,
    libc::SYS_close,
    libc::SYS_mmap,
    libc::SYS_fcntl,
    // Events: a guest that ends, or panics the VMM.
    libc::SYS_write,
    libc::SYS_sendmsg,
    libc::SYS_getpid,
    libc::SYS_tgkill,
    libc::SYS_exit_group,
];

/// KVM_RUN, the one request that all vCPUs make.
const RUN: u64 = 0xae80;

fn is_excused(worker: Worker, rule: &Allowed) -> bool {
    let argument = rule.test.and_then(|test| match test {
        [Condition::Is(_, value)] => Some(*value),
        _ => None,
    });
    let elsewhere = ELSEWHERE
        .iter()
        .any(|(call, value, _)| *call == rule.call && (value.is_none() || *value == argument));
    let driver = worker == Worker::Vcpu && argument != Some(RUN);
    elsewhere || (driver && VCPUS_ELSEWHERE.contains(&rule.call))
}

fn null() -> OwnedFd {
    std::fs::File::open("/dev/null").unwrap().into()
}

/// All that a client can ask for. Panics when the VMM does not answer.
fn life(vmm: &mut Vmm) {
    let directory = TempDir::new().unwrap();
    let shared = || std::fs::File::open(directory.as_path()).unwrap();
    let fs = |tag: &str, directory| FsConfig {
        tag: tag.into(),
        directory,
        cache: FsCache::Auto,
        dax_mib: 0,
    };
    let mut setup = Setup::new(Code::new().print_for_ever(b'r').kernel());
    let _serial = setup.serial();
    let index = setup.pass(shared());
    setup.config.vcpus = 2;
    setup.config.huge_pages = true;
    setup.config.devices.fs.push(fs("first", index));
    setup.config.devices.mem = Some(MemConfig { max_mib: 256 });
    setup.config.devices.balloon = Some(BalloonConfig::default());
    vmm.configure(&setup).unwrap();
    vmm.call(Call::Boot).unwrap();
    vmm.status();
    vmm.call(Call::Balloon(BalloonTarget { mib: 1 })).unwrap();
    for mib in [256, 0] {
        vmm.call(Call::Memory(MemoryTarget { mib })).unwrap();
    }
    let pmem = PlugConfig::Pmem(PmemConfig {
        id: "p".into(),
        file: 0,
        read_only: true,
    });
    let blk = PlugConfig::Blk(BlkConfig {
        id: "b".into(),
        engine: Some(BlkEngine::IoUring),
        ..BlkConfig::default()
    });
    let net = PlugConfig::Net(NetConfig {
        id: "n".into(),
        tap: 0,
        mac: [2, 0, 0, 0, 0, 1],
        ..NetConfig::default()
    });
    let plugged = [
        (pmem, zeros(2 << 20).into()),
        (blk, zeros(1 << 20).into()),
        (net, null()),
        (PlugConfig::Fs(fs("second", 0)), shared().into()),
    ];
    for (config, fd) in plugged {
        let slot = vmm.plug(config, vec![fd]).unwrap();
        vmm.call(Call::Unplug(UnplugTarget { slot })).unwrap();
    }
    vmm.snapshot().unwrap();
    vmm.call(Call::Resume).unwrap();
    vmm.call(Call::Shutdown).unwrap();
    vmm.end();
}

/// Leads a VMM's life without one rule; whether it was killed.
fn is_missed(worker: Worker, number: usize) -> bool {
    let mut vmm = Vmm::spawn_with(&[(LEFT_OUT, &format!("{worker:?} {number}"))]);
    let lived = catch_unwind(AssertUnwindSafe(|| life(&mut vmm)));
    let deadline = Instant::now() + LONG;
    loop {
        if let Some(status) = vmm.child.try_wait().unwrap() {
            let killed = status.signal() == Some(libc::SIGSYS);
            assert!(killed || lived.is_ok(), "{worker:?} {number}: {status}");
            return killed;
        }
        assert!(Instant::now() < deadline, "{worker:?} {number}: no end");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn nothing_is_allowed_that_is_not_needed() {
    if !kvm("nothing_is_allowed_that_is_not_needed") {
        return;
    }
    if !cfg!(debug_assertions) {
        println!("SKIPPED: nothing_is_allowed_that_is_not_needed: the VMM of a release knows no rules to leave out");
        return;
    }
    let unneeded = Mutex::new(Vec::new());
    for worker in [Worker::Control, Worker::Vcpu] {
        let all: Vec<Allowed> = allowed(worker).collect();
        assert!(!is_missed(worker, all.len()));
        let next = Mutex::new(0..all.len());
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| loop {
                    let Some(number) = next.lock().unwrap().next() else {
                        return;
                    };
                    let rule = all[number];
                    if !is_excused(worker, &rule) && !is_missed(worker, number) {
                        unneeded.lock().unwrap().push((worker, rule));
                    }
                });
            }
        });
    }
    let unneeded = unneeded.into_inner().unwrap();
    assert!(unneeded.is_empty(), "allowed without need: {unneeded:#?}");
}
