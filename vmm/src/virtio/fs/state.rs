// SPDX-License-Identifier: Apache-2.0
//! Saving and restoring.

use super::Fs;
use crate::virtio::device::{expect_empty, StateError};

impl Fs {
    /// What the guest knows of files are numbers that only this process can
    /// tell the meaning of, so it must not know any.
    pub(super) fn save_state(&mut self) -> Result<Vec<u8>, StateError> {
        match &self.active {
            Some(active) if active.mounted() => Err(StateError::Busy(
                "the guest has it mounted: have it unmounted before the snapshot",
            )),
            _ => Ok(Vec::new()),
        }
    }

    pub(super) fn restore_state(&mut self, state: &[u8]) -> Result<(), StateError> {
        expect_empty(state)
    }
}
