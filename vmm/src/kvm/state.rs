// SPDX-License-Identifier: Apache-2.0
//! What KVM keeps of a machine: vCPUs, interrupt controllers and the clock,
//! saved and restored.
//!
//! The order of restoring matters, and KVM does not complain about a wrong
//! one: the local APIC before the MSRs, or the deadline timer is lost; the
//! deadline after the time stamp counter it is compared with.

#[cfg(test)]
mod tests;

use std::time::{SystemTime, UNIX_EPOCH};

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, CpuId, Msrs, Xsave,
    KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_CPUID_ENTRIES,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::{failed, vm::supported_cpuid, KvmError};
use crate::arch::x86_64::features;

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// Memory type ranges: KVM has them and leaves them out of its list. The
/// default type, the fixed ranges, and eight variable ones.
const MSR_MTRRS: [std::ops::RangeInclusive<u32>; 5] = [
    0x2ff..=0x2ff,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    0x200..=0x20f,
];
/// Parts of a million that clocks may differ by without anybody minding.
const TSC_TOLERANCE_PPM: u64 = 250;
/// Size of the fixed part of the extended processor state, in words.
const XSAVE_WORDS: usize = 1024;

/// One vCPU.
#[derive(Clone, Serialize, Deserialize)]
pub struct VcpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    tsc_khz: u32,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Vec<u32>,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
}

/// The rest of the machine.
#[derive(Clone, Serialize, Deserialize)]
pub struct VmState {
    /// Both interrupt controllers of old and the I/O APIC.
    irqchips: Vec<kvm_irqchip>,
    clock: kvm_clock_data,
    /// Wall-clock nanoseconds since 1970 when the clock was read.
    realtime_ns: u64,
}

/// Which MSRs there are to save.
pub fn msrs_to_save(kvm: &Kvm) -> Result<Vec<u32>, KvmError> {
    let list = kvm.get_msr_index_list().map_err(failed("list of MSRs"))?;
    let mut all: Vec<u32> = list.as_slice().to_vec();
    all.extend(MSR_MTRRS.into_iter().flatten());
    all.sort_unstable();
    all.dedup();
    Ok(all)
}

/// Bytes of extended state that a vCPU of this host has.
pub fn xsave_size(kvm: &Kvm) -> usize {
    usize::try_from(kvm.check_extension_int(Cap::Xsave2))
        .unwrap_or(0)
        .max(XSAVE_WORDS * 4)
}

/// Refuses vCPUs that have features which this host has not.
///
/// # Errors
/// It has not; KVM does not say.
pub fn check_features(vcpus: &[VcpuState], kvm: &Kvm) -> Result<(), KvmError> {
    let mut all = vcpus.iter().map(|vcpu| &vcpu.cpuid);
    let Some(first) = all.next() else {
        return Ok(());
    };
    // All have the same, if nobody has changed the file.
    let others = all.filter(|other| {
        let here = |leaf, subleaf| features::find(first, leaf, subleaf);
        features::missing(other, here).is_some()
    });
    for cpuid in std::iter::once(first).chain(others) {
        if features::missing(cpuid, features::of_processor).is_none() {
            continue;
        }
        let supported = supported_cpuid(kvm)?;
        let here = |leaf, subleaf| {
            let mut all = features::of_processor(leaf, subleaf);
            let made_up = features::find(supported.as_slice(), leaf, subleaf);
            all.iter_mut()
                .zip(made_up)
                .for_each(|(all, bits)| *all |= bits);
            all
        };
        if let Some(missing) = features::missing(cpuid, here) {
            return Err(KvmError::unfit("CPUID", missing.to_string()));
        }
    }
    Ok(())
}

