// SPDX-License-Identifier: Apache-2.0
//! Which host whole-system tests and the demonstration run on.

use std::env;
use std::fs;

/// A place where microVMs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// This machine.
    Direct,
    /// The KVM host in a box.
    Boxed,
}

/// Looks at this machine. `BULKHEAD_HOST=direct` or `box` decides instead.
///
/// `/dev/kvm` alone proves nothing: some kernels offer one without the
/// processor's help and emulate kernel mode instruction by instruction.
pub fn choose() -> Host {
    let wish = env::var("BULKHEAD_HOST").unwrap_or_default();
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let kvm = fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok();
    decide(&wish, &cpuinfo, kvm)
}

fn decide(wish: &str, cpuinfo: &str, kvm_opens: bool) -> Host {
    match wish {
        "direct" => Host::Direct,
        "box" => Host::Boxed,
        _ if kvm_opens && has_virtualisation(cpuinfo) => Host::Direct,
        _ => Host::Boxed,
    }
}

/// Whether a processor's flags have VT-x (`vmx`) or SVM (`svm`).
fn has_virtualisation(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(key, _)| key.trim() == "flags")
        .any(|(_, flags)| flags.split_whitespace().any(|f| f == "vmx" || f == "svm"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const AMD: &str = "processor\t: 0\nflags\t\t: fpu lm svm npt\n";
    const INTEL: &str = "processor\t: 0\nflags\t\t: fpu vmx lm\nvmx flags\t: ept\n";
    const PLAIN: &str = "model name\t: svm vmx\nflags\t\t: fpu lm svm_lock\nvmx flags\t: x\n";

    #[test]
    fn virtualisation_is_a_flag_of_its_own() {
        assert!(has_virtualisation(AMD));
        assert!(has_virtualisation(INTEL));
        assert!(!has_virtualisation(PLAIN));
        assert!(!has_virtualisation(""));
    }

    #[test]
    fn both_processor_and_device_are_needed() {
        assert_eq!(decide("", AMD, true), Host::Direct);
        assert_eq!(decide("", INTEL, true), Host::Direct);
        assert_eq!(decide("", AMD, false), Host::Boxed);
        assert_eq!(decide("", PLAIN, true), Host::Boxed);
    }

    #[test]
    fn a_wish_is_obeyed() {
        assert_eq!(decide("direct", PLAIN, false), Host::Direct);
        assert_eq!(decide("box", AMD, true), Host::Boxed);
        assert_eq!(decide("nonsense", AMD, true), Host::Direct);
    }
}
