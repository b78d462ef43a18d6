// SPDX-License-Identifier: Apache-2.0
//! That the control thread and the vCPUs' are allowed nothing which nobody
//! needs: each rule is left out once, and the VMM is killed in the course of a
//! long life, or of one with a guest that has drivers. Those of the devices' threads: `src/confine/tests.rs`.

use std::{
    io::Read,
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
    BalloonConfig, BalloonTarget, BlkConfig, BlkEngine, Call, DeviceConfigs, Event, FsCache,
    FsConfig, MemConfig, MemoryTarget, NetConfig, Pages, PlugConfig, PmemConfig, UnplugTarget,
    VsockConfig,
};
use vmm_sys_util::tempdir::TempDir;

use crate::{
    guest::{register, zeros, Code},
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
    // Only while it is at something.
    (libc::SYS_io_uring_enter, None, "a disk that is slow"),
    // Tests of networks, e2e: `the_kernel_moves_a_guests_packets`.
    (libc::SYS_ioctl, Some(0x8008_af00), "VHOST_GET_FEATURES"),
    (libc::SYS_ioctl, Some(0x4008_af00), "VHOST_SET_FEATURES"),
    (libc::SYS_ioctl, Some(0xaf01), "VHOST_SET_OWNER"),
    (libc::SYS_ioctl, Some(0x4008_af03), "VHOST_SET_MEM_TABLE"),
    (libc::SYS_ioctl, Some(0x4008_af10), "VHOST_SET_VRING_NUM"),
    (libc::SYS_ioctl, Some(0x4028_af11), "VHOST_SET_VRING_ADDR"),
    (libc::SYS_ioctl, Some(0x4008_af12), "VHOST_SET_VRING_BASE"),
    (libc::SYS_ioctl, Some(0xc008_af12), "VHOST_GET_VRING_BASE"),
    (libc::SYS_ioctl, Some(0x4008_af20), "VHOST_SET_VRING_KICK"),
    (libc::SYS_ioctl, Some(0x4008_af21), "VHOST_SET_VRING_CALL"),
    (libc::SYS_ioctl, Some(0x4008_af22), "VHOST_SET_VRING_ERR"),
    (libc::SYS_ioctl, Some(0x4008_af30), "VHOST_NET_SET_BACKEND"),
];

const DONTNEED: u64 = libc::MADV_DONTNEED as u64;

/// What only vCPUs are excused from.
const VCPUS_ELSEWHERE: &[(i64, &str)] = &[
    (libc::SYS_mmap, "a heap that grows"),
    // tests/panic.rs.
    (libc::SYS_getpid, "a panic"),
    (libc::SYS_tgkill, "a panic"),
    (libc::SYS_exit_group, "a panic"),
];

/// What tells a call apart from others with its number.
fn argument(rule: &Allowed) -> Option<u64> {
    rule.test.and_then(|test| match test {
        [Condition::Is(_, value)] => Some(*value),
        _ => None,
    })
}

/// KVM_SIGNAL_MSI.
const SIGNAL_MSI: u64 = 0x4020_aea5;

fn is_excused(worker: Worker, rule: &Allowed) -> bool {
    let argument = argument(rule);
    let elsewhere = ELSEWHERE
        .iter()
        .any(|(call, value, _)| *call == rule.call && (value.is_none() || *value == argument));
    let vcpus = VCPUS_ELSEWHERE.iter().any(|(call, _)| *call == rule.call);
    elsewhere || (worker == Worker::Vcpu && vcpus)
}

fn null() -> OwnedFd {
    std::fs::File::open("/dev/null").unwrap().into()
}

