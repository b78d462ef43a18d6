// SPDX-License-Identifier: Apache-2.0
//! A guest's accesses to a function's configuration space and MSI-X table.
#![no_main]

use std::{
    io,
    sync::{
        atomic::{AtomicU32, Ordering},
        Arc,
    },
};

use bulkhead_vmm::pci::{
    config::{ConfigSpace, Identity},
    msix::{self, InterruptRouter, Message, Msix},
};
use libfuzzer_sys::fuzz_target;
use vmm_sys_util::eventfd::EventFd;

/// Takes every route.
#[derive(Default)]
struct Router(AtomicU32);

impl InterruptRouter for Router {
    fn allocate(&self) -> u32 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }
    fn release(&self, _: u32) {}
    fn set_routes(&self, _: &[(u32, Option<Message>)]) -> io::Result<()> {
        Ok(())
    }
    fn register(&self, _: &EventFd, _: u32) -> io::Result<()> {
        Ok(())
    }
    fn unregister(&self, _: &EventFd, _: u32) -> io::Result<()> {
        Ok(())
    }
}

const VECTORS: u16 = 3;

fuzz_target!(|data: &[u8]| {
    let msix = Msix::new(Arc::new(Router::default()), VECTORS).expect("eventfds");
    let mut space = ConfigSpace::new(Identity {
        vendor: 0x1af4,
        device: 0x1042,
        class: 0x01_8000,
        revision: 1,
        subsystem: 1,
    });
    space.set_bar(0xc000_0000, 0x8000);
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
        match access[0] % 7 {
            0 => {
                space.write(usize::from(offset), written);
                msix.set_control(space.u16_at(at + 2));
            }
            1 => space.read(usize::from(offset), read),
            2 => msix.write_table(u64::from(offset), written),
            3 => msix.read_table(u64::from(offset), read),
            4 => msix.read_pending(u64::from(offset), read),
            5 => msix.signal(offset),
            _ => assert!(msix.restore(&msix.save())),
        }
    }
    assert_eq!(msix.save().count(), usize::from(VECTORS));
    let now = [space.u16_at(0), space.u16_at(2), space.u16_at(0x2c)];
    assert_eq!(now, fixed, "the guest changed what the function is");
});
