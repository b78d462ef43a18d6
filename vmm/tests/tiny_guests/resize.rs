// SPDX-License-Identifier: Apache-2.0
//! Memory that comes and goes, and processors that come later. What a guest does
//! with them takes a real kernel; here is what the VMM does before it has done
//! anything.

use std::{fs, path::PathBuf};

use bulkhead_vmm_api::{Call, DeviceKind, FailureKind, MemConfig, MemoryStatus, MemoryTarget};
use nix::{
    sched::{sched_getaffinity, sched_setaffinity, CpuSet},
    unistd::Pid,
};

use crate::{
    guest::Code,
    vmm::{assert_failure, kvm, Setup, Vmm},
};

const REGION: MemConfig = MemConfig { max_mib: 512 };

fn growing() -> Vmm {
    let mut setup = Setup::new(Code::new().halt().kernel());
    setup.config.devices.mem = Some(REGION);
    Vmm::run(&setup)
}

fn status(target: u32, slots: u32) -> Option<MemoryStatus> {
    Some(MemoryStatus {
        max_mib: REGION.max_mib,
        target_mib: target,
        plugged_mib: 0,
        mapped_mib: slots * 128,
        slots,
    })
}

fn ask(vmm: &mut Vmm, mib: u32) {
    vmm.call(Call::Memory(MemoryTarget { mib })).unwrap();
}

/// Bytes of the process' mappings that are whole parts of memory to come.
/// Neighbours are one mapping to the kernel.
fn parts(vmm: &Vmm) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{}/maps", vmm.child.id())).unwrap();
    let sizes = maps.lines().filter_map(|line| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        Some(number(end)? - number(start)?)
    });
    sizes.filter(|size| size % (128 << 20) == 0).sum()
}

#[test]
fn memory_exists_as_far_as_it_is_asked_for() {
    if !kvm("memory_exists_as_far_as_it_is_asked_for") {
        return;
    }
    let mut vmm = growing();
    assert_eq!(vmm.status().memory, status(0, 0));
    assert_eq!(vmm.status().devices[0].kind, DeviceKind::Mem);
    for (mib, slots) in [
        (2, 1),
        (130, 2),
        (512, 4),
        (300, 3),
        (128, 1),
        (0, 0),
        (256, 2),
    ] {
        ask(&mut vmm, mib);
        assert_eq!(vmm.status().memory, status(mib, slots));
    }
    assert_eq!(parts(&vmm), 256 << 20);
    ask(&mut vmm, 0);
    assert_eq!(parts(&vmm), 0);

    let target = |mib| Call::Memory(MemoryTarget { mib });
    let invalid = FailureKind::InvalidRequest;
    assert_failure(vmm.call(target(514)), invalid, "mib: 514 is more than");
    assert_failure(vmm.call(target(u32::MAX)), invalid, "mib: 4294967295 is");
    assert_failure(vmm.call(target(3)), invalid, "mib: 3 is not a multiple");
    assert_failure(
        vmm.call(Call::Unplug(bulkhead_vmm_api::UnplugTarget { slot: 1 })),
        FailureKind::Unsupported,
        "slot: mem in slot 1 cannot be unplugged",
    );
    assert_eq!(vmm.status().memory, status(0, 0));
    let mut other = Vmm::run(&Setup::new(Code::new().halt().kernel()));
    assert_failure(other.call(target(2)), invalid, "the VM's memory stays");
    assert_eq!(other.status().memory, None);
}