impl VcpuState {
    /// Reads a vCPU that rests outside of the guest with nothing half done.
    pub fn save(vcpu: &VcpuFd, msrs: &[u32], xsave_size: usize) -> Result<Self, KvmError> {
        // First: reading it may change what the events say.
        let mp_state = vcpu.get_mp_state().map_err(failed("run state"))?;
        let cpuid = vcpu
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("CPUID"))?;
        let mut state = Self {
            cpuid: cpuid.as_slice().to_vec(),
            tsc_khz: vcpu.get_tsc_khz().map_err(failed("TSC frequency"))?,
            mp_state,
            regs: vcpu.get_regs().map_err(failed("registers"))?,
            sregs: vcpu.get_sregs().map_err(failed("system registers"))?,
            xsave: read_xsave(vcpu, xsave_size)?,
            xcrs: vcpu.get_xcrs().map_err(failed("extended control"))?,
            debug_regs: vcpu.get_debug_regs().map_err(failed("debug registers"))?,
            lapic: vcpu.get_lapic().map_err(failed("local APIC"))?,
            msrs: read_msrs(vcpu, msrs)?,
            events: vcpu.get_vcpu_events().map_err(failed("events"))?,
        };
        state.mend_deadline();
        Ok(state)
    }

    /// A deadline that has just passed reads as zero, which would disarm the
    /// timer: it fires at once instead.
    fn mend_deadline(&mut self) {
        /// Timer mode of the local vector table entry: TSC deadline.
        const DEADLINE_MODE: u32 = 2 << 17;
        const TIMER_ENTRY: usize = 0x320;
        const MASKED: u32 = 1 << 16;
        let mut entry = [0; 4];
        for (to, from) in entry.iter_mut().zip(&self.lapic.regs[TIMER_ENTRY..]) {
            *to = *from as u8;
        }
        let entry = u32::from_le_bytes(entry);
        if entry & (3 << 17) != DEADLINE_MODE || entry & MASKED != 0 {
            return;
        }
        let now = self.msr(MSR_TSC).unwrap_or(1);
        if let Some((_, deadline)) = self.msrs.iter_mut().find(|(i, _)| *i == MSR_TSC_DEADLINE) {
            if *deadline == 0 {
                *deadline = now;
            }
        }
    }

    fn msr(&self, index: u32) -> Option<u64> {
        let found = self.msrs.iter().find(|(i, _)| *i == index);
        found.map(|(_, value)| *value)
    }

    /// Writes it to a new vCPU; `set_apart`: no other has
    /// its state yet.
    pub fn restore(
        &self,
        vcpu: &VcpuFd,
        xsave_size: usize,
        set_apart: bool,
    ) -> Result<(), KvmError> {
        let cpuid = CpuId::from_entries(&self.cpuid)
            .map_err(|_| KvmError::unfit("CPUID", "too many entries"))?;
        vcpu.set_cpuid2(&cpuid).map_err(failed("CPUID"))?;
        self.restore_tsc_frequency(vcpu)?;
        vcpu.set_mp_state(self.mp_state)
            .map_err(failed("run state"))?;
        vcpu.set_regs(&self.regs).map_err(failed("registers"))?;
        vcpu.set_sregs(&self.sregs)
            .map_err(failed("system registers"))?;
        write_xsave(vcpu, &self.xsave, xsave_size)?;
        vcpu.set_xcrs(&self.xcrs)
            .map_err(failed("extended control"))?;
        vcpu.set_debug_regs(&self.debug_regs)
            .map_err(failed("debug registers"))?;
        vcpu.set_lapic(&self.lapic).map_err(failed("local APIC"))?;
        let last = |(index, _): &&(u32, u64)| *index == MSR_TSC_DEADLINE;
        let first: Vec<_> = self.msrs.iter().filter(|m| !last(m)).copied().collect();
        if set_apart {
            self.part_from_start(vcpu)?;
        }
        write_msrs(vcpu, &first)?;
        self.restore_deadline(vcpu)?;
        vcpu.set_vcpu_events(&self.events).map_err(failed("events"))
    }

    /// Kernels before 6.8 take a write to a TSC for one that is to agree with
    /// the last, if both are less than a second apart, and leave it as it is.
    /// The last is the new machine's zero, and a guest may well be younger than
    /// a second. So a far value comes between. For the other vCPUs agreeing is
    /// right.
    fn part_from_start(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        const FAR_SECONDS: u64 = 20;
        let tsc = self.msr(MSR_TSC).unwrap_or(0);
        let far = tsc.wrapping_add(u64::from(self.tsc_khz) * 1000 * FAR_SECONDS);
        write_msrs(vcpu, &[(MSR_TSC, far)])
    }

    /// A guest that counts time by its TSC must find it as fast as it was.
    fn restore_tsc_frequency(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        let here = vcpu.get_tsc_khz().map_err(failed("TSC frequency"))?;
        let difference = u64::from(here.abs_diff(self.tsc_khz));
        if difference * 1_000_000 <= u64::from(self.tsc_khz) * TSC_TOLERANCE_PPM {
            return Ok(());
        }
        vcpu.set_tsc_khz(self.tsc_khz).map_err(|_| {
            KvmError::unfit(
                "TSC frequency",
                format!(
                    "the snapshot's is {} kHz, this host's {here} kHz and it cannot scale it",
                    self.tsc_khz
                ),
            )
        })
    }

    fn restore_deadline(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        let Some(deadline) = self.msr(MSR_TSC_DEADLINE).filter(|value| *value != 0) else {
            return Ok(());
        };
        write_msrs(vcpu, &[(MSR_TSC_DEADLINE, deadline)])?;
        // One that has passed reads as zero; KVM ignores the write without a
        // word when the local APIC is not in deadline mode.
        let read = read_msrs(vcpu, &[MSR_TSC_DEADLINE, MSR_TSC])?;
        match read[..] {
            [(MSR_TSC_DEADLINE, 0), (MSR_TSC, now)] if now < deadline => Err(KvmError::unfit(
                "timer",
                "the local APIC did not take the deadline",
            )),
            _ => Ok(()),
        }
    }
}

/// Words of extended state.
fn read_xsave(vcpu: &VcpuFd, size: usize) -> Result<Vec<u32>, KvmError> {
    if size <= XSAVE_WORDS * 4 {
        let xsave = vcpu.get_xsave().map_err(failed("extended state"))?;
        return Ok(xsave.region.to_vec());
    }
    let mut xsave = new_xsave(size / 4 - XSAVE_WORDS)?;
    // SAFETY: the buffer has the size that KVM says it writes.
    unsafe { vcpu.get_xsave2(&mut xsave) }.map_err(failed("extended state"))?;
    let mut words = xsave.as_fam_struct_ref().xsave.region.to_vec();
    words.extend_from_slice(xsave.as_slice());
    Ok(words)
}

