// SPDX-License-Identifier: Apache-2.0
//! Devices that come and go while a guest runs.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    os::{fd::OwnedFd, unix::net::UnixStream},
};

use bulkhead_vmm_api::{
    BlkConfig, Call, DeviceKind, Event, ExitReason, FailureKind, FsCache, FsConfig, NetConfig,
    PlugConfig, PmemConfig, UnplugTarget,
};

use crate::{
    guest::{zeros, Code},
    vmm::{assert_failure, kvm, Setup, Vmm},
};

/// A disk of 1 MiB.
fn disk(id: &str) -> (PlugConfig, OwnedFd) {
    let config = BlkConfig {
        id: id.into(),
        file: 0,
        read_only: false,
        ..BlkConfig::default()
    };
    (PlugConfig::Blk(config), zeros(1 << 20).into())
}

fn pmem(id: &str, size: u64) -> (PlugConfig, OwnedFd) {
    let config = PmemConfig {
        id: id.into(),
        file: 0,
        read_only: false,
    };
    (PlugConfig::Pmem(config), zeros(size).into())
}

/// A guest that tells the device in slot 1, again and again, in lines.
fn watching() -> (Vmm, BufReader<UnixStream>) {
    let mut setup = Setup::new(Code::new().watch_device(1).kernel());
    let serial = setup.serial();
    (Vmm::run(&setup), BufReader::new(serial))
}

/// Waits until the guest sees this.
fn wait_for(serial: &mut BufReader<UnixStream>, seen: u8) {
    let mut line = Vec::new();
    loop {
        line.clear();
        serial.read_until(b'\n', &mut line).unwrap();
        if line.last() == Some(&b'\n') && line.contains(&seen) {
            return;
        }
    }
}

fn unplug(slot: u8) -> Call {
    Call::Unplug(UnplugTarget { slot })
}

#[test]
fn a_running_guest_sees_devices_come_and_go() {
    if !kvm("a_running_guest_sees_devices_come_and_go") {
        return;
    }
    let (mut vmm, mut serial) = watching();
    wait_for(&mut serial, 0);
    for _ in 0..3 {
        let (config, file) = disk("first");
        assert_eq!(vmm.plug(config, vec![file]).unwrap(), 1);
        // A disk, 0x1042.
        wait_for(&mut serial, 0x42);
        vmm.call(unplug(1)).unwrap();
        wait_for(&mut serial, 0xff);
        let (config, file) = pmem("first", 2 << 20);
        assert_eq!(vmm.plug(config, vec![file]).unwrap(), 1);
        wait_for(&mut serial, 0x5b);
        vmm.call(unplug(1)).unwrap();
        wait_for(&mut serial, 0xff);
    }
    // Also while it rests.
    vmm.call(Call::Pause).unwrap();
    let (config, file) = disk("first");
    assert_eq!(vmm.plug(config, vec![file]).unwrap(), 1);
    vmm.call(Call::Resume).unwrap();
    wait_for(&mut serial, 0x42);
    vmm.call(Call::Shutdown).unwrap();
    assert_eq!(vmm.end(), (vec![Event::Ended(ExitReason::Stopped)], 0));
}

#[test]
fn thirty_devices_and_no_more_than_the_bus_holds() {
    if !kvm("thirty_devices_and_no_more_than_the_bus_holds") {
        return;
    }
    let (mut vmm, _serial) = watching();
    let descriptors = |vmm: &Vmm| {
        let path = format!("/proc/{}/fd", vmm.child.id());
        std::fs::read_dir(path).unwrap().count()
    };
    let before = descriptors(&vmm);
    for round in 0..4 {
        for slot in 1..=31 {
            let (config, file) = match slot % 2 {
                0 => disk(&format!("disk{slot}")),
                _ => pmem(&format!("pmem{slot}"), 2 << 20),
            };
            assert_eq!(vmm.plug(config, vec![file]).unwrap(), slot, "{round}");
        }
        assert_eq!(vmm.status().devices.len(), 31);
        let (config, file) = disk("one more");
        assert_failure(
            vmm.plug(config, vec![file]).map(drop),
            FailureKind::InvalidRequest,
            "the PCI bus is full",
        );
        for slot in 1..=31 {
            vmm.call(unplug(slot)).unwrap();
        }
        assert!(vmm.status().devices.is_empty());
        assert_eq!(descriptors(&vmm), before, "round {round}");
    }
}

