// SPDX-License-Identifier: Apache-2.0
//! Clocks and timers that go on, with vCPUs that do not run.

use kvm_bindings::KVM_CLOCK_REALTIME;
use vm_memory::GuestMemoryMmap;

use super::*;
use crate::{
    arch::x86_64::{cpuid, regs},
    kvm::vm::Vm,
    memory,
};

const SECOND: u64 = 1_000_000_000;
/// Local vector table entry of the timer: its mode, and that it is masked.
const DEADLINE_MODE: u32 = 2 << 17;
const PERIODIC: u32 = 1 << 17;
const MASKED: u32 = 1 << 16;
const VECTOR: u32 = 0x55;

struct Host {
    kvm: Kvm,
    vm: Vm,
    vcpu: VcpuFd,
}

/// A machine of one vCPU; none where there is no KVM.
fn host(test: &str) -> Option<Host> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            println!("SKIPPED: {test}: /dev/kvm: {error}");
            return None;
        }
    };
    let memory: GuestMemoryMmap =
        memory::allocate(32 << 20, bulkhead_vmm_api::Pages::Small).unwrap();
    let vm = Vm::new(&kvm, &memory).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let supported = supported_cpuid(&kvm).unwrap();
    vcpu.set_cpuid2(&cpuid::for_vcpu(&supported, 0, 1)).unwrap();
    regs::set_boot_msrs(&vcpu).unwrap();
    Some(Host { kvm, vm, vcpu })
}

impl Host {
    fn save(&self) -> VcpuState {
        let msrs = msrs_to_save(&self.kvm).unwrap();
        VcpuState::save(&self.vcpu, &msrs, xsave_size(&self.kvm)).unwrap()
    }

    fn restore(&self, state: &VcpuState) -> Result<(), KvmError> {
        state.restore(&self.vcpu, xsave_size(&self.kvm), true)
    }

    fn msr(&self, index: u32) -> u64 {
        read_msrs(&self.vcpu, &[index]).unwrap()[0].1
    }
}

fn set_msr(state: &mut VcpuState, index: u32, value: u64) {
    let found = state.msrs.iter_mut().find(|(i, _)| *i == index);
    found.expect("KVM saves it").1 = value;
}

fn set_timer(state: &mut VcpuState, entry: u32) {
    for (to, from) in state.lapic.regs[0x320..]
        .iter_mut()
        .zip(entry.to_le_bytes())
    {
        *to = from as _;
    }
}

/// Nanoseconds of a restored clock that was at ten seconds three seconds ago.
fn restored_clock(host: &Host, flags: u32) -> u64 {
    let then = realtime_ns() - 3 * SECOND;
    let state = VmState {
        irqchips: Vec::new(),
        clock: kvm_clock_data {
            clock: 10 * SECOND,
            flags,
            realtime: then,
            ..Default::default()
        },
        realtime_ns: then,
    };
    state.restore_clock(host.vm.fd()).unwrap();
    host.vm.fd().get_clock().unwrap().clock
}

#[test]
fn the_paravirtual_clock_goes_on_while_the_machine_is_a_file() {
    let name = "the_paravirtual_clock_goes_on_while_the_machine_is_a_file";
    let Some(host) = host(name) else { return };
    // With the kernel's own sense of time, and without.
    for flags in [KVM_CLOCK_REALTIME, 0] {
        let clock = restored_clock(&host, flags);
        let expected = 13 * SECOND..18 * SECOND;
        assert!(expected.contains(&clock), "flags {flags}: {clock} ns");
    }
    // A host whose clock was set back: none of it passed.
    let then = realtime_ns() + 3600 * SECOND;
    let mut state = VmState::save(host.vm.fd()).unwrap();
    state.clock.clock = 10 * SECOND;
    (state.clock.flags, state.realtime_ns) = (0, then);
    state.restore_clock(host.vm.fd()).unwrap();
    let clock = host.vm.fd().get_clock().unwrap().clock;
    assert!((10 * SECOND..15 * SECOND).contains(&clock), "{clock} ns");
}

#[test]
fn a_deadline_that_just_passed_is_saved_as_one_that_fires_at_once() {
    let name = "a_deadline_that_just_passed_is_saved_as_one_that_fires_at_once";
    let Some(host) = host(name) else { return };
    let mended = |entry, deadline| {
        let mut state = host.save();
        set_timer(&mut state, entry);
        set_msr(&mut state, MSR_TSC, 7_000_000_000);
        set_msr(&mut state, MSR_TSC_DEADLINE, deadline);
        state.mend_deadline();
        state.msr(MSR_TSC_DEADLINE).unwrap()
    };
    assert_eq!(mended(VECTOR | DEADLINE_MODE, 0), 7_000_000_000);
    // There is one; nobody waits for it; it is no deadline timer.
    assert_eq!(mended(VECTOR | DEADLINE_MODE, 5), 5);
    assert_eq!(mended(VECTOR | DEADLINE_MODE | MASKED, 0), 0);
    assert_eq!(mended(VECTOR | PERIODIC, 0), 0);
    assert_eq!(mended(VECTOR, 0), 0);
}

