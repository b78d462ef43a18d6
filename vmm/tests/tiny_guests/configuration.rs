// SPDX-License-Identifier: Apache-2.0
//! What is refused, and how it is said.

use std::{fs::File, process::Command};

use bulkhead_vmm_api::{
    BlkConfig, Call, ChannelError, FailureKind, FromVmm, FsCache, FsConfig, NetConfig, Outcome,
    PmemConfig, Rate, RateLimits, VmState, VsockConfig, MAX_MESSAGE,
};
use nix::sys::socket::{send, MsgFlags};

use crate::{
    guest::{contents, zeros, Code, Elf},
    vmm::{assert_failure, kvm, Setup, Vmm, VMM},
};

fn kernel() -> File {
    Code::new().halt().kernel()
}

#[test]
fn a_bad_configuration_is_refused_by_its_fields_name() {
    use FailureKind::{BadResource, InvalidRequest};
    type Change = fn(&mut Setup);
    let changes: [(&str, FailureKind, Change); 22] = [
        ("vcpus: 0", InvalidRequest, |s| s.config.vcpus = 0),
        ("vcpus: 65", InvalidRequest, |s| s.config.vcpus = 65),
        ("memory_mib: 0", InvalidRequest, |s| s.config.memory_mib = 0),
        ("memory_mib: 1 ", InvalidRequest, |s| {
            s.config.memory_mib = 1
        }),
        ("memory_mib: ", InvalidRequest, |s| {
            s.config.memory_mib = u32::MAX
        }),
        ("kernel.image: ", InvalidRequest, |s| {
            s.config.kernel.image = 1
        }),
        ("kernel.image: ", InvalidRequest, |s| s.fds.clear()),
        ("kernel.initrd: ", InvalidRequest, |s| {
            s.config.kernel.initrd = Some(0);
        }),
        ("kernel.cmdline: ", InvalidRequest, |s| {
            s.config.kernel.cmdline = "x".repeat(2048);
        }),
        ("kernel.cmdline: ", InvalidRequest, |s| {
            s.config.kernel.cmdline = "a\nb".into();
        }),
        ("serial: ", InvalidRequest, |s| s.config.serial = Some(9)),
        ("pmem \"image\": ", BadResource, |s| {
            let file = s.pass(zeros(4096));
            s.config.devices.pmem.push(PmemConfig {
                id: "image".into(),
                file,
                read_only: true,
            });
        }),
        ("blk \"disk\": ", BadResource, |s| {
            let file = s.pass(zeros(513));
            s.config.devices.blk.push(BlkConfig {
                id: "disk".into(),
                file,
                read_only: true,
                ..BlkConfig::default()
            });
        }),
        ("fs \"\": ", InvalidRequest, |s| {
            let directory = s.pass(File::open("/").unwrap());
            s.config.devices.fs.push(FsConfig {
                tag: String::new(),
                directory,
                cache: FsCache::Auto,
                dax_mib: 0,
                host_locks: false,
            });
        }),
        ("fs \"shared\".dax_mib: 3", InvalidRequest, |s| {
            let directory = s.pass(File::open("/").unwrap());
            s.config.devices.fs.push(FsConfig {
                tag: "shared".into(),
                directory,
                cache: FsCache::Auto,
                dax_mib: 3,
                host_locks: false,
            });
        }),
        ("fs \"shared\": ", InvalidRequest, |s| {
            s.config.devices.fs.push(FsConfig {
                tag: "shared".into(),
                directory: 0,
                cache: FsCache::Auto,
                dax_mib: 0,
                host_locks: false,
            });
        }),
        ("vsock.cid: 2", InvalidRequest, |s| {
            s.config.devices.vsock = Some(VsockConfig {
                cid: 2,
                listener: None,
                uds_path: "/nowhere".into(),
                ready_port: None,
            });
        }),
        ("vsock.listener: ", InvalidRequest, |s| {
            s.config.devices.vsock = Some(VsockConfig {
                cid: 3,
                listener: Some(5),
                uds_path: "/nowhere".into(),
                ready_port: None,
            });
        }),
        ("net \"eth0\": ", InvalidRequest, |s| {
            let tap = s.pass(zeros(0));
            s.config.devices.net.push(NetConfig {
                id: "eth0".into(),
                tap,
                mac: [1, 0, 0, 0, 0, 1],
                ..NetConfig::default()
            });
        }),
        ("net \"eth0\": more_queues: ", InvalidRequest, |s| {
            let tap = s.pass(zeros(0));
            s.config.devices.net.push(NetConfig {
                id: "eth0".into(),
                tap,
                more_queues: (1..=8).collect(),
                ..NetConfig::default()
            });
        }),
        ("net \"eth0\": vhost: ", InvalidRequest, |s| {
            let (tap, other) = (s.pass(zeros(0)), s.pass(zeros(0)));
            s.config.devices.net.push(NetConfig {
                id: "eth0".into(),
                tap,
                more_queues: vec![other],
                vhost: Some(other),
                ..NetConfig::default()
            });
        }),
        ("net \"eth0\": receive_rate.bytes: ", InvalidRequest, |s| {
            let tap = s.pass(zeros(0));
            let bytes = Some(Rate {
                per_second: 1,
                burst: 0,
            });
            s.config.devices.net.push(NetConfig {
                id: "eth0".into(),
                tap,
                receive_rate: Some(RateLimits {
                    bytes,
                    operations: None,
                }),
                ..NetConfig::default()
            });
        }),
    ];
    let mut vmm = Vmm::spawn();
    for (start, kind, change) in changes {
        let mut setup = Setup::new(kernel());
        change(&mut setup);
        assert_failure(vmm.configure(&setup), kind, start);
        assert_eq!(vmm.status().state, VmState::Unconfigured);
    }
    // The right one is taken all the same.
    vmm.configure(&Setup::new(kernel())).unwrap();
}

