// SPDX-License-Identifier: Apache-2.0
//! Timers of guests that sleep while they are files.

use std::{
    io::Read,
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};

use bulkhead_vmm_api::Call;
use kvm_ioctls::Kvm;

use crate::{
    guest::Code,
    vmm::{kvm, Setup, Snapshot, Vmm, LONG},
};

/// How long a guest sleeps.
const NAP: Duration = Duration::from_secs(1);

/// As many cycles of a guest's time stamp counter.
fn cycles() -> u32 {
    let vm = Kvm::new().unwrap().create_vm().unwrap();
    let khz = vm.create_vcpu(0).unwrap().get_tsc_khz().unwrap();
    u32::try_from(u128::from(khz) * NAP.as_millis()).unwrap()
}

fn next_byte(serial: &mut UnixStream) -> u8 {
    let mut byte = [0];
    serial.read_exact(&mut byte).unwrap();
    byte[0]
}

/// Lets a clone go on; the byte that it prints next.
fn woken(snapshot: &Snapshot) -> u8 {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(LONG)).unwrap();
    let mut vmm = Vmm::restore(snapshot, |config, fds| {
        fds.push(theirs.into());
        config.serial = Some(2);
    })
    .unwrap();
    vmm.call(Call::Resume).unwrap();
    next_byte(&mut ours)
}

#[test]
fn a_guest_that_was_saved_asleep_wakes_up() {
    if !kvm("a_guest_that_was_saved_asleep_wakes_up") {
        return;
    }
    let mut setup = Setup::new(Code::new().sleep(cycles(), b's', b'w').kernel());
    let mut serial = setup.serial();
    let mut vmm = Vmm::run(&setup);
    assert_eq!([(); 2].map(|()| next_byte(&mut serial)), *b"s\n");
    let asleep = Instant::now();
    let snapshot = vmm.snapshot().unwrap();
    let saved_asleep = asleep.elapsed() < NAP;
    // It wakes up itself.
    vmm.call(Call::Resume).unwrap();
    assert_eq!(next_byte(&mut serial), b'w');
    drop(vmm);
    assert!(
        saved_asleep,
        "the machine is too slow to save a guest within {NAP:?}"
    );
    assert_eq!(woken(&snapshot), b'w');
    // And when the time has come long before it is restored.
    std::thread::sleep(NAP);
    assert_eq!(woken(&snapshot), b'w');
}
