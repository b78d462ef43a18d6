// SPDX-License-Identifier: Apache-2.0
//! Saving and restoring.

use super::Blk;
use crate::virtio::device::StateError;

/// Bytes of the capacity, the first field of the configuration.
const CAPACITY: usize = 8;

impl Blk {
    /// The capacity that the guest knows. Nothing is on its way any more.
    pub(super) fn save_state(&mut self) -> Result<Vec<u8>, StateError> {
        self.finish()
            .map_err(|_| StateError::Busy("its requests cannot be waited for"))?;
        Ok(self.config[..CAPACITY].to_vec())
    }

    pub(super) fn restore_state(&mut self, state: &[u8]) -> Result<(), StateError> {
        if state.len() != CAPACITY {
            return Err(StateError::Unfit("no capacity".into()));
        }
        self.resized = *state != self.config[..CAPACITY];
        Ok(())
    }

    /// The driver reads the capacity again.
    pub(super) fn announce_capacity(&mut self) {
        if let (Some(active), true) = (&self.active, self.resized) {
            active.queues.interrupt.show_config(&self.config);
            active.queues.interrupt.signal_config();
        }
        self.resized = false;
    }
}
