// SPDX-License-Identifier: Apache-2.0
//! The device towards the transport.

use std::{
    io,
    os::{
        fd::OwnedFd,
        unix::net::UnixListener,
    },
    sync::Arc,
};

use bulkhead_vmm_api::VsockConfig;
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1, virtio_ids::VIRTIO_ID_VSOCK,
    virtio_ring::VIRTIO_RING_F_EVENT_IDX,
};
use vmm_sys_util::{epoll::EventSet, timerfd::TimerFd};

use super::{
    event::{LISTENER, TIMER},
    muxer::Muxer,
};
use crate::virtio::{
    chain::Queues,
    device::{read_bytes, Activation, DeviceError, StateError, VirtioDevice},
};

/// Called with the port of each connection of the guest to the host.
pub type OnConnect = Arc<dyn Fn(u32) + Send + Sync>;

/// The vsock device.
pub struct Vsock {
    cid: u64,
    listener: Option<UnixListener>,
    timer: TimerFd,
    pub(super) muxer: Muxer,
    pub(super) active: Option<Queues>,
}

impl Vsock {
    /// A device with the guest's context id.
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
            cid: u64::from(config.cid),
            listener,
            timer: TimerFd::new()?,
            muxer: Muxer::new(u64::from(config.cid), config.uds_path.clone(), on_connect),
            active: None,
        })
    }

    pub(super) fn listener(&self) -> Option<&UnixListener> {
        self.listener.as_ref()
    }

    pub(super) fn timer(&mut self) -> &mut TimerFd {
        &mut self.timer
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
        // Receive, transmit, event.
        &[256, 256, 16]
    }

    fn features(&self) -> u64 {
        (1 << VIRTIO_F_VERSION_1) | (1 << VIRTIO_RING_F_EVENT_IDX)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let queues = Queues::new(activation, 2)?;
        let watch = |fd: &dyn std::os::fd::AsRawFd, token| {
            queues
                .event_loop
                .register(fd, EventSet::IN, queues.handler.clone(), token)
                .map_err(|source| DeviceError::System {
                    action: "watch for connections",
                    source,
                })
        };
        if let Some(listener) = &self.listener {
            watch(listener, LISTENER)?;
        }
        watch(&self.timer, TIMER)?;
        self.active = Some(queues);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(queues) = self.active.take() {
            self.muxer.clear(&queues.event_loop);
            if let Some(listener) = &self.listener {
                queues.event_loop.unregister(listener);
            }
            queues.event_loop.unregister(&self.timer);
        }
    }

    fn save(&mut self) -> Result<Vec<u8>, StateError> {
        self.save_state()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        self.restore_state(state)
    }
}