#[test]
fn a_restored_timer_is_armed_for_the_same_deadline() {
    let name = "a_restored_timer_is_armed_for_the_same_deadline";
    let Some(saved) = host(name) else { return };
    let mut state = saved.save();
    let hour = u64::from(state.tsc_khz) * 1000 * 3600;
    let now = state.msr(MSR_TSC).unwrap();
    set_timer(&mut state, VECTOR | DEADLINE_MODE);
    set_msr(&mut state, MSR_TSC_DEADLINE, now + hour);

    let clone = host(name).unwrap();
    clone.restore(&state).unwrap();
    assert_eq!(clone.msr(MSR_TSC_DEADLINE), now + hour);
    // And it is saved again.
    assert_eq!(clone.save().msr(MSR_TSC_DEADLINE), Some(now + hour));

    // One that passed while it was a file is not armed, and nothing is wrong.
    set_msr(&mut state, MSR_TSC_DEADLINE, now / 2);
    host(name).unwrap().restore(&state).unwrap();

    // A timer that cannot take it is not left without a word.
    set_msr(&mut state, MSR_TSC_DEADLINE, now + hour);
    set_timer(&mut state, VECTOR | PERIODIC);
    let error = host(name).unwrap().restore(&state).unwrap_err();
    assert!(error.to_string().starts_with("KVM: timer: "), "{error}");
}

#[test]
fn the_time_stamp_counter_goes_on_from_where_it_was() {
    let name = "the_time_stamp_counter_goes_on_from_where_it_was";
    let Some(saved) = host(name) else { return };
    let mut state = saved.save();
    let second = u64::from(state.tsc_khz) * 1000;
    let far = 1_000_000_000 * second;
    write_msrs(&saved.vcpu, &[(MSR_TSC, far)]).unwrap();
    if saved.msr(MSR_TSC) < far {
        println!("SKIPPED: {name}: here all guests have the host's time stamp counter");
        return;
    }
    // Of a guest that is younger than a second, too.
    for tsc in [second / 2, 3 * second, 1_000_000 * second] {
        set_msr(&mut state, MSR_TSC, tsc);
        let clone = host(name).unwrap();
        clone.restore(&state).unwrap();
        let now = clone.msr(MSR_TSC);
        assert!((tsc..tsc + 5 * second).contains(&now), "{tsc}: {now}");
        // Another vCPU of the machine agrees with the first.
        let second_vcpu = clone.vm.create_vcpu(1).unwrap();
        state
            .restore(&second_vcpu, xsave_size(&clone.kvm), false)
            .unwrap();
        let [first, other] =
            [&clone.vcpu, &second_vcpu].map(|vcpu| read_msrs(vcpu, &[MSR_TSC]).unwrap()[0].1);
        assert!(other.abs_diff(first) < second, "{first} {other}");
    }
}

#[test]
fn a_counter_of_another_speed_is_scaled_or_refused() {
    let name = "a_counter_of_another_speed_is_scaled_or_refused";
    let Some(saved) = host(name) else { return };
    let here = saved.vcpu.get_tsc_khz().unwrap();
    let mut state = saved.save();
    assert_eq!(state.tsc_khz, here);
    // Nobody minds so little, and nothing is done about it.
    state.tsc_khz = here + here / 10_000;
    saved.restore(&state).unwrap();
    assert_eq!(saved.vcpu.get_tsc_khz().unwrap(), here);
    for other in [here / 10 * 9, here / 10 * 15] {
        state.tsc_khz = other;
        let clone = host(name).unwrap();
        match clone.restore(&state) {
            Ok(()) => assert_eq!(clone.vcpu.get_tsc_khz().unwrap(), other),
            Err(error) => {
                let told = format!(
                    "KVM: TSC frequency: the snapshot's is {other} kHz, this host's {here} kHz and it cannot scale it"
                );
                assert_eq!(error.to_string(), told);
            }
        }
    }
}

#[test]
fn features_of_this_host_are_here() {
    let Some(host) = host("features_of_this_host_are_here") else {
        return;
    };
    let mut state = host.save();
    check_features(std::slice::from_ref(&state), &host.kvm).unwrap();
    // Also when KVM must be asked, for what the processor does not have.
    let supported = supported_cpuid(&host.kvm).unwrap();
    let made_up = features::missing(supported.as_slice(), features::of_processor);
    println!("made up by KVM: {made_up:?}");
    let leaf = state
        .cpuid
        .iter_mut()
        .find(|leaf| leaf.function == 7)
        .unwrap();
    leaf.edx = !0;
    let error = check_features(&[state], &host.kvm).unwrap_err();
    assert!(
        error.to_string().contains("leaf 0x7, subleaf 0, EDX"),
        "{error}"
    );
}
