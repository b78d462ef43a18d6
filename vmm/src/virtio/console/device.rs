// SPDX-License-Identifier: Apache-2.0
//! The device towards the transport.

use std::fs::File;

use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1, virtio_ids::VIRTIO_ID_CONSOLE,
    virtio_ring::VIRTIO_RING_F_EVENT_IDX,
};

use super::port::{Full, Port};
use crate::virtio::{
    chain::Queues,
    device::{read_bytes, Activation, DeviceError, StateError, VirtioDevice},
};

/// Feature bit (virtio 1.2 §5.3.3).
pub(super) const MULTIPORT: u32 = 1;

/// Queue indices (virtio 1.2 §5.3.2): from and to the device's point of view of
/// the guest's, a receive queue is what the guest gets something by.
pub(super) mod queue {
    pub const CONSOLE_RECEIVE: usize = 0;
    pub const CONSOLE_TRANSMIT: usize = 1;
    pub const CONTROL_RECEIVE: usize = 2;
    pub const CONTROL_TRANSMIT: usize = 3;
    pub const LOG_TRANSMIT: usize = 5;
    /// How many there are.
    pub const COUNT: usize = 6;
}

/// How many ports there are.
pub(super) const PORTS: usize = 2;
/// The port that is a console.
pub(super) const CONSOLE: usize = 0;
/// The one that is named.
pub(super) const LOG: usize = 1;

/// Where `max_nr_ports` is in the configuration.
const MAX_PORTS: usize = 4;

/// What the ports are connected to, all of it non-blocking. What the guest
/// writes to one that is connected to nothing is nobody's.
#[derive(Debug, Default)]
pub struct Outputs {
    /// The console.
    pub console: Option<File>,
    /// Whether the console's input comes from there, too.
    pub input: bool,
    /// The log.
    pub log: Option<File>,
}

/// The device.
pub struct Console {
    pub(super) ports: [Port; PORTS],
    pub(super) active: Option<Queues>,
}

impl Console {
    /// Ports that are connected so.
    pub fn new(outputs: Outputs) -> Self {
        Self {
            ports: [
                Port::new(outputs.console, outputs.input, Full::Drop),
                Port::new(outputs.log, false, Full::Wait),
            ],
            active: None,
        }
    }
}

impl VirtioDevice for Console {
    fn device_id(&self) -> u16 {
        VIRTIO_ID_CONSOLE as u16
    }

    fn name(&self) -> &str {
        "console"
    }

    fn queue_sizes(&self) -> &[u16] {
        // A driver fills what it receives by with pages.
        &[16, 64, 16, 16, 2, 64]
    }

    fn features(&self) -> u64 {
        (1 << VIRTIO_F_VERSION_1) | (1 << VIRTIO_RING_F_EVENT_IDX) | (1 << MULTIPORT)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // Columns and rows, of which nothing is said; the ports; emerg_wr.
        let mut config = [0; 12];
        config[MAX_PORTS] = PORTS as u8;
        read_bytes(&config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let queues = Queues::new(activation, queue::CONSOLE_TRANSMIT + 1)?;
        if !queues.has_feature(MULTIPORT) {
            // There is one port, and nobody opens it.
            self.ports[CONSOLE].open = true;
        }
        self.active = Some(queues);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(queues) = self.active.take() {
            for port in &mut self.ports {
                port.rest(&queues);
            }
        }
        for port in &mut self.ports {
            port.forget();
        }
    }

    fn queues(&self) -> Option<&Queues> {
        self.active.as_ref()
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        self.save_state()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        self.restore_state(state)
    }
}
