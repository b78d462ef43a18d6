// SPDX-License-Identifier: Apache-2.0
//! The device towards the transport.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{
        atomic::{AtomicBool, Ordering},
        Arc, OnceLock,
    },
    time::Duration,
};

use bulkhead_vmm_api::{FsCache, FsConfig};
use fuse_backend_rs::api::server::Server;
use rustix::process::{getrlimit, setrlimit, Resource, Rlimit};
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ids::VIRTIO_ID_FS,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use vmm_sys_util::epoll::EventSet;

use super::{
    files::Files,
    locks::Locks,
    passthrough::{Caching, Passthrough},
    Window,
};
use crate::virtio::{
    chain::Queues,
    device::{read_bytes, Activation, DeviceError, SharedMemory, StateError, VirtioDevice},
};

/// Bytes of a tag (virtio 1.2 §5.11.4).
const TAG: usize = 36;
/// The queue for forgotten inodes and interrupts, and one for requests.
pub(super) const QUEUES: usize = 2;
/// A request has at most 256 pages (1 MiB) in descriptors of their own, which
/// an indirect table holds.
const QUEUE_SIZE: u16 = 256;
/// How long the guest may take names and attributes for unchanged.
const VALID: Duration = Duration::from_secs(1);
/// The same where nobody but the guest changes anything.
const VALID_EXCLUSIVE: Duration = Duration::from_secs(86_400);

/// Token of the locks' timer on the event loop; the queues' are below.
pub(super) const TIMER: u32 = QUEUES as u32;

/// What answers requests.
pub(super) struct Backend {
    pub server: Server<Files>,
    pub files: Arc<Passthrough>,
}

/// A shared directory.
pub struct Fs {
    tag: String,
    config: [u8; TAG + 4],
    caching: Caching,
    directory: Arc<OwnedFd>,
    host_locks: bool,
    /// Made in advance, for the first session.
    first: Option<(Backend, Arc<AtomicBool>)>,
    /// Where the guest may have files themselves.
    pub(super) window: Option<Window>,
    pub(super) active: Option<Active>,
}

/// What exists between DRIVER_OK and reset: a reset forgets all inodes and
/// open files.
pub(super) struct Active {
    pub queues: Queues,
    /// None until the first request: it takes files of the host, which only
    /// the device's own thread may open.
    pub backend: Option<Backend>,
    /// Where locks are the host's.
    pub locks: Option<Locks>,
    mounted: Arc<AtomicBool>,
}

impl Active {
    /// Whether the guest has a session.
    pub fn mounted(&self) -> bool {
        self.mounted.load(Ordering::SeqCst)
    }
}

impl Fs {
    /// Shares `directory` with the guest.
    ///
    /// # Errors
    /// It cannot be shared; the tag is longer than 36 bytes.
    pub fn new(config: &FsConfig, directory: OwnedFd) -> io::Result<Self> {
        let mut this = Self::unprepared(config, directory)?;
        // Now, for it shows what would fail at the guest's start.
        let mounted = Arc::<AtomicBool>::default();
        this.first = Some((this.backend(&mounted)?, mounted));
        Ok(this)
    }

