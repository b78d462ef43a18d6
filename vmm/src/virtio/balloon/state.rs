// SPDX-License-Identifier: Apache-2.0
//! Saving and restoring.

use serde::{Deserialize, Serialize};

use super::Balloon;
use crate::virtio::device::StateError;

#[derive(Serialize, Deserialize)]
struct BalloonState {
    target: u32,
    actual: u32,
    poison: u32,
    held: Option<u16>,
}

impl Balloon {
    pub(super) fn save_state(&mut self) -> Result<Vec<u8>, StateError> {
        let state = BalloonState {
            target: self.target,
            actual: self.actual,
            poison: self.poison,
            held: self.held,
        };
        postcard::to_stdvec(&state).map_err(|error| StateError::Unfit(error.to_string()))
    }

    pub(super) fn restore_state(&mut self, state: &[u8]) -> Result<(), StateError> {
        let state: BalloonState = match postcard::take_from_bytes(state) {
            Ok((state, [])) => state,
            _ => return Err(StateError::Unfit("no balloon's state".into())),
        };
        self.target = state.target;
        self.actual = state.actual;
        self.poison = state.poison;
        // One that does not exist breaks the device when it is given back.
        self.held = state.held;
        Ok(())
    }
}