fn new_xsave(extra: usize) -> Result<Xsave, KvmError> {
    Xsave::new(extra).map_err(|_| KvmError::unfit("extended state", "too large"))
}

fn write_xsave(vcpu: &VcpuFd, words: &[u32], size: usize) -> Result<(), KvmError> {
    if words.len() < XSAVE_WORDS || words.len() * 4 > size {
        return Err(KvmError::unfit(
            "extended state",
            format!(
                "the snapshot's has {} bytes, this host's {size}",
                words.len() * 4
            ),
        ));
    }
    let mut xsave = new_xsave(size.div_ceil(4) - XSAVE_WORDS)?;
    let (fixed, extra) = words.split_at(XSAVE_WORDS);
    xsave.as_mut_slice()[..extra.len()].copy_from_slice(extra);
    // SAFETY: the number of words after the header stays as it is.
    unsafe { xsave.as_mut_fam_struct() }
        .xsave
        .region
        .copy_from_slice(fixed);
    // SAFETY: the buffer has the size that KVM says it reads.
    unsafe { vcpu.set_xsave2(&xsave) }.map_err(failed("extended state"))
}

/// Reads those that can be read: KVM lists some that a vCPU without the
/// feature they belong to does not have.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, KvmError> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let entries: Vec<_> = rest
            .iter()
            .map(|index| kvm_msr_entry {
                index: *index,
                ..Default::default()
            })
            .collect();
        let mut msrs = Msrs::from_entries(&entries)
            .map_err(|_| KvmError::unfit("MSRs", "too many of them"))?;
        let done = vcpu.get_msrs(&mut msrs).map_err(failed("MSRs"))?;
        let read = &msrs.as_slice()[..done];
        values.extend(read.iter().map(|entry| (entry.index, entry.data)));
        // It stops at the first that it does not have.
        rest = rest.get(done + 1..).unwrap_or_default();
    }
    Ok(values)
}

/// Writes them, up to those that hold what they should anyway: some can only
/// be read.
fn write_msrs(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<(), KvmError> {
    let mut rest = values;
    while !rest.is_empty() {
        let entries: Vec<_> = rest
            .iter()
            .map(|(index, data)| kvm_msr_entry {
                index: *index,
                data: *data,
                ..Default::default()
            })
            .collect();
        let msrs = Msrs::from_entries(&entries)
            .map_err(|_| KvmError::unfit("MSRs", "too many of them"))?;
        let done = vcpu.set_msrs(&msrs).map_err(failed("MSRs"))?;
        let Some((index, wanted)) = rest.get(done) else {
            return Ok(());
        };
        if read_msrs(vcpu, &[*index])?.first() != Some(&(*index, *wanted)) {
            return Err(KvmError::unfit(
                "MSRs",
                format!("{index:#x} cannot be {wanted:#x} on this host"),
            ));
        }
        rest = &rest[done + 1..];
    }
    Ok(())
}

impl VmState {
    /// Reads it while all vCPUs rest.
    pub fn save(vm: &VmFd) -> Result<Self, KvmError> {
        let mut irqchips = Vec::new();
        for chip_id in [
            KVM_IRQCHIP_PIC_MASTER,
            KVM_IRQCHIP_PIC_SLAVE,
            KVM_IRQCHIP_IOAPIC,
        ] {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            vm.get_irqchip(&mut chip)
                .map_err(failed("interrupt controller"))?;
            irqchips.push(chip);
        }
        Ok(Self {
            irqchips,
            clock: vm.get_clock().map_err(failed("clock"))?,
            realtime_ns: realtime_ns(),
        })
    }

    /// Writes the interrupt controllers; vCPUs and their local APICs come
    /// later.
    pub fn restore_irqchips(&self, vm: &VmFd) -> Result<(), KvmError> {
        for chip in &self.irqchips {
            vm.set_irqchip(chip)
                .map_err(failed("interrupt controller"))?;
        }
        Ok(())
    }

    /// Sets the paravirtual clock: it has gone on while the machine was a
    /// file.
    pub fn restore_clock(&self, vm: &VmFd) -> Result<(), KvmError> {
        let mut clock = kvm_clock_data {
            clock: self.clock.clock,
            ..Default::default()
        };
        if self.clock.flags & KVM_CLOCK_REALTIME != 0 {
            // KVM adds what has passed since, without a gap.
            clock.flags = KVM_CLOCK_REALTIME;
            clock.realtime = self.clock.realtime;
            if vm.set_clock(&clock).is_ok() {
                return Ok(());
            }
            clock.flags = 0;
            clock.realtime = 0;
        }
        let passed = realtime_ns().saturating_sub(self.realtime_ns);
        clock.clock = clock.clock.saturating_add(passed);
        vm.set_clock(&clock).map_err(failed("clock"))
    }
}

fn realtime_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as u64)
}