#[test]
fn what_cannot_be_plugged_is_refused() {
    if !kvm("what_cannot_be_plugged_is_refused") {
        return;
    }
    let mut vmm = Vmm::spawn();
    let (config, file) = disk("early");
    assert_failure(
        vmm.plug(config, vec![file]).map(drop),
        FailureKind::WrongState,
        "plug is not possible: the VM is Unconfigured",
    );
    let mut setup = Setup::new(Code::new().halt().kernel());
    setup.config.devices.rng = true;
    let mut vmm = Vmm::run(&setup);
    let (config, file) = pmem("odd", 4096);
    assert_failure(
        vmm.plug(config, vec![file]).map(drop),
        FailureKind::BadResource,
        "pmem \"odd\": 4096 bytes",
    );
    let (config, _) = disk("nothing");
    assert_failure(
        vmm.plug(config, Vec::new()).map(drop),
        FailureKind::InvalidRequest,
        "blk \"nothing\": descriptor 0 of 0",
    );
    let fs = FsConfig {
        tag: "more".into(),
        directory: 0,
        cache: FsCache::Auto,
        dax_mib: 0,
        host_locks: false,
    };
    let directory = File::open("/").unwrap();
    assert_failure(
        vmm.plug(PlugConfig::Fs(fs), vec![directory.into()])
            .map(drop),
        FailureKind::Unsupported,
        "fs: this VM was started without a shared directory",
    );
    assert_failure(
        vmm.call(unplug(1)),
        FailureKind::Unsupported,
        "slot: rng in slot 1 cannot be unplugged",
    );
    assert_failure(
        vmm.call(unplug(2)),
        FailureKind::InvalidRequest,
        "slot: there is no device in slot 2",
    );
    let (config, file) = disk("twice");
    assert_eq!(vmm.plug(config, vec![file]).unwrap(), 2);
    let (config, file) = disk("twice");
    assert_failure(
        vmm.plug(config, vec![file]).map(drop),
        FailureKind::InvalidRequest,
        "blk \"twice\" is there already",
    );
}

#[test]
fn a_shared_directory_and_an_interface_are_plugged() {
    if !kvm("a_shared_directory_and_an_interface_are_plugged") {
        return;
    }
    let mut setup = Setup::new(Code::new().halt().kernel());
    let fs = |tag: &str, directory| FsConfig {
        tag: tag.into(),
        directory,
        cache: FsCache::Auto,
        dax_mib: 0,
        host_locks: false,
    };
    let directory = vmm_sys_util::tempdir::TempDir::new().unwrap();
    let open = || File::open(directory.as_path()).unwrap();
    let index = setup.pass(open());
    setup.config.devices.fs.push(FsConfig {
        dax_mib: 4,
        host_locks: false,
        ..fs("first", index)
    });
    let mut vmm = Vmm::run(&setup);
    let late = PlugConfig::Fs(FsConfig {
        dax_mib: 2,
        host_locks: false,
        ..fs("second", 0)
    });
    let refused = vmm.plug(late, vec![open().into()]).unwrap_err();
    assert!(refused.message.contains("dax_mib"), "{refused:?}");
    let config = PlugConfig::Fs(fs("second", 0));
    assert_eq!(vmm.plug(config, vec![open().into()]).unwrap(), 2);
    let net = NetConfig {
        id: "eth1".into(),
        // No tap: its ioctls are refused, and there are no offloads.
        tap: 0,
        mac: [2, 0, 0, 0, 0, 1],
        mtu: Some(1400),
        ..NetConfig::default()
    };
    let config = PlugConfig::Net(net);
    assert_eq!(vmm.plug(config, vec![zeros(0).into()]).unwrap(), 3);
    let kinds: Vec<_> = vmm.status().devices.iter().map(|d| d.kind).collect();
    assert_eq!(kinds, [DeviceKind::Fs, DeviceKind::Fs, DeviceKind::Net]);
    for slot in [2, 3] {
        vmm.call(unplug(slot)).unwrap();
    }
    let left: Vec<_> = vmm.status().devices.into_iter().map(|d| d.id).collect();
    assert_eq!(left, ["first"]);
}

