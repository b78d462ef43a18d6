// SPDX-License-Identifier: Apache-2.0
//! Interrupt routes: lines of the I/O APIC and messages (MSI-X).
//!
//! KVM_SET_GSI_ROUTING replaces the whole table and waits for an SRCU grace
//! period, so the router keeps the table and tells KVM only when it changed.

use std::{
    collections::BTreeMap,
    io,
    sync::{
        atomic::{AtomicU32, Ordering},
        Arc, Mutex,
    },
};

use kvm_bindings::{
    kvm_irq_routing_entry, KvmIrqRouting, KVM_IRQCHIP_IOAPIC, KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQ_ROUTING_MSI,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use crate::{
    arch::x86_64::layout,
    pci::msix::{InterruptRouter, Message},
};

/// Routes interrupts of one VM.
pub struct MsiRouter {
    vm: Arc<VmFd>,
    next: AtomicU32,
    /// Given back.
    free: Mutex<Vec<u32>>,
    routes: Mutex<BTreeMap<u32, Message>>,
}

impl MsiRouter {
    /// A router for `vm`, which has an in-kernel I/O APIC.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self {
            vm,
            next: AtomicU32::new(layout::FIRST_MSI_GSI),
            free: Mutex::new(Vec::new()),
            routes: Mutex::new(BTreeMap::new()),
        }
    }

    /// Lets `event` raise line `gsi` of the I/O APIC.
    pub fn register_line(&self, event: &EventFd, gsi: u32) -> io::Result<()> {
        self.vm.register_irqfd(event, gsi).map_err(Into::into)
    }

    fn apply(&self, routes: &BTreeMap<u32, Message>) -> io::Result<()> {
        let lines = (0..layout::FIRST_MSI_GSI).map(|pin| {
            let mut entry = kvm_irq_routing_entry {
                gsi: pin,
                type_: KVM_IRQ_ROUTING_IRQCHIP,
                ..Default::default()
            };
            entry.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
            entry.u.irqchip.pin = pin;
            entry
        });
        let messages = routes.iter().map(|(gsi, message)| {
            let mut entry = kvm_irq_routing_entry {
                gsi: *gsi,
                type_: KVM_IRQ_ROUTING_MSI,
                ..Default::default()
            };
            entry.u.msi.address_lo = message.address as u32;
            entry.u.msi.address_hi = (message.address >> 32) as u32;
            entry.u.msi.data = message.data;
            entry
        });
        let table: Vec<_> = lines.chain(messages).collect();
        let table = KvmIrqRouting::from_entries(&table)
            .map_err(|_| io::Error::other("too many interrupt routes"))?;
        self.vm.set_gsi_routing(&table).map_err(Into::into)
    }
}

const NO_PANIC: &str = "no holder of the numbers' lock panics";

impl InterruptRouter for MsiRouter {
    fn allocate(&self) -> u32 {
        let free = self.free.lock().expect(NO_PANIC).pop();
        free.unwrap_or_else(|| self.next.fetch_add(1, Ordering::Relaxed))
    }

    fn release(&self, gsi: u32) {
        self.free.lock().expect(NO_PANIC).push(gsi);
    }

    fn set_routes(&self, changes: &[(u32, Option<Message>)]) -> io::Result<()> {
        let mut routes = self
            .routes
            .lock()
            .expect("no holder of the routes' lock panics");
        let before = routes.clone();
        for (gsi, message) in changes {
            match message {
                Some(message) => routes.insert(*gsi, *message),
                None => routes.remove(gsi),
            };
        }
        if *routes == before {
            return Ok(());
        }
        self.apply(&routes)
    }

    fn register(&self, event: &EventFd, gsi: u32) -> io::Result<()> {
        self.vm.register_irqfd(event, gsi).map_err(Into::into)
    }

    fn unregister(&self, event: &EventFd, gsi: u32) -> io::Result<()> {
        self.vm.unregister_irqfd(event, gsi).map_err(Into::into)
    }
}