    /// As [`Self::new`], on a thread that may not open files: the directory is
    /// looked into when the guest does so.
    ///
    /// # Errors
    /// The tag is longer than 36 bytes.
    pub fn unprepared(config: &FsConfig, directory: OwnedFd) -> io::Result<Self> {
        let tag = config.tag.as_bytes();
        if tag.is_empty() || tag.len() > TAG {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("tag of {} bytes: 1 to {TAG} are possible", tag.len()),
            ));
        }
        let mut space = [0; TAG + 4];
        space[..tag.len()].copy_from_slice(tag);
        space[TAG..].copy_from_slice(&1_u32.to_le_bytes());
        let caching = Caching {
            valid: match config.cache {
                FsCache::Never => Duration::ZERO,
                FsCache::Auto => VALID,
                FsCache::Always => VALID_EXCLUSIVE,
            },
            data: config.cache != FsCache::Never,
            always: config.cache == FsCache::Always,
        };
        Ok(Self {
            tag: config.tag.clone(),
            config: space,
            caching,
            directory: Arc::new(directory),
            host_locks: config.host_locks,
            first: None,
            window: None,
            active: None,
        })
    }

    /// The same device, with a DAX window.
    pub fn with_window(mut self, window: Option<Window>) -> Self {
        self.window = window;
        self
    }

    /// The guest has no file in the window any more.
    pub(super) fn clear_window(&mut self) {
        let cleared = self.window.as_mut().map_or(Ok(()), Window::clear);
        if let Err(error) = cleared {
            // The next one clears it, or the machine's end.
            limited!(error, %error, "DAX window not cleared");
        }
    }

    /// Takes care that there is a backend, when the driver has activated the
    /// device.
    ///
    /// # Errors
    /// The directory cannot be opened any more.
    pub(super) fn prepare(&mut self) -> io::Result<()> {
        let mounted = match &self.active {
            Some(active) if active.backend.is_none() => Arc::clone(&active.mounted),
            _ => return Ok(()),
        };
        let backend = self.backend(&mounted)?;
        if let Some(active) = &mut self.active {
            active.backend = Some(backend);
        }
        Ok(())
    }

    /// A backend that knows nothing yet.
    fn backend(&self, mounted: &Arc<AtomicBool>) -> io::Result<Backend> {
        let room = ROOM.get().copied().unwrap_or(LEAST_ROOM);
        let files = Passthrough::new(Arc::clone(&self.directory), self.caching, room)?;
        let files = Arc::new(files);
        let server = Server::new(Files::new(
            Arc::clone(&files),
            !self.caching.always,
            self.host_locks,
            Arc::clone(mounted),
        ));
        Ok(Backend { server, files })
    }

    /// Those who will wait for locks.
    fn locks(&self, queues: &Queues) -> io::Result<Option<Locks>> {
        if !self.host_locks {
            return Ok(None);
        }
        let locks = Locks::new()?;
        let handler = queues.handler.clone();
        queues
            .event_loop
            .register(&locks.timer, EventSet::IN, handler, TIMER)?;
        Ok(Some(locks))
    }
}

/// Descriptors that files of a shared directory may take.
static ROOM: OnceLock<usize> = OnceLock::new();
/// Where nobody has asked for more.
const LEAST_ROOM: usize = 512;
/// What is left of this process's for all else: connections, disks, taps and
/// events.
const RESERVE: u64 = 2048;

/// Lets guests have as many files as this process may have descriptors, less some
/// for itself: each file that a guest knows takes one.
pub fn allow_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    let most = limit.maximum.unwrap_or(u64::MAX);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    let now = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => most,
        Err(_) => limit.current.unwrap_or(most),
    };
    let room = now.saturating_sub(RESERVE.min(now / 2));
    let _ = ROOM.set(usize::try_from(room).unwrap_or(usize::MAX));
}

impl VirtioDevice for Fs {
    fn device_id(&self) -> u16 {
        VIRTIO_ID_FS as u16
    }

    fn name(&self) -> &str {
        &self.tag
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; QUEUES]
    }

    fn features(&self) -> u64 {
        (1 << VIRTIO_F_VERSION_1)
            | (1 << VIRTIO_RING_F_EVENT_IDX)
            | (1 << VIRTIO_RING_F_INDIRECT_DESC)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let queues = Queues::new(activation, QUEUES)?;
        let locks = self.locks(&queues).map_err(|source| DeviceError::System {
            action: "watch a timer",
            source,
        })?;
        let (backend, mounted) = match self.first.take() {
            Some((backend, mounted)) => (Some(backend), mounted),
            None => (None, Arc::default()),
        };
        self.active = Some(Active {
            queues,
            backend,
            locks,
            mounted,
        });
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(active) = self.active.take() {
            if let Some(locks) = &active.locks {
                active.queues.event_loop.unregister(&locks.timer);
            }
        }
        self.clear_window();
    }

    fn shared_memory(&self) -> Option<SharedMemory> {
        self.window.as_ref().map(Window::region)
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
}
