// SPDX-License-Identifier: Apache-2.0
//! Saving and restoring. What the ports are connected to is the machine's that
//! is restored.

use serde::{Deserialize, Serialize};

use super::{
    control::pending,
    device::{Console, PORTS},
};
use crate::virtio::device::StateError;

#[derive(Serialize, Deserialize)]
struct PortState {
    open: bool,
    pending: u8,
    written: u64,
}

impl Console {
    pub(super) fn save_state(&mut self) -> Result<Vec<u8>, StateError> {
        let ports = self.ports.each_ref().map(|port| PortState {
            open: port.open,
            pending: port.pending,
            written: port.written,
        });
        postcard::to_stdvec(&ports).map_err(|error| StateError::Unfit(error.to_string()))
    }

    pub(super) fn restore_state(&mut self, state: &[u8]) -> Result<(), StateError> {
        let saved: [PortState; PORTS] = match postcard::take_from_bytes(state) {
            Ok((saved, [])) => saved,
            _ => return Err(StateError::Unfit("no console's state".into())),
        };
        for (port, saved) in self.ports.iter_mut().zip(saved) {
            port.open = saved.open;
            port.pending = saved.pending & pending::ALL;
            // Of a buffer that is not there any more, nothing is left to write.
            port.written = saved.written;
        }
        Ok(())
    }
}
