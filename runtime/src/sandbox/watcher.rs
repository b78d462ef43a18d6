// SPDX-License-Identifier: Apache-2.0
//! Changes that others than the guest make in its volumes, for programs in the
//! guest that wait for them by inotify(7).
//!
//! virtio-fs tells nobody in the guest of them. So fanotify(7) tells the front
//! end what is changed in a volume's directories by any other process than the
//! pod's VMM; a second later, when nothing is valid any more that the guest
//! knew before, the agent announces each change there. What was created,
//! written or moved in is announced as modified under its name, what was
//! removed as a modification of its directory.
//!
//! The kernel takes the marks away with the directory or its file system, and
//! all of them with the group's descriptor: there is nothing to give back.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsStr,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use bulkhead_agent_protocol::agent::{AnnounceRequest, Change};
use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};
use rustix::fs::{openat, openat2, Dir, FileType, Mode, OFlags, ResolveFlags, CWD};
use tokio::{
    io::{unix::AsyncFd, Interest},
    task::AbortHandle,
    time::sleep,
};

use super::{blocking, Inner};
use crate::{error::chain, hypervisor::Hypervisor, sys};

/// So long the guest may take what it knows of a file for granted: the VMM's
/// file server says so with each answer.
const VALID: Duration = Duration::from_secs(1);

/// Changes of one call.
const CALL: usize = 512;
/// Changes that are announced after one look; of more, only the directories
/// are.
const MOST: usize = 4096;
/// Bytes that are read at once.
const BUFFER: usize = 64 * 1024;

/// Events with the directory's handle and the name in it (Linux 5.9):
/// FAN_REPORT_DIR_FID and FAN_REPORT_NAME, which the library does not know.
const REPORT_NAMES: u32 = 0x400 | 0x800;
/// FAN_EVENT_INFO_TYPE_DFID_NAME.
const INFO_NAME: u8 = 2;
/// `struct fanotify_event_metadata`, and the header of a further record.
const METADATA: usize = 24;
const RECORD: usize = 4;
/// In such a record: the file system's id, and the handle's length and type.
const HANDLE: usize = 16;

/// What the change of a directory's contents is.
const WANTED: MaskFlags = MaskFlags::FAN_CREATE
    .union(MaskFlags::FAN_DELETE)
    .union(MaskFlags::FAN_MOVED_FROM)
    .union(MaskFlags::FAN_MOVED_TO)
    .union(MaskFlags::FAN_MODIFY)
    .union(MaskFlags::FAN_ATTRIB)
    .union(MaskFlags::FAN_ONDIR)
    .union(MaskFlags::FAN_EVENT_ON_CHILD);

/// Directories whose changes are announced.
#[derive(Debug, Default)]
pub struct Watcher {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    group: Option<Group>,
    /// It could not be made, which was told.
    failed: bool,
    follower: Option<AbortHandle>,
}

impl Drop for State {
    fn drop(&mut self) {
        if let Some(follower) = &self.follower {
            follower.abort();
        }
    }
}

/// A fanotify group with what it watches.
#[derive(Debug)]
struct Group {
    fanotify: Fanotify,
    /// Directories by what events call them: below the shared directory.
    watched: HashMap<Vec<u8>, Vec<u8>>,
    /// Most of them.
    limit: usize,
    /// That there are more was told.
    told: bool,
    sandbox: String,
}

/// What has become of a path: its attributes alone have changed, or more.
type Changes = BTreeMap<Vec<u8>, bool>;

impl Watcher {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches a volume, `path` below the pod's shared directory, with all
    /// directories in it. What cannot be watched is told in the log. Blocks.
    fn add(&self, inner: &Arc<Inner>, path: &Path, runtime: &tokio::runtime::Handle) {
        let mut state = self.state();
        if state.failed {
            return;
        }
        let tell = |error: &dyn std::fmt::Display, volume: &Path| {
            tracing::info!(
                sandbox = inner.id,
                volume = %volume.display(),
                error = %error,
                "changes of the volume will not be told to programs that watch it"
            );
        };
        if state.group.is_none() {
            let limit = inner.config.runtime.watched_directories;
            let events = Group::new(limit, &inner.id).and_then(|group| {
                let events = group.fanotify.as_fd().try_clone_to_owned()?;
                state.group = Some(group);
                Ok(events)
            });
            match events {
                Ok(events) => {
                    let task = runtime.spawn(follow(events, Arc::downgrade(inner)));
                    state.follower = Some(task.abort_handle());
                }
                Err(error) => {
                    state.failed = true;
                    return tell(&error, path);
                }
            }
        }
        let Some(group) = &mut state.group else {
            return;
        };
        let shared = inner.directory.shared();
        if let Err(error) = group.mark(&shared, path.as_os_str().as_bytes(), None) {
            tell(&error, path);
        }
    }

