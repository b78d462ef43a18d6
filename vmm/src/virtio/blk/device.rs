// SPDX-License-Identifier: Apache-2.0
//! The device towards the transport.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    time::Instant,
};

use bulkhead_vmm_api::{BlkConfig, BlkEngine};
use virtio_bindings::{
    virtio_blk::{
        VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
        VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
    },
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ids::VIRTIO_ID_BLOCK,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use vmm_sys_util::{epoll::EventSet, timerfd::TimerFd};

use super::{
    disk::{Disk, MAX_DISCARD, MAX_SEGMENTS, MAX_ZEROES, SECTOR},
    event::land,
    ring::Ring,
};
use crate::virtio::{
    chain::Queues,
    device::{read_bytes, Activation, DeviceError, StateError, VirtioDevice},
    rate::Limiter,
};

/// Size of each queue; a request may have all but two of its descriptors.
const QUEUE: u16 = 256;
/// Bytes of `struct virtio_blk_config`.
const CONFIG: usize = 60;

/// A disk.
pub struct Blk {
    name: String,
    pub(super) config: [u8; CONFIG],
    features: u64,
    sizes: Vec<u16>,
    pub(super) disk: Disk,
    /// What transfers are made by; none: this process.
    pub(super) ring: Option<Ring>,
    pub(super) limiter: Option<Limiter>,
    /// The guest knows of another capacity.
    pub(super) resized: bool,
    pub(super) active: Option<Active>,
}

/// What exists between DRIVER_OK and reset.
pub(super) struct Active {
    pub queues: Queues,
    /// Fires when requests that must wait have waited; there where they must.
    pub timer: Option<TimerFd>,
}

impl Blk {
    /// A disk on `file`. Where the host has no io_uring for this process, it
    /// does without, and says so.
    ///
    /// # Errors
    /// Its size cannot be told.
    pub fn new(config: &BlkConfig, file: File) -> io::Result<Self> {
        let ring = match config.engine.unwrap_or_default() {
            BlkEngine::Sync => None,
            BlkEngine::IoUring => Some(Ring::new(&file)),
        };
        Self::with(config, file, ring)
    }

    /// As [`Self::new`], with a ring or the reason why there is none, where one
    /// is wanted.
    pub(super) fn with(
        config: &BlkConfig,
        mut file: File,
        ring: Option<io::Result<Ring>>,
    ) -> io::Result<Self> {
        let ring = ring.and_then(|ring| {
            ring.inspect_err(|error| {
                tracing::warn!(
                    disk = config.id,
                    %error,
                    "this host does not let the VMM use io_uring: requests are served one after another"
                );
            })
            .ok()
        });
        let sectors = file.seek(SeekFrom::End(0))? / SECTOR;
        let queues = config.queues.unwrap_or(1).max(1);
        let mut serial = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (to, from) in serial.iter_mut().zip(config.id.bytes()) {
            *to = from;
        }
        let mut features = (1 << VIRTIO_F_VERSION_1)
            | (1 << VIRTIO_RING_F_EVENT_IDX)
            | (1 << VIRTIO_RING_F_INDIRECT_DESC)
            | (1 << VIRTIO_BLK_F_FLUSH)
            | (1 << VIRTIO_BLK_F_SEG_MAX);
        features |= if config.read_only {
            1 << VIRTIO_BLK_F_RO
        } else {
            (1 << VIRTIO_BLK_F_DISCARD) | (1 << VIRTIO_BLK_F_WRITE_ZEROES)
        };
        if queues > 1 {
            features |= 1 << VIRTIO_BLK_F_MQ;
        }
        let mut space = [0; CONFIG];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &sectors.to_le_bytes());
        // seg_max, num_queues.
        put(12, &u32::from(QUEUE - 2).to_le_bytes());
        put(34, &queues.to_le_bytes());
        // max_discard_sectors, max_discard_seg, discard_sector_alignment.
        put(36, &MAX_DISCARD.to_le_bytes());
        put(40, &MAX_SEGMENTS.to_le_bytes());
        put(44, &DISCARD_ALIGNMENT.to_le_bytes());
        // max_write_zeroes_sectors, max_write_zeroes_seg, and that they may
        // take the space away.
        put(48, &MAX_ZEROES.to_le_bytes());
        put(52, &1_u32.to_le_bytes());
        put(56, &[1]);
        Ok(Self {
            name: config.id.clone(),
            config: space,
            features,
            sizes: vec![QUEUE; usize::from(queues)],
            disk: Disk {
                file,
                sectors,
                read_only: config.read_only,
                serial,
            },
            ring,
            limiter: config.rate.map(|rate| Limiter::new(rate, Instant::now())),
            resized: false,
            active: None,
        })
    }

    /// Token of the timer on the event loop; the queues' are below.
    pub(super) fn timer_token(&self) -> u32 {
        self.sizes.len() as u32
    }

    /// Token of the ring.
    pub(super) fn ring_token(&self) -> u32 {
        self.timer_token() + 1
    }

    /// Waits for what the kernel is at.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        let Some(ring) = &mut self.ring else {
            return Ok(());
        };
        let landed = ring.finish()?;
        if let Some(active) = &mut self.active {
            land(&mut active.queues, landed);
        }
        Ok(())
    }
}

/// Sectors of a page: what a hole is made of.
const DISCARD_ALIGNMENT: u32 = 8;

impl VirtioDevice for Blk {
    fn device_id(&self) -> u16 {
        VIRTIO_ID_BLOCK as u16
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
        let failed = |action| move |source| DeviceError::System { action, source };
        // A driver need not use all of them.
        let queues = Queues::new(activation, 1)?;
        let timer = match &self.limiter {
            Some(_) => {
                let timer = TimerFd::new()
                    .map_err(io::Error::from)
                    .map_err(failed("make a timer"))?;
                let handler = queues.handler.clone();
                queues
                    .event_loop
                    .register(&timer, EventSet::IN, handler, self.timer_token())
                    .map_err(failed("watch a timer"))?;
                Some(timer)
            }
            None => None,
        };
        if let Some(ring) = &self.ring {
            let handler = queues.handler.clone();
            queues
                .event_loop
                .register(ring, EventSet::IN, handler, self.ring_token())
                .map_err(failed("watch the ring"))?;
        }
        self.active = Some(Active { queues, timer });
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(active) = self.active.take() {
            if let Some(ring) = &mut self.ring {
                active.queues.event_loop.unregister(ring);
                // The driver has its memory back when this returns.
                if let Err(error) = ring.finish() {
                    panic!("a disk's requests cannot be waited for: {error}");
                }
            }
            if let Some(timer) = &active.timer {
                active.queues.event_loop.unregister(timer);
            }
        }
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
        self.announce_capacity();
    }
}
