// SPDX-License-Identifier: Apache-2.0
//! Saving and restoring.

use serde::{Deserialize, Serialize};

use super::{blocks::Blocks, Layout, Mem, BLOCK};
use crate::virtio::device::StateError;

#[derive(Serialize, Deserialize)]
struct MemState {
    /// First: [`Mem::layout_in`] reads it alone.
    layout: Layout,
    requested: u64,
    plugged: Vec<u64>,
}

impl Mem {
    pub(super) fn save_state(&mut self) -> Result<Vec<u8>, StateError> {
        let state = MemState {
            layout: self.layout.clone(),
            requested: self.requested,
            plugged: self.blocks.words().to_vec(),
        };
        postcard::to_stdvec(&state).map_err(|error| StateError::Unfit(error.to_string()))
    }

    /// The region must be what it was, and exist where it did.
    pub(super) fn restore_state(&mut self, state: &[u8]) -> Result<(), StateError> {
        let state: MemState = match postcard::take_from_bytes(state) {
            Ok((state, [])) => state,
            _ => return Err(StateError::Unfit("no state of such memory".into())),
        };
        if state.layout != self.layout {
            return Err(StateError::Unfit(format!(
                "it can become {} MiB and could become {}",
                self.layout.size >> 20,
                state.layout.size >> 20
            )));
        }
        let unfit = || StateError::Unfit("blocks that are not there".into());
        let blocks = Blocks::from_words(self.blocks.count(), state.plugged).ok_or_else(unfit)?;
        let usable = (self.usable / BLOCK) as usize;
        let fits = blocks.plugged_in(usable..blocks.count()) == 0
            && state.requested <= self.usable
            && state.requested % BLOCK == 0;
        if !fits {
            return Err(unfit());
        }
        self.blocks = blocks;
        self.requested = state.requested;
        Ok(())
    }
}