    /// Watches a volume no longer, before it is unmounted: `path` below
    /// `shared`. Blocks.
    pub fn remove(&self, shared: &Path, path: &Path) {
        if let Some(group) = &mut self.state().group {
            group.unmark(shared, path.as_os_str().as_bytes());
        }
    }
}

/// Watches volumes of a container that has been made, beside everything else.
pub fn begin(inner: &Arc<Inner>, volumes: Vec<PathBuf>) {
    if volumes.is_empty() || inner.config.runtime.watched_directories == 0 {
        return;
    }
    let (inner, runtime) = (inner.clone(), tokio::runtime::Handle::current());
    tokio::task::spawn_blocking(move || {
        for volume in volumes {
            inner.watcher.add(&inner, &volume, &runtime);
        }
    });
}

impl Group {
    fn new(limit: usize, sandbox: &str) -> io::Result<Self> {
        let flags = InitFlags::FAN_CLASS_NOTIF
            | InitFlags::FAN_CLOEXEC
            | InitFlags::FAN_NONBLOCK
            | InitFlags::FAN_UNLIMITED_MARKS
            | InitFlags::from_bits_retain(REPORT_NAMES);
        Ok(Self {
            fanotify: Fanotify::init(flags, EventFFlags::O_RDONLY)?,
            watched: HashMap::new(),
            limit,
            told: false,
            sandbox: sandbox.into(),
        })
    }

    /// Marks a directory and those in it. With `found` everything in them is
    /// noted there as changed. What a guest puts in the way, links for
    /// instance, leads nowhere.
    fn mark(
        &mut self,
        shared: &Path,
        path: &[u8],
        mut found: Option<&mut Changes>,
    ) -> io::Result<()> {
        // Names, not descriptors: a guest makes as many directories as it likes.
        let mut left = vec![path.to_vec()];
        let mut first = true;
        while let Some(path) = left.pop() {
            let directory = match open_below(shared, &path) {
                Err(error) if first => return Err(error),
                Err(_) => continue,
                Ok(directory) => directory,
            };
            match self.mark_one(&directory, &path) {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                // Why one further down cannot be watched matters to it alone.
                Err(error) if first => return Err(error),
                Err(_) => {}
            }
            first = false;
            let Ok(entries) = Dir::read_from(&directory) else {
                continue;
            };
            for entry in entries.flatten() {
                let name = entry.file_name().to_bytes();
                if matches!(name, b"." | b"..") {
                    continue;
                }
                let path = joined(&path, name);
                if entry.file_type() == FileType::Directory && left.len() <= self.limit {
                    left.push(path.clone());
                }
                if let Some(found) = found.as_mut().filter(|found| found.len() < MOST) {
                    found.insert(path, false);
                }
            }
        }
        Ok(())
    }

    /// Whether there was room for it.
    fn mark_one(&mut self, directory: &OwnedFd, path: &[u8]) -> io::Result<bool> {
        let name = sys::event_name_of(directory.as_fd())?;
        if self.watched.len() >= self.limit && !self.watched.contains_key(&name) {
            if !std::mem::replace(&mut self.told, true) {
                tracing::info!(
                    sandbox = self.sandbox,
                    limit = self.limit,
                    "changes of some directories of volumes will not be told to programs that \
                     watch them: there are more than runtime.watched_directories"
                );
            }
            return Ok(false);
        }
        let flags = MarkFlags::FAN_MARK_ADD | MarkFlags::FAN_MARK_ONLYDIR;
        self.fanotify
            .mark::<_, Path>(flags, WANTED, directory, None)?;
        self.watched.insert(name, path.to_vec());
        Ok(true)
    }