/// All that a client can ask for. Panics when the VMM does not answer.
fn life(vmms: &mut Vmms<'_>) {
    let vmm = vmms.next();
    let directory = TempDir::new().unwrap();
    let shared = || std::fs::File::open(directory.as_path()).unwrap();
    let fs = |tag: &str, directory| FsConfig {
        tag: tag.into(),
        directory,
        cache: FsCache::Auto,
        dax_mib: 0,
        host_locks: false,
    };
    let mut setup = Setup::new(Code::new().print_for_ever(b'r').kernel());
    let _serial = setup.serial();
    let index = setup.pass(shared());
    setup.config.vcpus = 2;
    setup.config.pages = Pages::Transparent;
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
        read_only: false,
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

/// Where devices are for which the guest of [`drivers`] has drivers.
const VSOCK: u32 = 1;
const BLK: u32 = 2;
const RNG: u32 = 3;
const BALLOON: u32 = 4;

/// The guest: it starts all of them, gives one up, breaks one, and goes on
/// notifying it and looking whether it is a clone.
fn with_drivers() -> Code {
    const GENERATION: u32 = 0xfed1_0000;
    let restless = Code::new().notify_device(RNG).load32(GENERATION);
    Code::new()
        .allow_interrupts(RNG)
        .allow_interrupts(BALLOON)
        .start_device(VSOCK, 3)
        .start_device(BLK, 1)
        .start_device(BALLOON, 2)
        // Rightly, without the one queue that it must have, and again.
        .start_device(RNG, 1)
        .have_written(RNG)
        .start_device(RNG, 0)
        .start_device(RNG, 1)
        // FAILED
        .store8(register(BLK, 0x14), 15 | 128)
        .print("up\n")
        .for_ever(restless)
}

fn driven(fds: &mut Vec<OwnedFd>, directory: &TempDir) -> DeviceConfigs {
    fds.push(zeros(1 << 20).into());
    DeviceConfigs {
        vsock: Some(VsockConfig {
            cid: 3,
            listener: None,
            uds_path: directory.as_path().join("v").to_string_lossy().into(),
            ready_port: None,
        }),
        blk: vec![BlkConfig {
            id: "b".into(),
            file: fds.len() as u32 - 1,
            engine: Some(BlkEngine::IoUring),
            ..BlkConfig::default()
        }],
        balloon: Some(BalloonConfig::default()),
        ..DeviceConfigs::default()
    }
}

/// What a guest's drivers make of devices, and then those of a clone.
fn drivers(vmms: &mut Vmms<'_>) {
    let directory = TempDir::new().unwrap();
    let mut setup = Setup::new(with_drivers().kernel());
    let mut serial = setup.serial();
    setup.config.devices = driven(&mut setup.fds, &directory);
    let vmm = vmms.next();
    vmm.configure(&setup).unwrap();
    vmm.call(Call::Boot).unwrap();
    serial.read_exact(&mut [0; 3]).unwrap();
    vmm.call(Call::Balloon(BalloonTarget { mib: 1 })).unwrap();
    let snapshot = vmm.snapshot().unwrap();
    vmm.call(Call::Resume).unwrap();
    // Its driver has given up.
    let disk = UnplugTarget { slot: BLK as u8 };
    vmm.call(Call::Unplug(disk)).unwrap();
    vmm.call(Call::Shutdown).unwrap();
    vmm.end();

    let clone = vmms.next();
    let restored = clone.restore_from(&snapshot, |config, fds| {
        config.devices = driven(fds, &directory);
    });
    restored.unwrap();
    assert_eq!(clone.call_for(Call::Resume), Event::GenerationRead);
    clone.call(Call::Shutdown).unwrap();
    clone.end();
}

/// VMMs that lack a rule.
struct Vmms<'a> {
    all: Vec<Vmm>,
    left_out: &'a str,
}

impl Vmms<'_> {
    /// One more.
    fn next(&mut self) -> &mut Vmm {
        self.all.push(Vmm::spawn_with(&[(LEFT_OUT, self.left_out)]));
        self.all.last_mut().unwrap()
    }
}

/// Leads VMMs' lives without one rule; whether one was killed.
fn is_missed(worker: Worker, number: usize) -> bool {
    [life, drivers].into_iter().any(|lives| {
        let mut vmms = Vmms {
            all: Vec::new(),
            left_out: &format!("{worker:?} {number}"),
        };
        let led = catch_unwind(AssertUnwindSafe(|| lives(&mut vmms)));
        let deadline = Instant::now() + LONG;
        let mut ended = vmms.all.iter_mut().map(|vmm| loop {
            if let Some(status) = vmm.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "{worker:?} {number}: no end");
            std::thread::sleep(Duration::from_millis(2));
        });
        let killed = ended.any(|status| status.signal() == Some(libc::SIGSYS));
        assert!(killed || led.is_ok(), "{worker:?} {number}");
        killed
    })
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
    // Of the devices' threads only what needs a guest.
    for worker in [Worker::Control, Worker::Vcpu, Worker::Devices] {
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
                    let here = worker != Worker::Devices || argument(&rule) == Some(SIGNAL_MSI);
                    if here && !is_excused(worker, &rule) && !is_missed(worker, number) {
                        unneeded.lock().unwrap().push((worker, rule));
                    }
                });
            }
        });
    }
    let unneeded = unneeded.into_inner().unwrap();
    assert!(unneeded.is_empty(), "allowed without need: {unneeded:#?}");
}
