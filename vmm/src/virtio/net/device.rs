// SPDX-License-Identifier: Apache-2.0
//! The device towards the transport.

use std::{fs::File, io, os::fd::AsRawFd};

use bulkhead_vmm_api::NetConfig;
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ids::VIRTIO_ID_NET,
    virtio_net::{
        VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE,
        VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
        VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
        VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
    },
    virtio_ring::VIRTIO_RING_F_EVENT_IDX,
};
use vmm_sys_util::epoll::EventSet;

use super::{receive::Ready, throttle::Throttle};
use crate::virtio::{
    chain::Queues,
    device::{read_bytes, Activation, DeviceError, StateError, VirtioDevice},
};

/// Token of the tap on the event loop; the queues' are below.
pub(super) const TAP: u32 = 3;
/// Tokens of the limits' timers.
pub(super) const RECEIVE_TIMER: u32 = 4;
pub(super) const TRANSMIT_TIMER: u32 = 5;
/// `struct virtio_net_hdr_v1`, which the tap exchanges as it is.
pub(super) const HEADER: usize = 12;

/// Where the status lies in the configuration; its upper byte has no bits.
const STATUS: usize = 6;

/// A network interface.
pub struct Net {
    name: String,
    pub(super) config: [u8; 12],
    pub(super) features: u64,
    pub(super) tap: File,
    /// Whether the loop watches the tap: not while the guest has no buffers.
    pub(super) watched: bool,
    pub(super) active: Option<Queues>,
    pub(super) ready: Ready,
    pub(super) receive_limit: Option<Throttle>,
    pub(super) transmit_limit: Option<Throttle>,
}

impl Net {
    /// An interface on `tap`, a non-blocking tap with `IFF_VNET_HDR`.
    pub fn new(config: &NetConfig, tap: File) -> io::Result<Self> {
        let mut features = (1 << VIRTIO_F_VERSION_1)
            | (1 << VIRTIO_RING_F_EVENT_IDX)
            | (1 << VIRTIO_NET_F_MAC)
            | (1 << VIRTIO_NET_F_MRG_RXBUF)
            | (1 << VIRTIO_NET_F_STATUS)
            | (1 << VIRTIO_NET_F_CTRL_VQ)
            | (1 << VIRTIO_NET_F_GUEST_ANNOUNCE);
        if set_header_size(&tap).is_ok() && set_offload(&tap, 0).is_ok() {
            features |= (1 << VIRTIO_NET_F_CSUM)
                | (1 << VIRTIO_NET_F_GUEST_CSUM)
                | (1 << VIRTIO_NET_F_HOST_TSO4)
                | (1 << VIRTIO_NET_F_HOST_TSO6)
                | (1 << VIRTIO_NET_F_GUEST_TSO4)
                | (1 << VIRTIO_NET_F_GUEST_TSO6);
        }
        // mac, status, max_virtqueue_pairs, mtu.
        let mut space = [0; 12];
        space[..6].copy_from_slice(&config.mac);
        space[STATUS] = VIRTIO_NET_S_LINK_UP as u8;
        if let Some(mtu) = config.mtu {
            features |= 1 << VIRTIO_NET_F_MTU;
            space[10..].copy_from_slice(&mtu.to_le_bytes());
        }
        Ok(Self {
            name: config.id.clone(),
            config: space,
            features,
            tap,
            watched: false,
            active: None,
            ready: Ready::default(),
            receive_limit: config.receive_rate.map(Throttle::new),
            transmit_limit: config.transmit_rate.map(Throttle::new),
        })
    }
}

impl Net {
    /// Tells the tap what the driver can take, and watches for packets.
    fn wire(&mut self) -> Result<(), DeviceError> {
        let Some(queues) = &self.active else {
            return Ok(());
        };
        let mut offload = 0;
        for (feature, flag) in [
            (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
            (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
            (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
        ] {
            if queues.has_feature(feature) {
                offload |= flag;
            }
        }
        if offload != 0 {
            set_offload(&self.tap, offload).map_err(|source| DeviceError::System {
                action: "set the tap's offloads",
                source,
            })?;
        }
        for (limit, token) in [
            (&mut self.receive_limit, RECEIVE_TIMER),
            (&mut self.transmit_limit, TRANSMIT_TIMER),
        ] {
            if let Some(limit) = limit {
                limit.start(queues, token)?;
            }
        }
        queues
            .event_loop
            .register(&self.tap, EventSet::IN, queues.handler.clone(), TAP)
            .map_err(|source| DeviceError::System {
                action: "watch the tap",
                source,
            })?;
        self.watched = true;
        Ok(())
    }

    /// The guest has announced itself.
    pub(super) fn announced(&mut self) {
        self.config[STATUS] &= !(VIRTIO_NET_S_ANNOUNCE as u8);
        if let Some(queues) = &self.active {
            queues.interrupt.show_config(&self.config);
        }
    }
}

/// Tells the tap the size of the header before each packet.
fn set_header_size(tap: &File) -> io::Result<()> {
    let size = HEADER as libc::c_int;
    // SAFETY: TUNSETVNETHDRSZ reads one int.
    match unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Tells the tap what the guest can take.
fn set_offload(tap: &File, flags: libc::c_uint) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    match unsafe {
        libc::ioctl(
            tap.as_raw_fd(),
            libc::TUNSETOFFLOAD,
            libc::c_ulong::from(flags),
        )
    } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl VirtioDevice for Net {
    fn device_id(&self) -> u16 {
        VIRTIO_ID_NET as u16
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn queue_sizes(&self) -> &[u16] {
        // To receive, to transmit, and to control.
        &[256, 256, 16]
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.active = Some(Queues::new(activation, 2)?);
        self.wire().inspect_err(|_| self.reset())
    }

    fn reset(&mut self) {
        if let Some(queues) = self.active.take() {
            queues.event_loop.unregister(&self.tap);
            self.watched = false;
            let limits = [&mut self.receive_limit, &mut self.transmit_limit];
            for limit in limits.into_iter().flatten() {
                limit.stop(&queues.event_loop);
            }
        }
        self.ready = Ready::default();
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

    /// It is elsewhere in the network, and says so itself (virtio 1.2
    /// §5.1.6.5.4).
    fn announce(&mut self) {
        let Some(queues) = &self.active else {
            return;
        };
        if queues.has_feature(VIRTIO_NET_F_GUEST_ANNOUNCE) {
            self.config[STATUS] |= VIRTIO_NET_S_ANNOUNCE as u8;
            queues.interrupt.show_config(&self.config);
            queues.interrupt.signal_config();
        }
    }
}
