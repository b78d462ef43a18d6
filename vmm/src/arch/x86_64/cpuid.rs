// SPDX-License-Identifier: Apache-2.0
//! What a vCPU says of itself: what KVM supports, less what a guest must not
//! use, plus what depends on the vCPU.

use kvm_bindings::{kvm_cpuid_entry2, CpuId};

/// Makes the CPUID of vCPU `index` of `count` from what KVM supports.
pub fn for_vcpu(supported: &CpuId, index: u8, count: u8) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        adjust(entry, index, count);
    }
    cpuid
}

/// Leaf of KVM's paravirtual features, and the bit of acknowledging interrupts
/// in memory (KVM_FEATURE_PV_EOI).
const KVM_FEATURES: u32 = 0x4000_0001;
const PV_EOI: u32 = 1 << 6;
/// What QEMU's emulator of processors calls itself, in EBX, ECX and EDX.
const EMULATOR: [u32; 3] = [
    u32::from_le_bytes(*b"TCGT"),
    u32::from_le_bytes(*b"CGTC"),
    u32::from_le_bytes(*b"GTCG"),
];

/// What this host's own hypervisor calls itself.
pub fn host_signature() -> [u32; 3] {
    let leaf = core::arch::x86_64::__cpuid(0x4000_0000);
    [leaf.ebx, leaf.ecx, leaf.edx]
}

/// QEMU's emulator, in which KVM is only tested, may deliver an interrupt that
/// KVM injected a second time, whatever the guest's interrupt flag says, until
/// the guest leaves for the first time: it does not forget the vector at once.
/// A guest that acknowledges interrupts in memory may handle the whole of one
/// before it leaves, and waits for a lock of its own for ever. One that
/// acknowledges by a register leaves right away.
pub fn mend_for_emulator(supported: &mut CpuId, signature: [u32; 3]) {
    if signature != EMULATOR {
        return;
    }
    for entry in supported.as_mut_slice() {
        if entry.function == KVM_FEATURES {
            entry.eax &= !PV_EOI;
        }
    }
}

const VMX: u32 = 1 << 5;
const MONITOR: u32 = 1 << 3;
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const HYPER_THREADING: u32 = 1 << 28;
const SVM: u32 = 1 << 2;

fn adjust(entry: &mut kvm_cpuid_entry2, index: u8, count: u8) {
    let id = u32::from(index);
    match entry.function {
        1 => {
            entry.ebx = (entry.ebx & 0xffff) | (u32::from(count) << 16) | (id << 24);
            // No guests in guests, and no waiting that the host cannot see.
            entry.ecx &= !(VMX | MONITOR);
            // The in-kernel local APIC has both, whatever the host's has; the
            // deadline timer spares the guest its calibration.
            entry.ecx |= X2APIC | TSC_DEADLINE | HYPERVISOR;
            if count > 1 {
                entry.edx |= HYPER_THREADING;
            } else {
                entry.edx &= !HYPER_THREADING;
            }
        }
        // Cores of one package; a core has one thread.
        4 => {
            entry.eax &= 0x3fff;
            let cache_level = (entry.eax >> 5) & 7;
            if cache_level != 0 {
                entry.eax |= (u32::from(count) - 1) << 26;
                if cache_level >= 3 {
                    entry.eax |= (u32::from(count) - 1) << 14;
                }
            }
        }
        // No performance counters: they are the host's.
        0xa => {
            entry.eax = 0;
            entry.ebx = 0;
            entry.ecx = 0;
            entry.edx = 0;
        }
        0xb | 0x1f => {
            entry.edx = id;
            let core_bits = u8::BITS - (count - 1).leading_zeros();
            match entry.index {
                // Threads of a core: one.
                0 => {
                    entry.eax = 0;
                    entry.ebx = 1;
                    entry.ecx = 1 << 8;
                }
                // Cores of the package.
                1 => {
                    entry.eax = core_bits;
                    entry.ebx = u32::from(count);
                    entry.ecx = 1 | (2 << 8);
                }
                level => {
                    entry.eax = 0;
                    entry.ebx = 0;
                    entry.ecx = level;
                }
            }
        }
        0x8000_0001 => entry.ecx &= !SVM,
        // SVM's own leaf.
        0x8000_000a => {
            entry.eax = 0;
            entry.ebx = 0;
            entry.ecx = 0;
            entry.edx = 0;
        }
        0x8000_0008 => {
            let bits = u8::BITS - (count - 1).leading_zeros();
            entry.ecx = (u32::from(count) - 1) | (bits << 12);
        }
        0x8000_001e => {
            entry.eax = id;
            entry.ebx = id;
            entry.ecx = 0;
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: !0,
            ebx: !0,
            ecx: !0,
            edx: !0,
            ..Default::default()
        }
    }

    #[test]
    fn a_guest_sees_a_hypervisor_and_no_virtualisation() {
        let supported = CpuId::from_entries(&[leaf(1, 0), leaf(0x8000_0001, 0)]).unwrap();
        let cpuid = for_vcpu(&supported, 2, 4);
        let [first, extended] = cpuid.as_slice() else {
            panic!("two leaves");
        };
        assert_eq!(first.ecx & VMX, 0);
        assert_eq!(
            first.ecx & (HYPERVISOR | TSC_DEADLINE),
            HYPERVISOR | TSC_DEADLINE
        );
        assert_eq!(first.ebx >> 24, 2);
        assert_eq!((first.ebx >> 16) & 0xff, 4);
        assert_eq!(extended.ecx & SVM, 0);
    }

    #[test]
    fn interrupts_are_acknowledged_by_a_register_in_an_emulator_alone() {
        for (signature, kept) in [([0; 3], PV_EOI), (EMULATOR, 0)] {
            let mut supported = CpuId::from_entries(&[leaf(1, 0), leaf(KVM_FEATURES, 0)]).unwrap();
            mend_for_emulator(&mut supported, signature);
            let [first, features] = supported.as_slice() else {
                panic!("two leaves");
            };
            assert_eq!(first.eax, !0);
            assert_eq!(features.eax, !PV_EOI | kept);
        }
    }

    #[test]
    fn topology_agrees_with_the_apic_ids() {
        for count in [1_u8, 2, 3, 8, 64] {
            let supported = CpuId::from_entries(&[leaf(0xb, 0), leaf(0xb, 1)]).unwrap();
            let cpuid = for_vcpu(&supported, count - 1, count);
            let cores = cpuid.as_slice()[1];
            assert_eq!(cores.edx, u32::from(count - 1));
            assert!(1_u32 << cores.eax >= u32::from(count));
        }
    }
}
