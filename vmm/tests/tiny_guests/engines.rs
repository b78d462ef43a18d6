// SPDX-License-Identifier: Apache-2.0
//! Disks whose requests the host's kernel serves.

use std::{
    io::{self, Read},
    os::unix::process::CommandExt,
    process::{Command, Stdio},
};

use bulkhead_vmm_api::{BlkConfig, BlkEngine, Call, DeviceKind, Event, ExitReason};

use crate::{
    guest::{zeros, Code},
    vmm::{kvm, Setup, Vmm},
};

/// A guest with such a disk.
fn setup() -> Setup {
    let mut setup = Setup::new(Code::new().print_for_ever(b'e').kernel());
    let file = setup.pass(zeros(1 << 20));
    setup.config.devices.blk.push(BlkConfig {
        id: "ring".into(),
        file,
        engine: Some(BlkEngine::IoUring),
        ..BlkConfig::default()
    });
    setup
}

/// Runs the guest under a VMM, and ends it; what the VMM said.
fn life(mut vmm: Vmm) -> String {
    let mut setup = setup();
    let mut serial = setup.serial();
    vmm.configure(&setup).unwrap();
    vmm.call(Call::Boot).unwrap();
    let mut printed = [0; 3];
    serial.read_exact(&mut printed).unwrap();
    assert_eq!(printed, *b"eee");
    assert_eq!(vmm.status().devices[0].kind, DeviceKind::Blk);
    drop(vmm.snapshot().unwrap());
    vmm.call(Call::Shutdown).unwrap();
    assert_eq!(vmm.end(), (vec![Event::Ended(ExitReason::Stopped)], 0));
    let mut said = String::new();
    let mut stderr = vmm.child.stderr.take().unwrap();
    stderr.read_to_string(&mut said).unwrap();
    said
}

/// Refuses the program io_uring, as `kernel.io_uring_disabled` does.
fn refuse(command: &mut Command) {
    let statement = |code: u32, value: u32| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k: value,
    };
    let refused = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    let filter = [
        // The call's number.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        libc::sock_filter {
            jf: 1,
            ..statement(
                libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
                libc::SYS_io_uring_setup as u32,
            )
        },
        statement(libc::BPF_RET | libc::BPF_K, refused),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    // SAFETY: the closure makes system calls only, which are safe between fork
    // and exec, of memory that it owns.
    unsafe {
        command.pre_exec(move || {
            let program = libc::sock_fprog {
                len: filter.len() as u16,
                filter: filter.as_ptr().cast_mut(),
            };
            let done = libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                && libc::prctl(
                    libc::PR_SET_SECCOMP,
                    libc::SECCOMP_MODE_FILTER,
                    &raw const program,
                ) == 0;
            if done {
                Ok(())
            } else {
                Err(io::Error::last_os_error())
            }
        });
    }
}

#[test]
fn a_disk_by_io_uring_comes_up_and_ends() {
    if !kvm("a_disk_by_io_uring_comes_up_and_ends") {
        return;
    }
    let vmm = Vmm::spawn_changed(|command| {
        command.stderr(Stdio::piped());
    });
    let said = life(vmm);
    if said.contains("io_uring") {
        println!("SKIPPED: a_disk_by_io_uring_comes_up_and_ends: {said}");
    }
}

#[test]
fn a_host_that_forbids_it_is_told_of() {
    if !kvm("a_host_that_forbids_it_is_told_of") {
        return;
    }
    let vmm = Vmm::spawn_changed(|command| {
        command.stderr(Stdio::piped());
        refuse(command);
    });
    let said = life(vmm);
    let expected = ["ring", "does not let the VMM use io_uring", "not permitted"];
    for part in expected {
        assert!(said.contains(part), "{part:?} in {said:?}");
    }
}
