// SPDX-License-Identifier: Apache-2.0
//! A vCPU's registers where a kernel is entered: 32-bit protected mode, flat
//! segments, no paging, and the address of what describes the machine.

use kvm_bindings::{kvm_msr_entry, kvm_regs, kvm_segment, Msrs};
use kvm_ioctls::VcpuFd;

use super::{
    boot::{Entry, GDT_LIMIT},
    layout,
};

const CR0_PROTECTED: u64 = 1;
/// Bit 1 of RFLAGS is always set.
const RFLAGS: u64 = 2;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
/// MTRRs on, memory is write-back by default.
const MTRR_WRITE_BACK: u64 = (1 << 11) | 6;

/// Sets the boot processor up to enter the kernel.
pub fn set_entry(vcpu: &VcpuFd, entry: Entry) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    // The selectors are those that Linux' protocol asks for; PVH leaves them open.
    sregs.cs = segment(0xb, 2, 1);
    let data = segment(0x3, 3, 1);
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    // A busy 32-bit TSS, which VT-x insists on.
    sregs.tr = kvm_segment {
        limit: 0x67,
        g: 0,
        db: 0,
        ..segment(0xb, 4, 0)
    };
    sregs.cr0 = CR0_PROTECTED;
    sregs.cr4 = 0;
    sregs.efer = 0;
    let mut regs = kvm_regs {
        rflags: RFLAGS,
        ..Default::default()
    };
    match entry {
        Entry::Pvh(address) => {
            regs.rip = address.into();
            regs.rbx = layout::START_INFO;
        }
        Entry::Linux(address) => {
            sregs.gdt.base = layout::GDT;
            sregs.gdt.limit = GDT_LIMIT;
            regs.rip = address.into();
            regs.rsi = layout::ZERO_PAGE;
        }
    }
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&regs)
}

/// Sets the MSRs that firmware would have set, on every vCPU.
pub fn set_boot_msrs(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let msrs = Msrs::from_entries(&[
        entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(MSR_MTRR_DEFAULT_TYPE, MTRR_WRITE_BACK),
    ])
    .expect("two entries fit");
    // A KVM that lacks one of them stops there; neither is needed to boot.
    vcpu.set_msrs(&msrs).map(|_| ())
}

fn segment(type_: u8, index: u16, s: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: index << 3,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s,
        l: 0,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}
