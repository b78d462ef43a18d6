// SPDX-License-Identifier: Apache-2.0
//! A guest's accesses to a function's configuration space and MSI-X table.
#![no_main]

use std::{io, sync::Arc};

use bulkhead_vmm::pci::{
    config::{ConfigSpace, Identity},
    host::{Message, Messages},
    msix::{self, Msix},
    pages::Page,
};
use libfuzzer_sys::fuzz_target;

/// Takes every message.
struct Sink;

impl Messages for Sink {
    fn send(&self, _: Message) -> io::Result<()> {
        Ok(())
    }
    fn trap_tables(&self) {}
}

const VECTORS: u16 = 3;

fuzz_target!(|data: &[u8]| {
    let page = Page::alone().expect("memory");
    let msix = Msix::new(Arc::new(Sink), page.clone(), VECTORS).expect("it has room");
    let mut space = ConfigSpace::new(Identity {
        vendor: 0x1af4,
        device: 0x1042,
        class: 0x01_8000,
        revision: 1,
        subsystem: 1,
    });
    let at = space.add_capability(msix::CAPABILITY, &msix.capability(0, 0x1000));
    space.allow_writes(at + 2, &msix::CONTROL_WRITABLE.to_le_bytes());
    let fixed = [space.u16_at(0), space.u16_at(2), space.u16_at(0x2c)];
    // An access: what it is, where, how long, and what is written.
    for access in data.chunks_exact(12) {
        let offset = u16::from_le_bytes([access[1], access[2]]);
        let length = usize::from(access[3] % 9);
        let written = &access[4..][..length.min(8)];
        let mut read = [0_u8; 8];
        let read = &mut read[..length.min(8)];
        match access[0] % 8 {
            0 => {
                space.write(usize::from(offset), written);
                msix.set_control(space.u16_at(at + 2));
            }
            1 => space.read(usize::from(offset), read),
            2 => msix.write_table(u64::from(offset), written),
            3 => msix.read_table(u64::from(offset), read),
            4 => msix.read_pending(u64::from(offset), read),
            5 => msix.signal(offset),
            // What the guest writes where the table is memory.
            6 => page.set_word(usize::from(offset), u32::from_le_bytes([access[4]; 4])),
            _ => assert!(msix.restore(&msix.save())),
        }
    }
    assert_eq!(msix.save().count(), usize::from(VECTORS));
    let now = [space.u16_at(0), space.u16_at(2), space.u16_at(0x2c)];
    assert_eq!(now, fixed, "the guest changed what the function is");
});