    fn unmark(&mut self, shared: &Path, path: &[u8]) {
        let below = joined(path, b"");
        let fanotify = &self.fanotify;
        self.watched.retain(|_, watched| {
            if watched.as_slice() != path && !watched.starts_with(&below) {
                return true;
            }
            if let Ok(directory) = open_below(shared, watched) {
                let flags = MarkFlags::FAN_MARK_REMOVE;
                // It may have been moved elsewhere: its events are nobody's.
                let _ = fanotify.mark::<_, Path>(flags, WANTED, &directory, None);
            }
            false
        });
    }

    /// What has happened since the last look, but for what process `own` has
    /// done.
    fn look(&mut self, shared: &Path, own: u32) -> io::Result<Changes> {
        let mut changes = Changes::new();
        let mut buffer = vec![0; BUFFER];
        // Who writes faster than this is looked at again.
        while changes.len() < MOST {
            let read = match rustix::io::read(&self.fanotify, &mut buffer) {
                Ok(0) | Err(rustix::io::Errno::AGAIN) => break,
                Ok(read) => read,
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            for event in events(&buffer[..read]) {
                if event.mask.contains(MaskFlags::FAN_Q_OVERFLOW) {
                    let all = self.watched.values().take(MOST);
                    changes.extend(all.map(|path| (path.clone(), false)));
                } else if event.pid != own {
                    self.note(shared, &event, &mut changes);
                }
            }
        }
        Ok(changes)
    }

    fn note(&mut self, shared: &Path, event: &Event<'_>, changes: &mut Changes) {
        let Some(directory) = self.watched.get(event.directory).cloned() else {
            return;
        };
        let of_directory = event.mask.contains(MaskFlags::FAN_ONDIR);
        let path = match event.name {
            b"." => directory.clone(),
            name => joined(&directory, name),
        };
        let gone = MaskFlags::FAN_DELETE | MaskFlags::FAN_MOVED_FROM;
        let come = MaskFlags::FAN_CREATE | MaskFlags::FAN_MOVED_TO;
        if event.mask.intersects(gone) {
            if of_directory {
                self.unmark(shared, &path);
            }
            changes.insert(directory, false);
        }
        if event.mask.intersects(come) && of_directory {
            // What came into it before it was marked is found now.
            if let Err(error) = self.mark(shared, &path, Some(changes)) {
                tracing::debug!(%error, "a new directory of a volume is not watched");
            }
        }
        if event.mask.intersects(come | MaskFlags::FAN_MODIFY) {
            changes.insert(path, false);
        } else if event.mask.contains(MaskFlags::FAN_ATTRIB) {
            changes.entry(path).or_insert(true);
        }
    }
}

/// Ends when the pod does.
async fn follow(events: OwnedFd, inner: Weak<Inner>) {
    let events = match sys::watch(events, Interest::READABLE) {
        Ok(events) => events,
        Err((_, error)) => {
            tracing::error!(%error, "changes of volumes will not be seen");
            return;
        }
    };
    loop {
        if let Err(error) = announce(&events, &inner).await {
            tracing::error!(%error, "changes of volumes are not seen any more");
            return;
        }
    }
}

async fn announce(events: &AsyncFd<OwnedFd>, inner: &Weak<Inner>) -> io::Result<()> {
    let mut ready = events.readable().await?;
    sleep(VALID).await;
    let Some(inner) = inner.upgrade() else {
        return Ok(());
    };
    // Before the look: what comes after it makes it ready again.
    ready.clear_ready();
    let pod = inner.clone();
    let look = move || {
        let mut state = pod.watcher.state();
        let Some(group) = &mut state.group else {
            return Ok(Changes::new());
        };
        let changes = group.look(&pod.directory.shared(), pod.vm.pid());
        Ok::<_, crate::error::Error>(changes.unwrap_or_else(|error| {
            tracing::warn!(sandbox = pod.id, %error, "changes of volumes not read");
            Changes::new()
        }))
    };
    let changes = match blocking(look).await {
        Ok(changes) => changes,
        Err(error) => return Err(io::Error::other(chain(&error))),
    };
    let changes: Vec<Change> = changes
        .into_iter()
        .map(|(path, attributes)| Change {
            path,
            attributes,
            ..Default::default()
        })
        .collect();
    for part in changes.chunks(CALL) {
        let request = AnnounceRequest {
            changes: part.to_vec(),
            ..Default::default()
        };
        if let Err(error) = inner.agent.announce(request).await {
            tracing::warn!(
                sandbox = inner.id,
                error = chain(&error),
                "changes of volumes were not announced"
            );
            break;
        }
    }
    Ok(())
}

const FLAGS: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NOATIME)
    .union(OFlags::CLOEXEC);