#[test]
fn a_snapshot_has_the_memory_that_came() {
    if !kvm("a_snapshot_has_the_memory_that_came") {
        return;
    }
    let mut vmm = growing();
    ask(&mut vmm, 256);
    let snapshot = vmm.snapshot().unwrap();
    let length = snapshot.memory.as_file().metadata().unwrap().len();
    assert_eq!(length, (32 + 256) << 20);
    let restore = |mem| Vmm::restore(&snapshot, |config, _| config.devices.mem = mem);

    let mut clone = restore(Some(REGION)).unwrap();
    clone.call(Call::Resume).unwrap();
    assert_eq!(clone.status().memory, status(256, 2));
    ask(&mut clone, 512);
    assert_eq!(clone.status().memory, status(512, 4));
    let again = clone.snapshot().unwrap();
    let length = again.memory.as_file().metadata().unwrap().len();
    assert_eq!(length, (32 + 512) << 20);
    ask(&mut clone, 0);
    assert_eq!(clone.status().memory, status(0, 0));

    assert_failure(
        restore(None).map(drop),
        FailureKind::InvalidRequest,
        "the snapshot has a mem device in slot 1, and no other is given for it",
    );
    let smaller = MemConfig { max_mib: 128 };
    assert_failure(
        restore(Some(smaller)).map(drop),
        FailureKind::BadResource,
        "device 1 (mem): it can become 128 MiB and could become 512",
    );
    snapshot.memory.as_file().set_len(32 << 20).unwrap();
    assert_failure(
        restore(Some(REGION)).map(drop),
        FailureKind::BadResource,
        "memory file of 33554432 bytes; the snapshot's guest has 301989888",
    );
}

fn tasks(vmm: &Vmm) -> PathBuf {
    format!("/proc/{}/task", vmm.child.id()).into()
}

fn set_nice(thread: u32, nice: i32) {
    // SAFETY: plain numbers.
    let done = unsafe { libc::setpriority(libc::PRIO_PROCESS, thread, nice) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

fn set_policy(thread: u32, policy: i32) {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the parameters are read, and live until then.
    let done = unsafe { libc::sched_setscheduler(thread as i32, policy, &parameters) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

/// A thread's nice value and policy, as others see them (proc_pid_stat(5): 19
/// and 41, of which 2 are the name).
fn scheduling(vmm: &Vmm, thread: u32) -> (i64, i64) {
    let text = fs::read_to_string(tasks(vmm).join(thread.to_string()).join("stat")).unwrap();
    let (_, rest) = text.rsplit_once(") ").unwrap();
    let field = |number: usize| rest.split(' ').nth(number - 3).unwrap().parse().unwrap();
    (field(19), field(41))
}

#[test]
fn threads_of_processors_are_told_and_can_be_placed() {
    if !kvm("threads_of_processors_are_told_and_can_be_placed") {
        return;
    }
    let mut setup = Setup::new(Code::new().halt().kernel());
    // The guest starts none but the first.
    setup.config.vcpus = 3;
    let mut vmm = Vmm::run(&setup);
    let threads = vmm.status().vcpu_threads;
    assert_eq!(threads.len(), 3);
    for (index, thread) in threads.iter().enumerate() {
        let name = fs::read_to_string(tasks(&vmm).join(thread.to_string()).join("comm")).unwrap();
        assert_eq!(name.trim(), format!("vcpu{index}"));
    }
    let mut one = CpuSet::new();
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let first = (0..CpuSet::count()).find(|cpu| allowed.is_set(*cpu).unwrap());
    one.set(first.unwrap()).unwrap();
    let thread = Pid::from_raw(threads[2] as i32);
    sched_setaffinity(thread, &one).unwrap();
    assert_eq!(sched_getaffinity(thread).unwrap(), one);
    // Each by itself.
    set_nice(threads[1], 7);
    set_policy(threads[2], libc::SCHED_BATCH);
    let usual = i64::from(libc::SCHED_OTHER);
    let all = [0, 1, 2].map(|index: usize| scheduling(&vmm, threads[index]));
    assert_eq!(all, [(0, usual), (7, usual), (0, libc::SCHED_BATCH.into())]);

    // Those that were never started come back as such.
    let snapshot = vmm.snapshot().unwrap();
    let mut clone = Vmm::restore(&snapshot, |_, _| {}).unwrap();
    assert!(clone.status().vcpu_threads.is_empty());
    clone.call(Call::Resume).unwrap();
    assert_eq!(clone.status().vcpu_threads.len(), 3);
    assert_eq!(clone.status().vcpus.len(), 3);
}
