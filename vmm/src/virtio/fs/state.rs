// SPDX-License-Identifier: Apache-2.0
//! Saving and restoring; comes with snapshots.

use super::Fs;
use crate::virtio::device::StateError;

impl Fs {
    pub(super) fn save_state(&mut self) -> Result<Vec<u8>, StateError> {
        Err(StateError::NotYet("fs"))
    }

    pub(super) fn restore_state(&mut self, _state: &[u8]) -> Result<(), StateError> {
        Err(StateError::NotYet("fs"))
    }
}
