// SPDX-License-Identifier: Apache-2.0
//! The device towards the transport.

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixListener},
};

use bulkhead_vmm_api::VsockConfig;
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1, virtio_ids::VIRTIO_ID_VSOCK,
    virtio_ring::VIRTIO_RING_F_EVENT_IDX,
};
use vmm_sys_util::epoll::EventSet;

use super::{
    muxer::{token, Muxer, OnConnect},
    stream::{Key, Watcher},
};
use crate::virtio::{
    chain::Queues,
    device::{read_bytes, Activation, DeviceError, StateError, VirtioDevice},
};

/// Queue indices (virtio 1.2 §5.10.2).
pub(super) mod queue {
    pub const RECEIVE: usize = 0;
    pub const SEND: usize = 1;
    /// Tells the guest of a reset, after a restore.
    pub const EVENT: usize = 2;
    pub const COUNT: usize = 3;
}

/// The socket device.
pub struct Vsock {
    guest_cid: u64,
    uds_path: String,
    pub(super) listener: Option<UnixListener>,
    on_connect: OnConnect,
    /// Connections that a snapshot's machine had: to be reset.
    pub(super) lost: Vec<Key>,
    pub(super) active: Option<Active>,
}

/// What exists between DRIVER_OK and reset.
pub(super) struct Active {
    pub muxer: Muxer,
    pub queues: Queues,
    /// Packets of the guest's are left in the queue for the next round, or
    /// until there is room for answers.
    pub stalled: bool,
}

impl Vsock {
    /// A new device. `listener`: where clients on the host connect; a
    /// listening Unix stream socket. `on_connect` is called with the port of
    /// each connection that the guest makes to the host, on the device's
    /// thread: it must not block.
    ///
    /// Errors: the listener cannot be made non-blocking.
    pub fn new(
        config: &VsockConfig,
        listener: Option<OwnedFd>,
        on_connect: OnConnect,
    ) -> io::Result<Self> {
        let listener = listener.map(UnixListener::from);
        if let Some(listener) = &listener {
            listener.set_nonblocking(true)?;
        }
        Ok(Self {
            guest_cid: u64::from(config.cid),
            uds_path: config.uds_path.clone(),
            listener,
            on_connect,
            lost: Vec::new(),
            active: None,
        })
    }
}

impl VirtioDevice for Vsock {
    fn device_id(&self) -> u16 {
        VIRTIO_ID_VSOCK as u16
    }

    fn name(&self) -> &str {
        "vsock"
    }

    fn queue_sizes(&self) -> &[u16] {
        // The driver fills the receive queue with a page each: 128 of them
        // hold more than all of a connection's credit.
        &[128, 128, 16]
    }

    fn features(&self) -> u64 {
        (1 << VIRTIO_F_VERSION_1) | (1 << VIRTIO_RING_F_EVENT_IDX)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let watcher = Watcher {
            event_loop: activation.event_loop.clone(),
            handler: activation.handler.clone(),
        };
        let system = |action| move |source| DeviceError::System { action, source };
        let queues = Queues::new(activation, queue::COUNT)?;
        let muxer = Muxer::new(
            self.guest_cid,
            &self.uds_path,
            self.on_connect.clone(),
            watcher.clone(),
        )
        .map_err(system("make a timer"))?;
        if let Some(listener) = &self.listener {
            watcher
                .event_loop
                .register(listener, EventSet::IN, watcher.handler, token::LISTENER)
                .map_err(system("watch the listener"))?;
        }
        self.active = Some(Active {
            muxer,
            queues,
            stalled: false,
        });
        Ok(())
    }

    fn reset(&mut self) {
        if let (Some(active), Some(listener)) = (&self.active, &self.listener) {
            active.queues.event_loop.unregister(listener);
        }
        // Unregisters and closes all else.
        self.active = None;
    }

    fn queues(&self) -> Option<&Queues> {
        self.active.as_ref().map(|active| &active.queues)
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        self.save_state()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        self.restore_state(state)
    }

    fn announce(&mut self) {
        self.announce_reset();
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.reset();
    }
}
