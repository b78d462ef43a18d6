// SPDX-License-Identifier: Apache-2.0
//! That nothing is allowed which nobody needs: each rule of the devices' threads
//! is left out once, and one of the devices' tests, which run as they do in a VM,
//! is killed. Those of the other threads: `tests/tiny_guests/rules.rs`.

use std::{
    os::unix::process::ExitStatusExt,
    process::{Command, Stdio},
    sync::Mutex,
};

use super::{
    rules::{allowed, Allowed},
    seccomp::{Worker, LEFT_OUT},
};

/// Tests of the devices that a thread of the kind serves, those first that take
/// little time.
fn scenarios(worker: Worker) -> &'static [&'static [&'static str]] {
    match worker {
        Worker::Files => &[&["virtio::fs::"]],
        _ => &[
            &[
                "virtio::blk::",
                "virtio::net::",
                "virtio::balloon::",
                "virtio::rng::",
                "virtio::console::",
            ],
            &["virtio::pmem::", "virtio::mem::"],
            &["virtio::vsock::"],
        ],
    }
}

/// Calls that no test of a device makes each time, and why they are allowed
/// nevertheless.
const ELSEWHERE: &[(i64, &str)] = &[
    // The C library's and Rust's own, when they like.
    (
        libc::SYS_mremap,
        "growing a block that is the last of its kind",
    ),
    (libc::SYS_brk, "a heap that grows"),
    (libc::SYS_munmap, "a heap that shrinks"),
    (libc::SYS_mmap, "a heap that grows"),
    (libc::SYS_futex, "locks that are taken just then"),
    (libc::SYS_restart_syscall, "a wait that was stopped"),
    (
        libc::SYS_clock_gettime,
        "hosts whose vDSO cannot tell the time",
    ),
    (
        libc::SYS_getrandom,
        "the entropy device, and maps of the first thread",
    ),
    (
        libc::SYS_madvise,
        "stacks of threads that ended, kept for others",
    ),
    (libc::SYS_epoll_pwait, "musl's epoll_wait"),
    (
        libc::SYS_fcntl,
        "descriptors' flags, looked at by unoptimised builds",
    ),
    (
        libc::SYS_ioctl,
        "drivers' interrupts: tests/tiny_guests/rules.rs",
    ),
    // A panic's last words: tests/panic.rs.
    (libc::SYS_getpid, "a panic"),
    (libc::SYS_tgkill, "a panic"),
    (libc::SYS_exit_group, "a panic"),
    (libc::SYS_sendmsg, "a panic's event; data to a Unix socket"),
    // A vCPU's signal, which any thread of the process may get.
    (libc::SYS_rt_sigreturn, "a signal"),
];

/// Runs the tests without one rule; whether that killed them.
fn is_missed(worker: Worker, number: usize) -> bool {
    scenarios(worker).iter().any(|tests| {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(*tests)
            .args(["--test-threads", "4"])
            .env(LEFT_OUT, format!("{worker:?} {number}"))
            // One heap for all threads, as the VMM has it.
            .env("MALLOC_ARENA_MAX", "1")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap();
        match status.signal() {
            Some(signal) => signal == libc::SIGSYS,
            None => {
                assert!(status.success(), "{worker:?} {number}: {status}");
                false
            }
        }
    })
}

#[test]
fn devices_threads_are_allowed_nothing_that_they_do_not_need() {
    let mut unneeded = Vec::new();
    for worker in [Worker::Files, Worker::Devices] {
        let all: Vec<Allowed> = allowed(worker).collect();
        // With all rules the tests pass.
        assert!(!is_missed(worker, all.len()));
        let next = Mutex::new(0..all.len());
        let idle = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| loop {
                    let Some(number) = next.lock().unwrap().next() else {
                        return;
                    };
                    let rule = all[number];
                    let excused = ELSEWHERE.iter().any(|(call, _)| *call == rule.call);
                    if !excused && !is_missed(worker, number) {
                        idle.lock().unwrap().push(rule);
                    }
                });
            }
        });
        let idle = idle.into_inner().unwrap();
        unneeded.extend(idle.into_iter().map(|rule| (worker, rule)));
    }
    assert!(unneeded.is_empty(), "allowed without need: {unneeded:#?}");
}
