// SPDX-License-Identifier: Apache-2.0
//! Whether KVM is usable, not merely present: how fast a guest's kernel mode
//! runs. Some hosts offer a /dev/kvm that interprets kernel mode instruction
//! by instruction; every ioctl works there, and no kernel boots in a time that
//! anybody waits.

use std::{
    num::NonZeroU64,
    time::{Duration, Instant},
};

use kvm_bindings::{kvm_segment, kvm_userspace_memory_region, KVM_API_VERSION};
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

/// Loop passes per entry into the guest: short enough that an interpreting
/// KVM comes back within a tenth of a second.
const PASSES: u32 = 100_000;

/// Instructions per pass: `dec`, `jnz`.
const INSTRUCTIONS_PER_PASS: u64 = 2;

/// When to stop measuring.
const LONG_ENOUGH: Duration = Duration::from_millis(200);

/// Where the guest's code lies.
const CODE: u64 = 0x1000;

/// `mov ecx, PASSES; 1: dec ecx; jnz 1b; hlt` in 32-bit protected mode.
fn code() -> [u8; 9] {
    let [a, b, c, d] = PASSES.to_le_bytes();
    [0xb9, a, b, c, d, 0x49, 0x75, 0xfd, 0xf4]
}

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// KVM, or a step on the way, refused.
    #[error("{step}")]
    Kvm {
        /// What was tried.
        step: &'static str,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM speaks another version of its interface.
    #[error("KVM has interface version {0}, not {KVM_API_VERSION}")]
    Version(i32),
    /// The guest's memory could not be made.
    #[error("guest memory could not be made")]
    Memory,
    /// The guest ended otherwise than by its HLT.
    #[error("the guest stopped with {0}")]
    Unexpected(String),
}

/// Runs a loop in a guest's kernel mode and returns how many instructions a
/// second it made.
pub fn instructions_per_second() -> Result<NonZeroU64, ProbeError> {
    let failed = |step| move |source| ProbeError::Kvm { step, source };
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)])
        .map_err(|_| ProbeError::Memory)?;
    let kvm = Kvm::new().map_err(failed("/dev/kvm cannot be opened"))?;
    let version = kvm.get_api_version();
    if u32::try_from(version) != Ok(KVM_API_VERSION) {
        return Err(ProbeError::Version(version));
    }
    let vm = kvm.create_vm().map_err(failed("no VM can be made"))?;
    memory
        .write_slice(&code(), GuestAddress(CODE))
        .map_err(|_| ProbeError::Memory)?;
    let host = memory
        .get_host_address(GuestAddress(0))
        .map_err(|_| ProbeError::Memory)?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: 0x4000,
        userspace_addr: host as u64,
    };
    // SAFETY: the region is `memory`'s mapping, declared before `vm` and the
    // vCPU and therefore dropped after them; nothing but the guest touches it
    // meanwhile.
    unsafe { vm.set_user_memory_region(region) }
        .map_err(failed("no memory can be given to a VM"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(failed("no vCPU can be made"))?;
    let mut sregs = vcpu.get_sregs().map_err(failed("vCPU registers"))?;
    let flat = |type_: u8, selector: u16| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    };
    sregs.cs = flat(0xb, 8);
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = flat(0x3, 16);
    }
    sregs.cr0 |= 1;
    vcpu.set_sregs(&sregs).map_err(failed("vCPU registers"))?;
    let mut regs = vcpu.get_regs().map_err(failed("vCPU registers"))?;
    regs.rip = CODE;
    regs.rflags = 2;
    let mut runs = 0_u64;
    let start = Instant::now();
    while start.elapsed() < LONG_ENOUGH {
        vcpu.set_regs(&regs).map_err(failed("vCPU registers"))?;
        match vcpu.run().map_err(failed("the guest cannot run"))? {
            VcpuExit::Hlt => runs += 1,
            other => return Err(ProbeError::Unexpected(format!("{other:?}"))),
        }
    }
    let instructions = runs as f64 * f64::from(PASSES) * INSTRUCTIONS_PER_PASS as f64;
    let speed = (instructions / start.elapsed().as_secs_f64()) as u64;
    Ok(NonZeroU64::new(speed).unwrap_or(NonZeroU64::MIN))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_speed_of_this_host_is_measured() {
        match instructions_per_second() {
            Ok(speed) => assert!(speed.get() > 10_000, "{speed}"),
            Err(error @ ProbeError::Kvm { .. }) => {
                println!("SKIPPED: the_speed_of_this_host_is_measured: {error}");
            }
            Err(error) => panic!("{error}"),
        }
    }
}
