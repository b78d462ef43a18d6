// SPDX-License-Identifier: Apache-2.0
//! Pause, resume, snapshot and restore.

use std::{
    fs::File,
    io::{ErrorKind, Read, Seek, Write},
    os::unix::{fs::FileExt, net::UnixStream},
    time::Duration,
};

use bulkhead_vmm_api::{BlkConfig, Call, Event, ExitReason, FailureKind, PmemConfig, VmState};

use crate::{
    guest::{zeros, Code},
    vmm::{assert_failure, kvm, Setup, Snapshot, Vmm, LONG},
};

/// Long enough for a guest that runs to print.
const A_WHILE: Duration = Duration::from_millis(200);

/// Reads away what has been printed; whether nothing more comes.
fn is_silent(serial: &mut UnixStream) -> bool {
    serial.set_nonblocking(true).unwrap();
    let mut buffer = [0; 4096];
    while serial.read(&mut buffer).is_ok() {}
    std::thread::sleep(A_WHILE);
    let silent = matches!(serial.read(&mut buffer), Err(e) if e.kind() == ErrorKind::WouldBlock);
    serial.set_nonblocking(false).unwrap();
    silent
}

fn next_byte(serial: &mut UnixStream) -> u8 {
    let mut byte = [0];
    serial.read_exact(&mut byte).unwrap();
    byte[0]
}

/// A guest that prints the letter for ever, and its output.
fn printing(letter: u8) -> (Vmm, UnixStream) {
    let mut setup = Setup::new(Code::new().print_for_ever(letter).kernel());
    let serial = setup.serial();
    (Vmm::run(&setup), serial)
}

fn restored(snapshot: &Snapshot) -> (Vmm, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(LONG)).unwrap();
    let vmm = Vmm::restore(snapshot, |config, fds| {
        fds.push(theirs.into());
        config.serial = Some(2);
    });
    (vmm.unwrap(), ours)
}

#[test]
fn a_paused_guest_does_nothing_and_goes_on_when_resumed() {
    if !kvm("a_paused_guest_does_nothing_and_goes_on_when_resumed") {
        return;
    }
    let (mut vmm, mut serial) = printing(b'k');
    for _ in 0..3 {
        assert_eq!(next_byte(&mut serial), b'k');
        vmm.call(Call::Pause).unwrap();
        // Once more does no harm.
        vmm.call(Call::Pause).unwrap();
        assert_eq!(vmm.status().state, VmState::Paused);
        let exits = vmm.status().exits;
        assert!(is_silent(&mut serial));
        assert_eq!(vmm.status().exits, exits);
        vmm.call(Call::Resume).unwrap();
        assert_eq!(vmm.status().state, VmState::Running);
    }
    assert_eq!(next_byte(&mut serial), b'k');
    vmm.call(Call::Pause).unwrap();
    vmm.call(Call::Shutdown).unwrap();
    assert_eq!(vmm.end(), (vec![Event::Ended(ExitReason::Stopped)], 0));
}

#[test]
fn clones_go_on_where_the_snapshot_was_taken() {
    if !kvm("clones_go_on_where_the_snapshot_was_taken") {
        return;
    }
    let (mut vmm, mut serial) = printing(b's');
    assert_eq!(next_byte(&mut serial), b's');
    let snapshot = vmm.snapshot().unwrap();
    assert_eq!(vmm.status().state, VmState::Paused);
    // The one it was taken of is as it was.
    assert!(is_silent(&mut serial));
    vmm.call(Call::Resume).unwrap();
    assert_eq!(next_byte(&mut serial), b's');
    drop(vmm);

    let (mut first, mut first_serial) = restored(&snapshot);
    let (mut second, mut second_serial) = restored(&snapshot);
    assert_eq!(first.status().state, VmState::Paused);
    assert!(is_silent(&mut first_serial));
    first.call(Call::Resume).unwrap();
    second.call(Call::Resume).unwrap();
    assert_eq!(next_byte(&mut first_serial), b's');
    assert_eq!(next_byte(&mut second_serial), b's');
    let timeline = first.status().timeline;
    let stamps = [
        timeline.vmm_start,
        timeline.configured,
        timeline.jailed,
        timeline.memory_mapped,
        timeline.assembled,
        timeline.restored,
        timeline.kernel_entry,
    ];
    let in_order = stamps.iter().all(Option::is_some) && stamps.is_sorted();
    assert!(in_order, "{timeline:?}");
    // One of them as a snapshot again.
    let again = first.snapshot().unwrap();
    drop((first, second));
    let (mut third, mut serial) = restored(&again);
    third.call(Call::Resume).unwrap();
    assert_eq!(next_byte(&mut serial), b's');
}

