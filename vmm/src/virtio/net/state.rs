// SPDX-License-Identifier: Apache-2.0
//! Saving and restoring.

use virtio_bindings::virtio_net::VIRTIO_NET_F_MTU;

use super::{device::PAIRS, event::receive_queue, Net};
use crate::virtio::device::StateError;

impl Net {
    /// The configuration, and whether the MTU in it was offered; where there are
    /// several pairs of queues, how many are in use. A queue says how far it was
    /// worked, so nothing that is taken off it may be left.
    pub(super) fn save_state(&mut self) -> Result<Vec<u8>, StateError> {
        if let Some(queues) = &mut self.active {
            if let Some(vhost) = &mut self.vhost {
                vhost
                    .rest(queues)
                    .map_err(|_| StateError::Busy("the kernel does not let go of its queues"))?;
            }
            for (pair, ready) in self.ready.iter_mut().enumerate() {
                if let Some(queue) = queues.get(receive_queue(pair)) {
                    ready.give_back(queue);
                }
            }
        }
        let mut state = self.config.to_vec();
        state.push(u8::from(self.features & (1 << VIRTIO_NET_F_MTU) != 0));
        if self.taps.len() > 1 {
            state.extend((self.in_use as u16).to_le_bytes());
        }
        Ok(state)
    }

    /// The guest keeps what it was told: it does not look again.
    pub(super) fn restore_state(&mut self, state: &[u8]) -> Result<(), StateError> {
        let Some((config, [mtu, rest @ ..])) = state.split_at_checked(self.config.len()) else {
            return Err(StateError::Unfit("no configuration".into()));
        };
        let in_use = match rest {
            [] => None,
            [low, high] => Some(usize::from(u16::from_le_bytes([*low, *high]))),
            _ => return Err(StateError::Unfit("more than a configuration".into())),
        };
        let pairs = self.taps.len();
        let fits = match in_use {
            None => pairs == 1,
            Some(count) => pairs > 1 && (1..=pairs).contains(&count),
        };
        if !fits || config[PAIRS] != self.config[PAIRS] {
            return Err(StateError::Unfit(format!(
                "{} pairs of queues in the snapshot, and {pairs} queues of the tap",
                u16::from_le_bytes([config[PAIRS.start], config[PAIRS.start + 1]]).max(1)
            )));
        }
        self.in_use = in_use.unwrap_or(1);
        self.config.copy_from_slice(config);
        self.features &= !(1 << VIRTIO_NET_F_MTU);
        self.features |= u64::from(mtu & 1) << VIRTIO_NET_F_MTU;
        Ok(())
    }
}
