// SPDX-License-Identifier: Apache-2.0
//! The device towards the transport.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        atomic::{AtomicBool, Ordering},
        Arc,
    },
    time::Duration,
};

use bulkhead_vmm_api::{FsCache, FsConfig};
use fuse_backend_rs::{
    api::server::Server,
    passthrough::{CachePolicy, Config, PassthroughFs},
};
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ids::VIRTIO_ID_FS,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};

use super::{files::Files, Window};
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

/// What answers requests.
pub(super) type Backend = Server<Files>;

/// A shared directory.
pub struct Fs {
    tag: String,
    config: [u8; TAG + 4],
    options: Config,
    /// What `options.root_dir` names.
    _directory: OwnedFd,
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
        this.first = Some((backend(&this.options, &mounted)?, mounted));
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
        let (cache_policy, valid) = match config.cache {
            FsCache::Never => (CachePolicy::Never, Duration::ZERO),
            FsCache::Auto => (CachePolicy::Auto, VALID),
            FsCache::Always => (CachePolicy::Always, VALID_EXCLUSIVE),
        };
        let options = Config {
            // The dot makes the kernel follow the descriptor's link.
            root_dir: format!("/proc/self/fd/{}/.", directory.as_raw_fd()),
            cache_policy,
            attr_timeout: valid,
            entry_timeout: valid,
            xattr: true,
            // Else the guest asks for file capabilities before each write.
            killpriv_v2: true,
            ..Config::default()
        };
        Ok(Self {
            tag: config.tag.clone(),
            config: space,
            options,
            _directory: directory,
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
            tracing::error!(%error, "DAX window not cleared");
        }
    }

    /// Takes care that there is a backend, when the driver has activated the
    /// device.
    ///
    /// # Errors
    /// The directory cannot be opened any more.
    pub(super) fn prepare(&mut self) -> io::Result<()> {
        match &mut self.active {
            Some(active) if active.backend.is_none() => {
                active.backend = Some(backend(&self.options, &active.mounted)?);
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// A backend that knows nothing yet.
fn backend(options: &Config, mounted: &Arc<AtomicBool>) -> io::Result<Backend> {
    let files = PassthroughFs::new(options.clone())?;
    files.import()?;
    let shared = options.cache_policy != CachePolicy::Always;
    Ok(Server::new(Files::new(files, shared, Arc::clone(mounted))))
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
        let (backend, mounted) = match self.first.take() {
            Some((backend, mounted)) => (Some(backend), mounted),
            None => (None, Arc::default()),
        };
        self.active = Some(Active {
            queues,
            backend,
            mounted,
        });
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
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
