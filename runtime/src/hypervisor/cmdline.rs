// SPDX-License-Identifier: Apache-2.0
//! The guest kernel's command line.

/// What every guest gets: a serial console for messages that matter, the end
/// of the VM instead of waiting after a panic, no self-tests, no network
/// interfaces but the pod's own, and the image from persistent memory without
/// copies of its pages in the guest. Such a device may come a moment after all
/// drivers are there, hence rootwait.
const BASE: &str = "console=ttyS0 quiet loglevel=4 reboot=k panic=-1 cryptomgr.notests \
    dummy.numdummies=0 root=/dev/pmem0 rootfstype=erofs ro rootflags=dax=always rootwait=5 \
    init=/sbin/init";

/// The command line, with the configuration's `hypervisor.kernel_params`.
pub fn build(kernel_params: &str) -> String {
    let mut line = BASE.to_owned();
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
}
