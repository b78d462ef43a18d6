// SPDX-License-Identifier: Apache-2.0
//! Saving and restoring.

use virtio_bindings::virtio_net::VIRTIO_NET_F_MTU;

use super::{event::RECEIVE, Net};
use crate::virtio::device::StateError;

impl Net {
    /// The configuration, and whether the MTU in it was offered. The queue says
    /// how far it was worked, so nothing that is taken off it may be left.
    pub(super) fn save_state(&mut self) -> Result<Vec<u8>, StateError> {
        if let Some(queue) = self.active.as_mut().and_then(|q| q.get(RECEIVE)) {
            self.ready.give_back(queue);
        }
        let mut state = self.config.to_vec();
        state.push(u8::from(self.features & (1 << VIRTIO_NET_F_MTU) != 0));
        Ok(state)
    }

    /// The guest keeps what it was told: it does not look again.
    pub(super) fn restore_state(&mut self, state: &[u8]) -> Result<(), StateError> {
        let (Some((config, [mtu])), true) = (
            state.split_at_checked(self.config.len()),
            state.len() == self.config.len() + 1,
        ) else {
            return Err(StateError::Unfit("no configuration".into()));
        };
        self.config.copy_from_slice(config);
        self.features &= !(1 << VIRTIO_NET_F_MTU);
        self.features |= u64::from(mtu & 1) << VIRTIO_NET_F_MTU;
        Ok(())
    }
}
