// SPDX-License-Identifier: Apache-2.0
//! Whether KVM is usable, not merely present.

use std::{fs::OpenOptions, path::Path, process::Command};

use super::Verdict;

/// Guest instructions a second below which a kernel does not boot in a time
/// that anybody waits. Hardware runs billions, an emulated host in a virtual
/// machine a hundred million, a KVM that interprets kernel mode a few million.
const USABLE_SPEED: u64 = 20_000_000;

/// Whether the processor says it can virtualise.
pub fn cpu() -> Verdict {
    let cpuinfo = match std::fs::read_to_string("/proc/cpuinfo") {
        Ok(text) => text,
        Err(error) => {
            return Verdict::bad(format!("/proc/cpuinfo: {error}"), "mount /proc");
        }
    };
    let has = |flag: &str| {
        cpuinfo
            .lines()
            .filter(|line| line.starts_with("flags"))
            .any(|line| line.split_ascii_whitespace().any(|word| word == flag))
    };
    if has("vmx") {
        Verdict::Good("Intel VT-x".into())
    } else if has("svm") {
        Verdict::Good("AMD SVM".into())
    } else {
        Verdict::fair(
            "neither VT-x (vmx) nor SVM (svm) in /proc/cpuinfo",
            "enable virtualisation in the firmware, or nested virtualisation for this virtual machine",
        )
    }
}

/// Whether /dev/kvm opens.
pub fn opens() -> Verdict {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Verdict::Good("/dev/kvm opens".into()),
        Err(error) => Verdict::bad(
            format!("/dev/kvm: {error}"),
            match error.kind() {
                std::io::ErrorKind::NotFound => "load the module kvm_intel or kvm_amd",
                std::io::ErrorKind::PermissionDenied => "run as root or as a member of group kvm",
                _ => "see dmesg for what KVM said",
            },
        ),
    }
}

/// Whether a guest runs, and at what speed: the VMM runs a small loop in a
/// guest's kernel mode and says how many instructions a second it made.
pub fn runs_guests(vmm: &Path) -> Verdict {
    let output = match Command::new(vmm).arg("--probe").output() {
        Ok(output) => output,
        Err(error) => {
            return Verdict::bad(
                format!("{} --probe: {error}", vmm.display()),
                "install bulkhead-vmm, or set hypervisor.path in the configuration",
            );
        }
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let speed = text
        .strip_prefix("instructions-per-second ")
        .and_then(|number| number.trim().parse::<u64>().ok());
    match speed {
        Some(speed) if speed >= USABLE_SPEED => Verdict::Good(format!(
            "{} million guest instructions a second",
            speed / 1_000_000
        )),
        Some(speed) => Verdict::bad(
            format!(
                "a guest's kernel mode runs at {:.1} million instructions a second: it is emulated",
                speed as f64 / 1e6
            ),
            "run on hardware with VT-x or SVM, or in a virtual machine with nested virtualisation",
        ),
        None => Verdict::bad(
            format!(
                "no guest runs: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            ),
            "see dmesg for what KVM said",
        ),
    }
}
