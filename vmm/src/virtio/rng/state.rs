// SPDX-License-Identifier: Apache-2.0
//! Saving and restoring; comes with snapshots.

use super::Rng;
use crate::virtio::device::StateError;

impl Rng {
    pub(super) fn save_state(&mut self) -> Result<Vec<u8>, StateError> {
        Err(StateError::NotYet("rng"))
    }

    pub(super) fn restore_state(&mut self, _state: &[u8]) -> Result<(), StateError> {
        Err(StateError::NotYet("rng"))
    }
}
