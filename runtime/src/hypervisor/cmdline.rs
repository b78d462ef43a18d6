// SPDX-License-Identifier: Apache-2.0
//! The guest kernel's command line.

/// What every guest gets: a serial console for messages that matter, the end
/// of the VM instead of waiting after a panic, no self-tests, no network
/// interfaces but the pod's own, and the image from persistent memory without
/// copies of its pages in the guest. Such a device may come a moment after all
/// drivers are there, hence rootwait. What belongs to a processor is in small
/// pages: in a large one, the kernel takes 2 MiB for it and keeps 4 MiB of notes
/// of which control group each piece of that is charged to. A guest of one
/// processor keeps its lock prefixes, which cost it little: to take them out at
/// thousands of places costs its boot more. What waits for RCU has its grace
/// period at once, and not after some ticks, of which there are a hundred a second. PCI is not looked for
/// by ports, which on AMD's processors takes 230 accesses, before the ACPI tables
/// say where it is; the kernel takes that for an error, and says so, which would
/// take a hundred: hence the log level, which the agent sets to 4.
const BASE: &str = "console=ttyS0 quiet loglevel=3 reboot=k panic=-1 cryptomgr.notests \
    pci=noearly percpu_alloc=page noreplace-smp rcupdate.rcu_expedited=1 dummy.numdummies=0 \
    root=/dev/pmem0 rootfstype=erofs ro rootflags=dax=always rootwait=5 \
    init=/sbin/init";

/// What a guest is to know of what it may get later.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Later {
    /// Processors to use at first, where the machine has more.
    pub vcpus: Option<u8>,
    /// Whether memory may come, and go again: only what can be moved lies there.
    pub memory: bool,
    /// Whether commands may be run in the guest itself.
    pub debug: bool,
}

/// The command line of a guest that stays as it is, with the configuration's
/// `hypervisor.kernel_params`.
pub fn build(kernel_params: &str) -> String {
    build_for(Later::default(), kernel_params)
}

/// As [`build`], of one that may get more.
pub fn build_for(later: Later, kernel_params: &str) -> String {
    let mut line = BASE.to_owned();
    if let Some(vcpus) = later.vcpus {
        line.push_str(&format!(" maxcpus={vcpus}"));
    }
    if later.memory {
        line.push_str(" memhp_default_state=online_movable");
    }
    if later.debug {
        line.push_str(" bulkhead.rpcs=+ExecGuest");
    }
    let extra = kernel_params.trim();
    if !extra.is_empty() {
        line.push(' ');
        line.push_str(extra);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_come_last_and_so_win() {
        assert!(build("").ends_with(" init=/sbin/init"));
        assert!(build(" loglevel=7 ").ends_with(" init=/sbin/init loglevel=7"));
        assert!(!build("").contains("  "));
    }

    #[test]
    fn what_may_come_later_is_told() {
        let later = Later {
            vcpus: Some(2),
            memory: true,
            debug: true,
        };
        let line = build_for(later, "x");
        assert!(line
            .ends_with(" maxcpus=2 memhp_default_state=online_movable bulkhead.rpcs=+ExecGuest x"));
    }
}
