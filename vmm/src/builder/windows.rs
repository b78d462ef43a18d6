// SPDX-License-Identifier: Apache-2.0
//! Windows: files in the guest's memory, of persistent memory and of shared
//! directories.

use std::{fs::File, io, ops::Range, sync::Arc};

use bulkhead_vmm_api::{DeviceKind, FsConfig};
use vm_memory::{FileOffset, MmapRegion};

use super::{plug::Board, BuildError};
use crate::{kvm::vm::MemorySlot, virtio::fs};

/// Files in the guest's memory.
pub(super) struct Window {
    pub slot: MemorySlot,
    pub address: u64,
    pub mapping: Arc<MmapRegion>,
}

impl Board {
    /// Where shared directories' windows are in the guest's memory.
    pub fn dax_windows(&self) -> Vec<Range<u64>> {
        let windows = self.plugged.values().filter_map(|plugged| {
            let window = plugged.window.as_ref()?;
            let size = window.mapping.size() as u64;
            (plugged.kind == DeviceKind::Fs).then_some(window.address..window.address + size)
        });
        windows.collect()
    }

    /// Maps a file into the guest.
    pub(super) fn window(
        &mut self,
        file: File,
        read_only: bool,
        place: Option<(u64, u64)>,
        named: &dyn Fn(io::Error) -> BuildError,
    ) -> Result<Window, BuildError> {
        let size = file.metadata().map_err(named)?.len();
        let protection = if read_only {
            libc::PROT_READ
        } else {
            libc::PROT_READ | libc::PROT_WRITE
        };
        let mapping = MmapRegion::build(
            Some(FileOffset::new(file, 0)),
            size as usize,
            protection,
            libc::MAP_SHARED | libc::MAP_NORESERVE,
        )
        .map_err(|error| named(io::Error::other(error)))?;
        self.show(Arc::new(mapping), read_only, place, named)
    }

    /// Makes the DAX window of a shared directory, if it has one.
    pub(super) fn dax_window(
        &mut self,
        config: &FsConfig,
        place: Option<(u64, u64)>,
        late: bool,
        named: &dyn Fn(io::Error) -> BuildError,
    ) -> Result<Option<Window>, BuildError> {
        if config.dax_mib == 0 {
            return Ok(None);
        }
        if late {
            // The guest's tables tell where windows are.
            return Err(named(io::Error::new(
                io::ErrorKind::Unsupported,
                "dax_mib: only what is there from the start can have a window",
            )));
        }
        let mapping = fs::Window::reserve(u64::from(config.dax_mib) << 20).map_err(named)?;
        self.show(mapping, false, place, named).map(Some)
    }

    /// Gives the guest a mapping of this process.
    pub(super) fn show(
        &mut self,
        mapping: Arc<MmapRegion>,
        read_only: bool,
        place: Option<(u64, u64)>,
        named: &dyn Fn(io::Error) -> BuildError,
    ) -> Result<Window, BuildError> {
        let size = mapping.size() as u64;
        let address = match place {
            Some((address, had)) if had == size => {
                self.windows.reserve_at(address, size).then_some(address)
            }
            // Not what it was, which is told when its state is restored.
            _ => self.windows.reserve(size),
        };
        let address = address
            .ok_or_else(|| named(io::Error::other("there is no place for it in guest memory")))?;
        match self.vm.map_window(address, &mapping, read_only) {
            Ok(slot) => Ok(Window {
                slot,
                address,
                mapping,
            }),
            Err(error) => {
                self.windows.release(address);
                Err(error.into())
            }
        }
    }

    /// Takes a file out of the guest's memory.
    pub(super) fn close(&mut self, window: Window) {
        match self.vm.unmap_window(window.slot) {
            Ok(()) => self.windows.release(window.address),
            Err(error) => {
                tracing::error!(error = %crate::control::chain(&error), "window not taken back");
                // KVM may use it still.
                std::mem::forget(window.mapping);
            }
        }
    }
}
