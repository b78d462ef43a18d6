// SPDX-License-Identifier: Apache-2.0
//! Whether a host has the features that a saved vCPU was told of. KVM takes any
//! CPUID, and a guest that then uses what is not there dies of it much later.
//!
//! The processor is asked first, which takes a few instructions. What it has,
//! works, also where KVM would not offer it; if it takes registers of its own
//! which KVM does not know, those cannot be restored, and that is found. Only for
//! what the processor has not, KVM is asked, which takes longer: it may make up
//! for it.

use core::arch::x86_64::{__cpuid, __cpuid_count};
use std::sync::OnceLock;

use kvm_bindings::kvm_cpuid_entry2;

/// The registers of a leaf.
type Registers = [u32; 4];
const NAMES: [&str; 4] = ["EAX", "EBX", "ECX", "EDX"];

/// Bits of leaves that are features: one more can be something that is missing.
/// All others are numbers, ids, sizes, or describe what belongs to a feature.
const FEATURES: [(u32, u32, Registers); 13] = [
    (0x1, 0, [0, 0, !OSXSAVE, !0]),
    (0x7, 0, [0, !0, !OSPKE, !0]),
    (0x7, 1, [!0, !0, !0, !0]),
    (0x7, 2, [0, 0, 0, !0]),
    // Parts of the extended state, and what saves it.
    (0xd, 0, [!0, 0, 0, !0]),
    (0xd, 1, [!0, 0, !0, !0]),
    (0x1e, 1, [!0, 0, 0, 0]),
    // Widths of vectors.
    (0x24, 0, [0, 7 << 16, 0, 0]),
    (KVM_FEATURES, 0, [!0, 0, 0, 0]),
    (0x8000_0001, 0, [0, 0, !0, !0]),
    (0x8000_0007, 0, [0, 0, 0, !0]),
    (0x8000_0008, 0, [0, !0, 0, 0]),
    (0x8000_0021, 0, [!0, 0, 0, 0]),
];

/// What the guest's kernel has done with a feature: it changes as the guest runs.
const OSXSAVE: u32 = 1 << 27;
const OSPKE: u32 = 1 << 4;

/// Leaf of what KVM itself has for its guests.
const KVM_FEATURES: u32 = 0x4000_0001;

/// What every KVM makes up for: x2APIC, the deadline timer, that there is a
/// hypervisor; that there are several processors; adjusting the TSC; and of
/// itself, all that Linux 5.10 has.
const MADE_UP: [(u32, u32, Registers); 3] = [
    (0x1, 0, [0, 0, 1 << 21 | 1 << 24 | 1 << 31, 1 << 28]),
    (0x7, 0, [0, 1 << 1, 0, 0]),
    (KVM_FEATURES, 0, [0x0100_7efb, 0, 0, 0]),
];

/// Features that a saved vCPU has, and a host has not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the snapshot's vCPUs have features that this host has not: leaf {leaf:#x}, subleaf {subleaf}, {register} {bits:#010x}"
)]
pub struct Missing {
    /// Of CPUID.
    pub leaf: u32,
    /// Its subleaf.
    pub subleaf: u32,
    /// Where they are told of.
    pub register: &'static str,
    /// All that are missing of that register's.
    pub bits: u32,
}

/// The registers of a leaf among entries; zeros where it is not there.
pub fn find(entries: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32) -> Registers {
    let found = entries
        .iter()
        .find(|entry| entry.function == leaf && entry.index == subleaf);
    found.map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
}

/// The first register of `saved` with features that are not `here`, which is
/// asked only for leaves in which there are some.
pub fn missing(
    saved: &[kvm_cpuid_entry2],
    mut here: impl FnMut(u32, u32) -> Registers,
) -> Option<Missing> {
    FEATURES.iter().find_map(|(leaf, subleaf, features)| {
        let made_up = MADE_UP.iter().find(|(l, s, _)| (l, s) == (leaf, subleaf));
        let made_up = made_up.map_or([0; 4], |(_, _, registers)| *registers);
        let mut wanted = find(saved, *leaf, *subleaf);
        for (register, wanted) in wanted.iter_mut().enumerate() {
            *wanted &= features[register] & !made_up[register];
        }
        if wanted == [0; 4] {
            return None;
        }
        let here = here(*leaf, *subleaf);
        (0..4).find_map(|register| match wanted[register] & !here[register] {
            0 => None,
            bits => Some(Missing {
                leaf: *leaf,
                subleaf: *subleaf,
                register: NAMES[register],
                bits,
            }),
        })
    })
}

/// What this processor says; zeros for leaves that it does not have, and for
/// those of a hypervisor, which are not for guests.
pub fn of_processor(leaf: u32, subleaf: u32) -> Registers {
    // Where this host is a guest itself, each of these takes some microseconds.
    static LAST: OnceLock<[u32; 2]> = OnceLock::new();
    let last = LAST.get_or_init(|| [0, EXTENDED].map(|range| __cpuid(range).eax));
    let last = match leaf & 0xf000_0000 {
        0 => last[0],
        EXTENDED => last[1],
        _ => return [0; 4],
    };
    if leaf > last {
        return [0; 4];
    }
    let found = __cpuid_count(leaf, subleaf);
    [found.eax, found.ebx, found.ecx, found.edx]
}

/// Where leaves begin that others than Intel thought of.
const EXTENDED: u32 = 0x8000_0000;

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(leaf: u32, subleaf: u32, registers: Registers) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 {
            function: leaf,
            index: subleaf,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    #[test]
    fn each_feature_that_is_not_here_is_missed() {
        for (leaf, subleaf, features) in FEATURES {
            for register in 0..4 {
                for bit in 0..32 {
                    let mut registers = [0; 4];
                    registers[register] = 1 << bit;
                    let saved = [entry(leaf, subleaf, registers)];
                    let made_up = MADE_UP.iter().any(|(l, s, bits)| {
                        (*l, *s) == (leaf, subleaf) && bits[register] & (1 << bit) != 0
                    });
                    let found = missing(&saved, |_, _| [0; 4]);
                    let is_feature = features[register] & (1 << bit) != 0;
                    assert_eq!(found.is_some(), is_feature && !made_up, "{saved:?}");
                    if let Some(found) = found {
                        let all = (found.leaf, found.subleaf, found.bits);
                        assert_eq!(all, (leaf, subleaf, 1 << bit));
                        assert_eq!(found.register, NAMES[register]);
                    }
                    assert_eq!(missing(&saved, |_, _| registers), None);
                }
            }
        }
    }

    #[test]
    fn only_leaves_with_features_are_asked_for() {
        let saved = [
            entry(0x1, 0, [7, 7, 1 << 31, 0]),
            entry(0x7, 0, [2, 1, 0, 0]),
            entry(0x80_0000, 0, [!0; 4]),
        ];
        let mut asked = Vec::new();
        let found = missing(&saved, |leaf, subleaf| {
            asked.push((leaf, subleaf));
            [0, 3, 0, 0]
        });
        assert_eq!((found, asked), (None, vec![(0x7, 0)]));
        let text = missing(&saved, |_, _| [0; 4]).unwrap().to_string();
        assert!(
            text.ends_with("leaf 0x7, subleaf 0, EBX 0x00000001"),
            "{text}"
        );
    }

    #[test]
    fn this_processor_has_what_it_has() {
        // SSE2, without which there is no 64-bit processor.
        assert_ne!(of_processor(1, 0)[3] & 1 << 26, 0);
        assert_eq!(of_processor(0x0fff_ffff, 0), [0; 4]);
        assert_eq!(of_processor(KVM_FEATURES, 0), [0; 4]);
    }
}