fn open_below(shared: &Path, path: &[u8]) -> io::Result<OwnedFd> {
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let shared = openat(CWD, shared, directory, Mode::empty())?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let path = OsStr::from_bytes(path);
    Ok(openat2(&shared, path, FLAGS, Mode::empty(), resolve)?)
}

fn joined(directory: &[u8], name: &[u8]) -> Vec<u8> {
    [directory, b"/", name].concat()
}

/// An event of a group that reports names.
#[derive(Debug, PartialEq, Eq)]
struct Event<'a> {
    mask: MaskFlags,
    pid: u32,
    /// The file system's id with the directory's handle.
    directory: &'a [u8],
    /// In it; `.`: the directory itself.
    name: &'a [u8],
}

/// The events of a read(2) of the group.
fn events(mut bytes: &[u8]) -> impl Iterator<Item = Event<'_>> {
    std::iter::from_fn(move || {
        let length = word(bytes, 0)? as usize;
        let event = bytes.get(..length).filter(|_| length >= METADATA)?;
        bytes = &bytes[length..];
        let low = u64::from(word(event, 8)?);
        let high = u64::from(word(event, 12)?);
        let mut seen = Event {
            mask: MaskFlags::from_bits_retain(high << 32 | low),
            pid: word(event, 20)?,
            directory: &[],
            name: b".",
        };
        // The metadata says itself how long it is.
        let mut records = event.get((word(event, 4)? >> 16) as usize..)?;
        while let (Some(kind), Some(head)) = (records.first(), word(records, 0)) {
            let length = (head >> 16) as usize;
            let Some(record) = records.get(RECORD..length) else {
                break;
            };
            if *kind == INFO_NAME {
                let handle = word(record, 8).map_or(0, |length| length as usize);
                if let Some((directory, name)) = record.split_at_checked(HANDLE + handle) {
                    seen.directory = directory;
                    seen.name = name.split(|byte| *byte == 0).next().unwrap_or(b".");
                }
            }
            records = &records[length..];
        }
        Some(seen)
    })
}