#[test]
fn files_that_cannot_be_booted_are_refused() {
    if !kvm("files_that_cannot_be_booted_are_refused") {
        return;
    }
    let elf = || Elf::new(Code::new().halt());
    for (start, image) in [
        ("kernel image cannot be loaded", contents(b"")),
        ("kernel image cannot be loaded", contents(b"#!/bin/sh\n")),
        ("kernel image cannot be loaded", contents(&[0x7f; 4096])),
        ("kernel image cannot be loaded", File::open("/").unwrap()),
        // Where the machine has no memory.
        (
            "kernel image cannot be loaded",
            Elf {
                address: 64 << 20,
                ..elf()
            }
            .file(),
        ),
        ("kernel image has no PVH", Elf { note: 4, ..elf() }.file()),
        (
            "kernel image has no PVH",
            Elf {
                segments: 1,
                ..elf()
            }
            .file(),
        ),
    ] {
        let mut vmm = Vmm::spawn();
        vmm.configure(&Setup::new(image)).unwrap();
        assert_failure(vmm.call(Call::Boot), FailureKind::BadResource, start);
    }
    let mut setup = Setup::new(kernel());
    let ramdisk = setup.pass(zeros(33 << 20));
    setup.config.kernel.initrd = Some(ramdisk);
    let mut vmm = Vmm::spawn();
    vmm.configure(&setup).unwrap();
    assert_failure(
        vmm.call(Call::Boot),
        FailureKind::BadResource,
        "initrd of 34603008 bytes",
    );
}

#[test]
fn devices_that_cannot_be_made_are_named() {
    let mut setup = Setup::new(kernel());
    let directory = setup.pass(contents(b"no directory"));
    setup.config.devices.fs.push(FsConfig {
        tag: "shared".into(),
        directory,
        cache: FsCache::Auto,
        dax_mib: 0,
        host_locks: false,
    });
    let mut vmm = Vmm::spawn();
    assert_failure(
        vmm.configure(&setup),
        FailureKind::BadResource,
        "fs \"shared\": not a directory",
    );
}

#[test]
fn calls_out_of_order_are_refused() {
    let mut vmm = Vmm::spawn();
    assert_failure(
        vmm.call(Call::Boot),
        FailureKind::WrongState,
        "boot is not possible",
    );
    vmm.configure(&Setup::new(kernel())).unwrap();
    assert_failure(
        vmm.configure(&Setup::new(kernel())),
        FailureKind::WrongState,
        "configure is not possible",
    );
    if !kvm("calls_out_of_order_are_refused") {
        return;
    }
    vmm.call(Call::Boot).unwrap();
    for call in [
        Call::Boot,
        Call::Configure(Box::new(Setup::new(kernel()).config)),
    ] {
        let failure = vmm.call(call).unwrap_err();
        assert_eq!(failure.kind, FailureKind::WrongState);
    }
    assert_eq!(vmm.status().state, VmState::Running);
}

#[test]
fn messages_that_are_none_are_answered() {
    let mut vmm = Vmm::spawn();
    let fd = std::os::fd::AsRawFd::as_raw_fd(vmm.channel());
    let long = vec![b' '; MAX_MESSAGE + 1];
    for message in [
        &br#"{"id": 1, "call": "dance"}"#[..],
        br#"{"id": 1}"#,
        br#"{"id": 1, "call": "status", "more": 1}"#,
        br#"{"id": 1, "call": {"configure": {"vcpus": 1}}}"#,
        b"hello",
        b"\xff\xfe\0",
        &long,
    ] {
        send(fd, message, MsgFlags::empty()).unwrap();
        match vmm.receive() {
            Ok(FromVmm::Reply(reply)) => {
                assert_eq!(reply.id, 0);
                let Outcome::Failed(failure) = reply.outcome else {
                    panic!("{reply:?}");
                };
                assert_eq!(failure.kind, FailureKind::InvalidRequest);
                assert!(!failure.message.is_empty());
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(vmm.status().state, VmState::Unconfigured);
    vmm.call(Call::Shutdown).unwrap();
    assert!(matches!(vmm.receive(), Ok(FromVmm::Event(_))));
    assert!(matches!(vmm.receive(), Err(ChannelError::Closed)));
}

#[test]
fn the_command_line_is_checked() {
    let run = |arguments: &[&str]| {
        let output = Command::new(VMM).args(arguments).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        (output.status.code().unwrap(), stderr)
    };
    for arguments in [
        &[][..],
        &["--control-fd"],
        &["--control-fd", "x"],
        &["--control-fd", "2"],
        &["--control-fd", "999"],
        &["--frobnicate"],
    ] {
        let (code, stderr) = run(arguments);
        assert_eq!(code, 2, "{arguments:?}");
        assert!(stderr.contains("bulkhead-vmm"), "{stderr}");
    }
    assert_eq!(run(&["--version"]), (0, String::new()));
}
