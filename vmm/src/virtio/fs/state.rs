// SPDX-License-Identifier: Apache-2.0
//! Saving and restoring.

use super::Fs;
use crate::virtio::device::{SharedMemory, StateError};

impl Fs {
    /// Start and size of the DAX window in a saved state; none: there was none.
    pub fn window_in(state: &[u8]) -> Option<(u64, u64)> {
        let (start, size) = state.split_at_checked(8)?;
        let number = |bytes: &[u8]| Some(u64::from_le_bytes(bytes.try_into().ok()?));
        Some((number(start)?, number(size)?))
    }

    /// Of the window, which is all there is; nothing without one.
    fn state(&self) -> Vec<u8> {
        let region = self.window.as_ref().map(|window| window.region());
        let numbers = |region: SharedMemory| [region.address, region.size];
        let numbers = region.map(numbers).into_iter().flatten();
        numbers.flat_map(u64::to_le_bytes).collect()
    }

    /// What the guest knows of files are numbers that only this process can
    /// tell the meaning of, so it must not know any.
    pub(super) fn save_state(&mut self) -> Result<Vec<u8>, StateError> {
        match &self.active {
            Some(active) if active.mounted() => Err(StateError::Busy(
                "the guest has it mounted: have it unmounted before the snapshot",
            )),
            _ => Ok(self.state()),
        }
    }

    /// The window must lie where it was: the guest knows of it.
    pub(super) fn restore_state(&mut self, state: &[u8]) -> Result<(), StateError> {
        if state == self.state() {
            return Ok(());
        }
        let size = |window: Option<(u64, u64)>| window.map_or(0, |(_, size)| size >> 20);
        Err(StateError::Unfit(format!(
            "dax_mib: {} where the snapshot has {}, or a window before it has another size",
            size(Self::window_in(&self.state())),
            size(Self::window_in(state))
        )))
    }
}