/// 32 bits of this machine's order.
fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Changes that are seen in the volume `v` of a directory.
    struct Rig {
        directory: tempfile::TempDir,
        group: Group,
    }

    impl Rig {
        fn new(limit: usize) -> Option<Self> {
            let directory = tempfile::tempdir().unwrap();
            fs::create_dir_all(directory.path().join("v/old")).unwrap();
            let mut group = match Group::new(limit, "test") {
                Ok(group) => group,
                Err(error) => {
                    println!("SKIPPED: changes of volumes: fanotify_init: {error}");
                    return None;
                }
            };
            if let Err(error) = group.mark(directory.path(), b"v", None) {
                println!("SKIPPED: changes of volumes: fanotify_mark here: {error}");
                return None;
            }
            Some(Self { directory, group })
        }

        fn path(&self, path: &str) -> PathBuf {
            self.directory.path().join(path)
        }

        /// What others than process `own` have changed since.
        fn look(&mut self, own: u32) -> Vec<(String, bool)> {
            let changes = self.group.look(self.directory.path(), own).unwrap();
            let text = |path: Vec<u8>| String::from_utf8(path).unwrap();
            changes.into_iter().map(|(p, a)| (text(p), a)).collect()
        }
    }

    fn changed(paths: &[&str]) -> Vec<(String, bool)> {
        paths.iter().map(|path| ((*path).into(), false)).collect()
    }

    #[test]
    fn changes_have_their_paths() {
        let Some(mut rig) = Rig::new(100) else { return };
        fs::write(rig.path("v/old/file"), "1").unwrap();
        assert_eq!(rig.look(0), changed(&["v/old/file"]));
        // In a directory that was not there, before and after it is seen.
        fs::create_dir_all(rig.path("v/new/deep")).unwrap();
        fs::write(rig.path("v/new/deep/early"), "1").unwrap();
        let wanted = ["v/new", "v/new/deep", "v/new/deep/early"];
        assert_eq!(rig.look(0), changed(&wanted));
        fs::write(rig.path("v/new/deep/late"), "1").unwrap();
        assert_eq!(rig.look(0), changed(&["v/new/deep/late"]));
        let mode = fs::metadata(rig.path("v/old/file")).unwrap().permissions();
        fs::set_permissions(rig.path("v/old/file"), mode).unwrap();
        assert_eq!(rig.look(0), [("v/old/file".into(), true)]);
        fs::rename(rig.path("v/old/file"), rig.path("v/new/file")).unwrap();
        assert_eq!(rig.look(0), changed(&["v/new/file", "v/old"]));
        fs::remove_file(rig.path("v/new/file")).unwrap();
        assert_eq!(rig.look(0), changed(&["v/new"]));
        // A directory that was moved away tells nothing any more.
        fs::rename(rig.path("v/new"), rig.path("elsewhere")).unwrap();
        assert_eq!(rig.look(0), changed(&["v"]));
        fs::write(rig.path("elsewhere/deep/late"), "2").unwrap();
        fs::write(rig.path("outside"), "1").unwrap();
        assert_eq!(rig.look(0), []);
        // What the pod's own VMM does is known to the guest.
        fs::write(rig.path("v/old/own"), "1").unwrap();
        assert_eq!(rig.look(std::process::id()), []);
        rig.group.unmark(rig.directory.path(), b"v");
        fs::write(rig.path("v/old/last"), "1").unwrap();
        assert_eq!(rig.look(0), []);
        assert!(rig.group.watched.is_empty());
    }

    #[test]
    fn no_more_directories_than_allowed_and_no_link_out() {
        let Some(mut rig) = Rig::new(3) else { return };
        fs::create_dir_all(rig.path("outside/secret")).unwrap();
        std::os::unix::fs::symlink(rig.path("outside"), rig.path("v/link")).unwrap();
        assert_eq!(rig.look(0), changed(&["v/link"]));
        assert!(rig
            .group
            .mark(rig.directory.path(), b"v/link", None)
            .is_err());
        assert!(rig.group.mark(rig.directory.path(), b"../x", None).is_err());
        for name in ["a", "b", "c"] {
            fs::create_dir(rig.path("v").join(name)).unwrap();
        }
        rig.look(0);
        assert_eq!(rig.group.watched.len(), 3);
    }

    #[test]
    fn events_that_are_cut_short_are_left_out() {
        let name = b"name\0\0\0\0";
        let record = RECORD + HANDLE + 8 + name.len();
        let mut event = Vec::new();
        event.extend((METADATA + record).to_ne_bytes()[..4].iter());
        event.extend([3, 0, 24, 0]);
        event.extend(MaskFlags::FAN_MODIFY.bits().to_ne_bytes());
        event.extend((-1_i32).to_ne_bytes());
        event.extend(77_u32.to_ne_bytes());
        event.extend([INFO_NAME, 0, record as u8, 0]);
        event.extend([9; 8]);
        event.extend(8_u32.to_ne_bytes());
        event.extend(1_u32.to_ne_bytes());
        event.extend([7; 8]);
        event.extend(name);
        let seen: Vec<_> = events(&event).collect();
        assert_eq!((seen[0].name, seen[0].pid), (&b"name"[..], 77));
        assert_eq!(seen[0].directory.len(), HANDLE + 8);
        for length in 0..event.len() {
            assert_eq!(events(&event[..length]).count(), 0, "{length}");
        }
        // Lengths that lie.
        for at in 0..event.len() {
            let mut event = event.clone();
            event[at] = 255;
            let _ = events(&event).count();
        }
    }
}
