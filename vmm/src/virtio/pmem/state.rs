// SPDX-License-Identifier: Apache-2.0
//! Saving and restoring.

use super::Pmem;
use crate::virtio::device::StateError;

impl Pmem {
    /// Start and size of the window in a saved state.
    pub fn window_in(state: &[u8]) -> Option<(u64, u64)> {
        let (start, size) = state.split_at_checked(8)?;
        let number = |bytes: &[u8]| Some(u64::from_le_bytes(bytes.try_into().ok()?));
        Some((number(start)?, number(size)?))
    }

    pub(super) fn save_state(&mut self) -> Result<Vec<u8>, StateError> {
        Ok(self.config.to_vec())
    }

    /// The window must lie where it was: the guest has it mapped.
    pub(super) fn restore_state(&mut self, state: &[u8]) -> Result<(), StateError> {
        if state == self.config {
            return Ok(());
        }
        let size = |config: &[u8]| {
            let bytes = config.get(8..16).and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, u64::from_le_bytes)
        };
        Err(StateError::Unfit(format!(
            "its file has {} bytes and had {}, or one before it has another size",
            size(&self.config),
            size(state)
        )))
    }
}
