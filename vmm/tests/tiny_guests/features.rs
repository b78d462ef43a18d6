// SPDX-License-Identifier: Apache-2.0
//! Snapshots of guests with features that this host has not.

use std::{arch::x86_64::__cpuid_count, fs::File, io::Read};

use bulkhead_vmm::snapshot::format::StateFile;
use bulkhead_vmm_api::{Call, FailureKind, VmState};
use kvm_bindings::kvm_cpuid_entry2;

use crate::{
    guest::{contents, Code},
    vmm::{assert_failure, kvm, Setup, Snapshot, Vmm},
};

/// Kind of the sections of vCPUs.
const VCPU: u32 = 2;

/// The state file with CPUID changed of the vCPU with that number.
fn changed(file: &[u8], number: usize, change: impl FnMut(&mut kvm_cpuid_entry2)) -> Vec<u8> {
    let mut state = StateFile::decode(file).unwrap();
    let mut vcpus = state.sections.iter_mut().filter(|s| s.kind == VCPU);
    let section = vcpus.nth(number).unwrap();
    // What a vCPU was told comes first.
    let (mut cpuid, rest): (Vec<kvm_cpuid_entry2>, _) =
        postcard::take_from_bytes(&section.content).unwrap();
    cpuid.iter_mut().for_each(change);
    section.content = [&postcard::to_stdvec(&cpuid).unwrap(), rest]
        .concat()
        .into();
    state.encode()
}

fn bytes(file: &File) -> Vec<u8> {
    use std::io::Seek;

    let mut bytes = Vec::new();
    let mut file = file;
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

fn restored(snapshot: &Snapshot, state: &[u8]) -> Result<Vmm, bulkhead_vmm_api::Failure> {
    let changed = contents(state);
    Vmm::restore(snapshot, |_, fds| {
        fds[0] = changed.try_clone().unwrap().into()
    })
}

#[test]
fn a_guest_with_a_feature_that_is_not_here_is_refused() {
    if !kvm("a_guest_with_a_feature_that_is_not_here_is_refused") {
        return;
    }
    let mut setup = Setup::new(Code::new().spin().kernel());
    setup.config.vcpus = 2;
    let mut vmm = Vmm::run(&setup);
    let snapshot = vmm.snapshot().unwrap();
    drop(vmm);
    let state = bytes(snapshot.state.as_file());

    // One that neither the processor has nor KVM makes up for.
    let ours = changed(&state, 0, |_| {});
    assert_eq!(ours, state);
    let mut bit = 0;
    changed(&state, 0, |leaf| {
        if (leaf.function, leaf.index) == (7, 0) {
            let absent = !leaf.edx & !__cpuid_count(7, 0).edx;
            bit = 1_u32 << absent.trailing_zeros();
        }
    });
    assert_ne!(bit, 0, "no leaf 7");
    for number in [0, 1] {
        let more = changed(&state, number, |leaf| {
            if (leaf.function, leaf.index) == (7, 0) {
                leaf.edx |= bit;
            }
        });
        let message = format!("KVM: CPUID: the snapshot's vCPUs have features that this host has not: leaf 0x7, subleaf 0, EDX {bit:#010x}");
        let outcome = restored(&snapshot, &more).map(drop);
        assert_failure(outcome, FailureKind::BadResource, &message);
    }
    // One less is nothing to miss, and neither are other numbers.
    let less = changed(&state, 0, |leaf| match (leaf.function, leaf.index) {
        (7, 0) => leaf.ebx = 0,
        (1, _) => leaf.ebx |= 0xff00_0000,
        _ => {}
    });
    let mut vmm = restored(&snapshot, &less).unwrap();
    assert_eq!(vmm.status().state, VmState::Paused);
    vmm.call(Call::Shutdown).unwrap();
}
