// SPDX-License-Identifier: Apache-2.0
//! Puts everything on the machine's buses.

use std::{
    io,
    sync::{
        atomic::{AtomicBool, AtomicU32},
        Arc, Mutex,
    },
};

use kvm_ioctls::VcpuFd;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap, MmapRegion};

use super::{
    growth::Backing,
    plug::{Board, Item, Loops, Place},
    system, BuildError, Callbacks, Host, Machine,
};
use crate::{
    arch::x86_64::layout,
    bus::{Bus, BusDevice},
    generation::GenerationId,
    kvm::{
        exits::ExitCounters,
        gathered::Gathered,
        vcpu::{self, Buses, Rest, Shared},
        vm::Vm,
    },
    memory::WindowAllocator,
    pci::{pages::PAGE, BarWindow, PciRoot, SLOTS},
    power::{KeyboardReset, PanicPort, PowerRegisters},
    serial::SerialPort,
    timeline::Stamps,
    virtio::transport,
};

/// What differs between a machine that boots and one that is restored.
pub(super) struct Parts {
    pub host: Arc<Host>,
    pub vm: Arc<Vm>,
    pub memory: GuestMemoryMmap,
    pub memory_size: u64,
    pub vcpus: Vec<VcpuFd>,
    pub serial: Arc<SerialPort>,
    pub paused: bool,
    /// Of memory that comes later.
    pub backing: Backing,
}

impl Parts {
    /// Puts everything on the buses.
    pub fn assemble(
        self,
        items: Vec<(Item, Place)>,
        callbacks: &Callbacks,
        stamps: Arc<Stamps>,
    ) -> Result<Machine, BuildError> {
        vcpu::install_kick_signal().map_err(system("vCPU signal"))?;
        let mut buses = Buses {
            pio: Bus::default(),
            mmio: Bus::default(),
        };
        let on_end = || callbacks.on_end.clone();
        let ports: [(u16, u64, Arc<dyn BusDevice>); 4] = [
            (layout::SERIAL_PORT, 8, self.serial.clone()),
            (layout::POWER_PORT, 3, Arc::new(PowerRegisters(on_end()))),
            (
                layout::KEYBOARD_COMMAND,
                1,
                Arc::new(KeyboardReset(on_end())),
            ),
            (layout::PVPANIC_PORT, 1, Arc::new(PanicPort(on_end()))),
        ];
        for (port, length, device) in ports {
            buses.pio.insert(u64::from(port), length, device)?;
        }
        let on_read = callbacks.on_generation_read.clone();
        let generation = GenerationId::new(move || on_read()).map_err(system("generation id"))?;
        buses
            .mmio
            .insert(layout::GENERATION_ID, 0x1000, Arc::new(generation))?;
        let root = Arc::new(PciRoot::new(self.vm.clone(), layout::ECAM)?);
        let tables = Arc::new(MmapRegion::new(SLOTS * PAGE)?);
        self.vm
            .map_tables(Arc::clone(&tables), callbacks.on_trap.clone())?;
        let mut loops = Loops::new(self.paused)?;
        let mut board = Board::new(
            Arc::clone(&self.vm),
            GuestMemoryAtomic::new(self.memory.clone()),
            Arc::clone(&root),
            tables,
            WindowAllocator::new(self.memory_size),
            self.backing,
            callbacks.on_connect.clone(),
        );
        for (item, place) in items {
            board.plug(item, place, &mut loops)?;
        }
        loops.complete()?;
        // As long as there is a machine.
        self.vm.map_window(layout::ECAM, &root.memory(), true)?;
        let windows = [
            (layout::BAR_WINDOW, BarWindow::all(Arc::clone(&root))),
            (
                layout::TABLE_WINDOW,
                BarWindow::page(Arc::clone(&root), transport::TABLE),
            ),
            (
                layout::CONFIG_WINDOW,
                BarWindow::page(Arc::clone(&root), transport::DEVICE),
            ),
        ];
        for (base, window) in windows {
            buses.mmio.insert(base, window.size(), Arc::new(window))?;
        }
        buses.mmio.insert(layout::ECAM, layout::ECAM_SIZE, root)?;
        let gathered = self.vcpus.first().map(Gathered::map);
        let gathered = gathered
            .unwrap_or_else(|| Err(io::ErrorKind::NotFound.into()))
            .map_err(system("ring of gathered writes"))?;
        let exits = self.vcpus.iter().map(|_| ExitCounters::default()).collect();
        let ids = self.vcpus.iter().map(|_| AtomicU32::new(0)).collect();
        let vcpus = self.vcpus.into_iter();
        Ok(Machine {
            threads: Vec::new(),
            vcpus: vcpus.map(|vcpu| Arc::new(Mutex::new(vcpu))).collect(),
            loops,
            shared: Arc::new(Shared {
                buses,
                gathered,
                exits,
                ids,
                on_end: callbacks.on_end.clone(),
                rest: Rest::default(),
                stop: AtomicBool::new(false),
            }),
            serial: self.serial,
            stamps,
            memory_size: self.memory_size,
            board,
            vm: self.vm,
            host: self.host,
            paused: self.paused,
        })
    }
}
