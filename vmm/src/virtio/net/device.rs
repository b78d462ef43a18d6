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
        VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
        VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_ANNOUNCE,
        VIRTIO_NET_S_LINK_UP,
    },
    virtio_ring::VIRTIO_RING_F_EVENT_IDX,
};
use vmm_sys_util::epoll::EventSet;

use super::{receive::Ready, throttle::Throttle, vhost::Vhost};
use crate::virtio::{
    chain::Queues,
    device::{read_bytes, Activation, DeviceError, StateError, VirtioDevice},
};

/// `struct virtio_net_hdr_v1`, which the tap exchanges as it is.
pub(super) const HEADER: usize = 12;

/// Where the status lies in the configuration; its upper byte has no bits.
const STATUS: usize = 6;
/// And how many pairs of queues there are, where there are several.
pub(super) const PAIRS: std::ops::Range<usize> = 8..10;
/// Sizes of queues for packets, and of the one for commands.
const PACKETS: u16 = 256;
const COMMANDS: u16 = 16;

/// What an interface is connected to.
#[derive(Debug)]
pub struct Backend {
    /// One or several queues of a tap, which do not block.
    pub taps: Vec<File>,
    /// /dev/vhost-net, with one queue: the kernel moves the packets.
    pub vhost: Option<File>,
}

/// One queue of the tap.
pub(super) struct Tap {
    pub file: File,
    /// Whether the loop watches it: not while nothing can be received.
    pub watched: bool,
    /// Whether it should.
    pub wanted: bool,
}

/// A network interface.
pub struct Net {
    name: String,
    pub(super) config: [u8; 12],
    pub(super) features: u64,
    sizes: Vec<u16>,
    /// As many as there are pairs of queues.
    pub(super) taps: Vec<Tap>,
    /// What has the kernel move packets. Goes before the queues, which keep guest
    /// memory.
    pub(super) vhost: Option<Vhost>,
    pub(super) active: Option<Queues>,
    /// Of each pair.
    pub(super) ready: Vec<Ready>,
    /// How many pairs the driver uses, from the first.
    pub(super) in_use: usize,
    /// Whose turn it is when a wait ends.
    pub(super) turn: usize,
    pub(super) receive_limit: Option<Throttle>,
    pub(super) transmit_limit: Option<Throttle>,
}

impl Net {
    /// An interface on a tap with `IFF_VNET_HDR`.
    ///
    /// # Errors
    /// There is none, or what is to be vhost-net is not.
    pub fn new(config: &NetConfig, backend: Backend) -> io::Result<Self> {
        let taps = backend.taps;
        let tap = taps.first().ok_or(io::ErrorKind::NotFound)?;
        let mut features = (1 << VIRTIO_F_VERSION_1)
            | (1 << VIRTIO_RING_F_EVENT_IDX)
            | (1 << VIRTIO_NET_F_MAC)
            | (1 << VIRTIO_NET_F_MRG_RXBUF)
            | (1 << VIRTIO_NET_F_STATUS)
            | (1 << VIRTIO_NET_F_CTRL_VQ)
            | (1 << VIRTIO_NET_F_GUEST_ANNOUNCE);
        if set_header_size(tap).is_ok() && set_offload(tap, 0).is_ok() {
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
        let pairs = taps.len();
        if pairs > 1 {
            features |= 1 << VIRTIO_NET_F_MQ;
            space[PAIRS].copy_from_slice(&(pairs as u16).to_le_bytes());
        }
        let vhost = match backend.vhost {
            Some(device) => {
                let (vhost, known) = Vhost::new(device, features)?;
                features = known;
                Some(vhost)
            }
            None => None,
        };
        let mut sizes = vec![PACKETS; 2 * pairs];
        sizes.push(COMMANDS);
        let taps = taps.into_iter().map(|file| Tap {
            file,
            watched: false,
            wanted: false,
        });
        Ok(Self {
            name: config.id.clone(),
            config: space,
            features,
            sizes,
            taps: taps.collect(),
            active: None,
            ready: (0..pairs).map(|_| Ready::default()).collect(),
            in_use: 1,
            turn: 0,
            receive_limit: config.receive_rate.map(Throttle::new),
            transmit_limit: config.transmit_rate.map(Throttle::new),
            vhost,
        })
    }
}

impl Net {
    /// Tells the tap what the driver can take, and watches for packets.
    fn wire(&mut self) -> Result<(), DeviceError> {
        let Some(queues) = &self.active else {
            return Ok(());
        };
        let failed = |action| move |source| DeviceError::System { action, source };
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
        // All queues of a tap have the same.
        if let (Some(tap), true) = (self.taps.first(), self.has_offloads()) {
            set_offload(&tap.file, offload).map_err(failed("set the tap's offloads"))?;
        }
        let [receive, transmit] = self.timer_tokens();
        for (limit, token) in [
            (&mut self.receive_limit, receive),
            (&mut self.transmit_limit, transmit),
        ] {
            if let Some(limit) = limit {
                limit.start(queues, token)?;
            }
        }
        match self.start_kernel()? {
            true => Ok(()),
            false => self.watch_taps(),
        }
    }

    /// Hears of packets that come.
    pub(super) fn watch_taps(&mut self) -> Result<(), DeviceError> {
        let first = self.tap_token();
        let Some(queues) = &self.active else {
            return Ok(());
        };
        for (token, tap) in (first..).zip(&mut self.taps) {
            queues
                .event_loop
                .register(&tap.file, EventSet::IN, queues.handler.clone(), token)
                .map_err(|source| DeviceError::System {
                    action: "watch the tap",
                    source,
                })?;
            (tap.watched, tap.wanted) = (true, true);
        }
        Ok(())
    }

    /// Whether the tap can do more than move packets.
    fn has_offloads(&self) -> bool {
        self.features & (1 << VIRTIO_NET_F_CSUM) != 0
    }

    /// Token of the first queue of the tap on the event loop, which others follow;
    /// those of the guest's queues are below.
    pub(super) fn tap_token(&self) -> u32 {
        self.sizes.len() as u32
    }

    /// Tokens of the limits' timers: to receive, to transmit.
    pub(super) fn timer_tokens(&self) -> [u32; 2] {
        let next = self.tap_token() + self.taps.len() as u32;
        [next, next + 1]
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
        &self.sizes
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
            if let Some(vhost) = &mut self.vhost {
                vhost.stop(&queues);
            }
            for tap in &mut self.taps {
                queues.event_loop.unregister(&tap.file);
                (tap.watched, tap.wanted) = (false, false);
            }
            let limits = [&mut self.receive_limit, &mut self.transmit_limit];
            for limit in limits.into_iter().flatten() {
                limit.stop(&queues.event_loop);
            }
        }
        self.ready.fill_with(Ready::default);
        self.in_use = 1;
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

    fn memory_changed(&mut self) {
        self.tell_memory();
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