#[test]
fn what_was_plugged_is_saved_where_it_is() {
    if !kvm("what_was_plugged_is_saved_where_it_is") {
        return;
    }
    let mut setup = Setup::new(Code::new().watch_device(3).kernel());
    setup.config.devices.rng = true;
    let _serial = setup.serial();
    let mut vmm = Vmm::run(&setup);
    for (config, file) in [pmem("gone", 4 << 20), disk("disk"), pmem("kept", 2 << 20)] {
        vmm.plug(config, vec![file]).unwrap();
    }
    vmm.call(unplug(2)).unwrap();
    let snapshot = vmm.snapshot().unwrap();
    drop(vmm);

    let restore = |pmem_size: u64, disks: u32| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let vmm = Vmm::restore(&snapshot, |config, fds| {
            fds.push(theirs.into());
            config.serial = Some(2);
            config.devices.rng = true;
            let mut pass = |file: File| {
                fds.push(file.into());
                fds.len() as u32 - 1
            };
            config.devices.pmem.push(PmemConfig {
                id: "other name".into(),
                file: pass(zeros(pmem_size)),
                read_only: false,
            });
            for number in 0..disks {
                config.devices.blk.push(BlkConfig {
                    id: format!("other disk {number}"),
                    file: pass(zeros(512)),
                    read_only: false,
                    ..BlkConfig::default()
                });
            }
        });
        vmm.map(|vmm| (vmm, BufReader::new(ours)))
    };
    assert_failure(
        restore(2 << 20, 0).map(drop),
        FailureKind::InvalidRequest,
        "the snapshot has a blk device in slot 3, and no other is given for it",
    );
    assert_failure(
        restore(2 << 20, 2).map(drop),
        FailureKind::InvalidRequest,
        "blk \"other disk 1\" is more than the snapshot has",
    );
    assert_failure(
        restore(4 << 20, 1).map(drop),
        FailureKind::BadResource,
        "device 4 (other name): its file has 4194304 bytes and had 2097152",
    );
    let (mut vmm, mut serial) = restore(2 << 20, 1).unwrap();
    let devices = vmm.status().devices;
    let slots: Vec<_> = devices.iter().map(|d| (d.slot, d.kind)).collect();
    assert_eq!(
        slots,
        [
            (1, DeviceKind::Rng),
            (3, DeviceKind::Blk),
            (4, DeviceKind::Pmem)
        ]
    );
    vmm.call(Call::Resume).unwrap();
    wait_for(&mut serial, 0x42);
    // The bus of a clone is as good as any.
    vmm.call(unplug(3)).unwrap();
    wait_for(&mut serial, 0xff);
    let (config, file) = pmem("new", 2 << 20);
    assert_eq!(vmm.plug(config, vec![file]).unwrap(), 2);
    let (config, file) = pmem("newer", 2 << 20);
    assert_eq!(vmm.plug(config, vec![file]).unwrap(), 3);
    wait_for(&mut serial, 0x5b);
}

#[test]
fn a_device_that_a_driver_works_with_stays() {
    if !kvm("a_device_that_a_driver_works_with_stays") {
        return;
    }
    // Registers of slot 1: status ACKNOWLEDGE and DRIVER, when there are any.
    let code = Code::new()
        .acknowledge_device(1)
        .print("x\n")
        .watch_device(1);
    let mut setup = Setup::new(code.kernel());
    let serial = setup.serial();
    let file = setup.pass(zeros(512));
    setup.config.devices.blk.push(BlkConfig {
        id: "busy".into(),
        file,
        read_only: true,
        ..BlkConfig::default()
    });
    let mut vmm = Vmm::run(&setup);
    let mut serial = BufReader::new(serial);
    wait_for(&mut serial, 0x42);
    assert_failure(
        vmm.call(unplug(1)),
        FailureKind::WrongState,
        "blk \"busy\" in slot 1: the guest uses it (status 0x3)",
    );
    // As if nothing had been.
    assert_eq!(vmm.status().devices.len(), 1);
    wait_for(&mut serial, 0x42);
}
