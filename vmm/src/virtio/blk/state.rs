// SPDX-License-Identifier: Apache-2.0
//! Saving and restoring; comes with snapshots.

use super::Blk;
use crate::virtio::device::StateError;

impl Blk {
    pub(super) fn save_state(&mut self) -> Result<Vec<u8>, StateError> {
        Err(StateError::NotYet("blk"))
    }

    pub(super) fn restore_state(&mut self, _state: &[u8]) -> Result<(), StateError> {
        Err(StateError::NotYet("blk"))
    }
}