#[test]
fn calls_at_the_wrong_time_are_refused() {
    if !kvm("calls_at_the_wrong_time_are_refused") {
        return;
    }
    let mut vmm = Vmm::spawn();
    assert_failure(
        vmm.call(Call::Pause),
        FailureKind::WrongState,
        "pause is not possible",
    );
    assert_failure(
        vmm.call(Call::Resume),
        FailureKind::WrongState,
        "resume is not possible",
    );
    let (mut vmm, _serial) = printing(b'x');
    let snapshot = vmm.snapshot().unwrap();
    vmm.call(Call::Resume).unwrap();
    let files = bulkhead_vmm_api::SnapshotFiles {
        state: 0,
        memory: 1,
    };
    assert_failure(
        vmm.call(Call::Snapshot(files.clone())),
        FailureKind::WrongState,
        "snapshot is not possible: the VM is Running",
    );
    vmm.call(Call::Pause).unwrap();
    assert_failure(
        vmm.call(Call::Snapshot(files)),
        FailureKind::InvalidRequest,
        "state: descriptor 0 of 0",
    );
    drop(snapshot);
}

fn refused(snapshot: &Snapshot, kind: FailureKind, start: &str) {
    let result = Vmm::restore(snapshot, |_, _| {});
    assert_failure(result.map(drop), kind, start);
}

#[test]
fn what_is_no_snapshot_is_refused() {
    if !kvm("what_is_no_snapshot_is_refused") {
        return;
    }
    let (mut vmm, _serial) = printing(b'x');
    let snapshot = vmm.snapshot().unwrap();
    let mut whole = Vec::new();
    let mut file = snapshot.state.as_file();
    file.rewind().unwrap();
    file.read_to_end(&mut whole).unwrap();
    let rewrite = |bytes: &[u8]| {
        let mut file = snapshot.state.as_file();
        file.set_len(0).unwrap();
        file.rewind().unwrap();
        file.write_all(bytes).unwrap();
    };
    let bad = FailureKind::BadResource;

    rewrite(b"");
    refused(&snapshot, bad, "state file: this is not a snapshot");
    rewrite(&whole[..whole.len() - 1]);
    refused(&snapshot, bad, "state file: ");
    let mut changed = whole.clone();
    changed[100] ^= 1;
    rewrite(&changed);
    refused(&snapshot, bad, "state file: its checksum");
    changed.clone_from(&whole);
    changed[8] = 2;
    rewrite(&changed);
    refused(&snapshot, bad, "state file: format 2");

    rewrite(&whole);
    let memory = snapshot.memory.as_file();
    let size = memory.metadata().unwrap().len();
    memory.set_len(size - 4096).unwrap();
    refused(&snapshot, bad, "memory file of");
    memory.set_len(size).unwrap();
    assert!(Vmm::restore(&snapshot, |_, _| {}).is_ok());
    // A guest with other memory is at its own peril, and nobody else's.
    memory.write_all_at(&[0xff; 4096], 0x10_0000).unwrap();
    let mut vmm = Vmm::restore(&snapshot, |_, _| {}).unwrap();
    vmm.call(Call::Resume).unwrap();
}

#[test]
fn devices_must_be_those_of_the_snapshot() {
    if !kvm("devices_must_be_those_of_the_snapshot") {
        return;
    }
    let mut setup = Setup::new(Code::new().print_for_ever(b'd').kernel());
    let _serial = setup.serial();
    let pmem = |file| PmemConfig {
        id: "p".into(),
        file,
        read_only: true,
    };
    let file = setup.pass(zeros(2 << 20));
    setup.config.devices.pmem.push(pmem(file));
    let mut vmm = Vmm::run(&setup);
    let snapshot = vmm.snapshot().unwrap();

    let with = |file: File, blk: bool| {
        Vmm::restore(&snapshot, |config, fds| {
            fds.push(file.into());
            if blk {
                config.devices.blk.push(BlkConfig {
                    id: "b".into(),
                    file: 2,
                    read_only: true,
                    ..BlkConfig::default()
                });
            } else {
                config.devices.pmem.push(pmem(2));
            }
        })
        .map(drop)
    };
    assert_failure(
        Vmm::restore(&snapshot, |_, _| {}).map(drop),
        FailureKind::InvalidRequest,
        "the snapshot has a pmem device in slot 1, and no other is given for it",
    );
    assert_failure(
        with(zeros(2 << 20), true),
        FailureKind::InvalidRequest,
        "the snapshot has a pmem device in slot 1, and no other is given for it",
    );
    assert_failure(
        with(zeros(4 << 20), false),
        FailureKind::BadResource,
        "device 1 (p): its file has 4194304 bytes and had 2097152",
    );
    with(zeros(2 << 20), false).unwrap();
}
