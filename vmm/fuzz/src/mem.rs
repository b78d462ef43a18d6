// SPDX-License-Identifier: Apache-2.0
//! A guest that takes and gives back memory as it likes.
#![no_main]

mod guest;

use bulkhead_vmm::virtio::mem::{Layout, Mem, SLOT};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((first, rest)) = data.split_first() else {
        return;
    };
    // Over the guest's own memory, so that something is given back.
    let mut device = Mem::new(Layout::new(0, 20 * SLOT));
    let slots = u32::from(first % 11);
    device.set_mapped((0..slots).collect());
    device.request(u64::from(*first) << 20);
    guest::drive(&mut device, rest);
    assert!(device.plugged() <= device.requested());
});
