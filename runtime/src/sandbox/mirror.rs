// SPDX-License-Identifier: Apache-2.0
//! Volumes of which the guest has a copy, and that are watched.
//!
//! virtio-fs tells nobody in the guest of changes that the host makes. Programs
//! that wait for a ConfigMap or a Secret to change do it by inotify(7). So those
//! of kubelet's volumes that are written by kubelet alone, and read-only to the
//! container, are not shared but copied, and each change is sent after.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read},
    mem::MaybeUninit,
    os::{
        fd::OwnedFd,
        unix::{
            ffi::OsStrExt,
            fs::{MetadataExt, OpenOptionsExt},
        },
    },
    path::{Path, PathBuf},
    sync::Weak,
    time::Duration,
};

use bulkhead_agent_protocol::agent::{Mirror, MirrorEntry, UpdateMirrorRequest};
use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};
use tokio::{
    io::{unix::AsyncFd, Interest},
    task::JoinHandle,
    time::sleep,
};

use super::{blocking, Inner};
use crate::{
    error::{chain, Error, Step},
    oci::Volume,
    resource::idmap::IdMapping,
    sys,
};

/// Directories of kubelet for volumes that it writes itself.
const KINDS: [&str; 4] = [
    "kubernetes.io~configmap",
    "kubernetes.io~secret",
    "kubernetes.io~projected",
    "kubernetes.io~downward-api",
];

/// The contents of one copy, in bytes: with names and numbers it fits in one
/// message (4 MiB). An object of Kubernetes has at most one MiB.
const LARGEST: u64 = 3 << 20;

/// Files, directories and links of one copy.
const MOST: usize = 1024;

/// A change is over when nothing more has come for as long.
const QUIET: Duration = Duration::from_millis(20);

/// As often a change that goes on is waited for, or a tree that does not hold
/// still is read again.
const PATIENCE: usize = 25;

/// Whether a volume is one of those that are copied.
pub fn is_kubelets(source: &Path) -> bool {
    let kind = source.parent().and_then(Path::file_name);
    kind.is_some_and(|kind| KINDS.iter().any(|known| kind == *known))
}

/// A volume that the guest gets a copy of.
#[derive(Debug)]
pub struct Mirrored {
    source: PathBuf,
    /// Those that the copy has.
    ids: Option<IdMapping>,
    watch: Watch,
    /// The copy.
    pub tree: Mirror,
}

impl Mirrored {
    /// Watches and reads a volume. None: it cannot be copied, and is shared as
    /// any other, whose changes are announced. Blocks.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn new(volume: &Volume) -> Result<Option<Self>, Error> {
        let source = volume.source.as_path();
        let ids = volume.mapped.as_ref().map(|mapped| mapped.ids.clone());
        let step = || format!("read {}", source.display());
        let shared = |why: &str| {
            tracing::info!(volume = %source.display(), why, "the volume is shared, not copied");
            Ok(None)
        };
        let watch = match Watch::of(source) {
            Ok(watch) => watch,
            Err(error) if is_exhausted(&error) => return shared(&error.to_string()),
            Err(error) => return Err(error).step(step),
        };
        let entries = match read(source, ids.as_ref()).step(step)? {
            Ok(entries) => entries,
            Err(why) => return shared(&why),
        };
        let tree = Mirror {
            name: volume.name.clone(),
            entries,
            ..Default::default()
        };
        Ok(Some(Self {
            source: source.into(),
            ids,
            watch,
            tree,
        }))
    }

    /// Sends every change after, for as long as the result is there.
    pub fn follow(self, inner: Weak<Inner>, container: String) -> Following {
        Following(tokio::spawn(follow(self, inner, container)))
    }
}

/// Ends with the container.
#[derive(Debug)]
pub struct Following(JoinHandle<()>);

impl Drop for Following {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn follow(mirrored: Mirrored, inner: Weak<Inner>, container: String) {
    let Mirrored {
        source,
        ids,
        watch,
        mut tree,
    } = mirrored;
    let volume = source.display().to_string();
    let mut watch = match watch.events() {
        Ok(watch) => watch,
        Err(error) => {
            tracing::error!(volume, %error, "changes of the volume will not be seen");
            return;
        }
    };
    loop {
        if let Err(error) = watch.change().await {
            tracing::error!(volume, %error, "changes of the volume are not seen any more");
            return;
        }
        let (place, ids) = (source.clone(), ids.clone());
        let read = blocking(move || {
            // Directories that are new.
            let again = watch.below(&place);
            let entries = again.and_then(|()| read(&place, ids.as_ref()));
            Ok((watch, entries))
        });
        let entries;
        (watch, entries) = match read.await {
            Ok(read) => read,
            Err(error) => {
                tracing::error!(
                    volume,
                    error = chain(&error),
                    "a volume is not read any more"
                );
                return;
            }
        };
        match entries {
            Ok(Ok(entries)) if entries == tree.entries => continue,
            Ok(Ok(entries)) => tree.entries = entries,
            Ok(Err(why)) => {
                tracing::error!(
                    volume,
                    why,
                    "the guest's copy of the volume stays as it was"
                );
                continue;
            }
            // kubelet takes it away when the pod ends.
            Err(error) => {
                tracing::info!(volume, %error, "the volume cannot be read");
                continue;
            }
        }
        let Some(inner) = inner.upgrade() else { return };
        let request = UpdateMirrorRequest {
            container_id: container.clone(),
            mirror: Some(tree.clone()).into(),
            ..Default::default()
        };
        match inner.agent.update_mirror(request).await {
            Ok(_) => tracing::info!(sandbox = inner.id, container, volume, "volume updated"),
            Err(error) => {
                tracing::error!(
                    sandbox = inner.id,
                    container,
                    volume,
                    error = chain(&error),
                    "the guest's copy of a volume was not updated"
                );
                // Whatever comes next is sent, even if it is the same.
                tree.entries.clear();
            }
        }
    }
}

/// An inotify instance.
#[derive(Debug)]
struct Watch(OwnedFd);

/// Whether a user has as many inotify instances or watches as the host allows
/// (fs.inotify.max_user_instances, fs.inotify.max_user_watches).
fn is_exhausted(error: &io::Error) -> bool {
    let number = error.raw_os_error();
    number.is_some_and(|number| [libc::EMFILE, libc::ENOSPC].contains(&number))
}

impl Watch {
    fn of(directory: &Path) -> io::Result<Self> {
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        all_below(&fd, directory)?;
        Ok(Self(fd))
    }

    fn events(self) -> io::Result<Events> {
        sys::watch(self.0, Interest::READABLE)
            .map(Events)
            .map_err(|(_, error)| error)
    }
}

/// Watches a directory and those in it; again is as good as once.
fn all_below(fd: &OwnedFd, directory: &Path) -> io::Result<()> {
    let what = WatchFlags::CREATE
        | WatchFlags::DELETE
        | WatchFlags::MOVED_FROM
        | WatchFlags::MOVED_TO
        | WatchFlags::ATTRIB
        | WatchFlags::CLOSE_WRITE
        | WatchFlags::ONLYDIR
        | WatchFlags::DONT_FOLLOW;
    inotify::add_watch(fd, directory, what)?;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            match all_below(fd, &entry.path()) {
                // It went meanwhile, which is the next change.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => other?,
            }
        }
    }
    Ok(())
}

struct Events(AsyncFd<OwnedFd>);

impl Events {
    fn below(&self, directory: &Path) -> io::Result<()> {
        all_below(self.0.get_ref(), directory)
    }

    /// Waits for a change, and for its end.
    async fn change(&mut self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            if drain(self.0.get_ref())? {
                break;
            }
            ready.clear_ready();
        }
        for _ in 0..PATIENCE {
            sleep(QUIET).await;
            if !drain(self.0.get_ref())? {
                break;
            }
        }
        Ok(())
    }
}

/// Takes what there is; whether there was something.
fn drain(fd: &OwnedFd) -> io::Result<bool> {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = Reader::new(fd, &mut buffer);
    let mut some = false;
    loop {
        match reader.next() {
            Ok(_) => some = true,
            Err(rustix::io::Errno::AGAIN) => return Ok(some),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// What a tree is known by, to see that it has not changed meanwhile.
type Fingerprint = BTreeMap<PathBuf, (u64, i64, i64, u64)>;

/// All of a directory as it is at one moment, or why it cannot be copied.
fn read(directory: &Path, ids: Option<&IdMapping>) -> io::Result<Result<Vec<MirrorEntry>, String>> {
    let mut before = fingerprint(directory)?;
    for _ in 0..PATIENCE {
        let entries = read_once(directory, ids);
        let after = fingerprint(directory)?;
        if before == after {
            return entries;
        }
        before = after;
    }
    Ok(Err("it changes all the time".into()))
}

fn fingerprint(directory: &Path) -> io::Result<Fingerprint> {
    let mut all = BTreeMap::new();
    walk(directory, Path::new(""), &mut |path, meta| {
        let mark = (meta.ino(), meta.ctime(), meta.ctime_nsec(), meta.size());
        all.insert(path.to_owned(), mark);
        all.len() <= MOST
    })?;
    Ok(all)
}

fn read_once(
    directory: &Path,
    ids: Option<&IdMapping>,
) -> io::Result<Result<Vec<MirrorEntry>, String>> {
    let mut found = Vec::new();
    walk(directory, Path::new(""), &mut |path, meta| {
        found.push((path.to_owned(), meta.clone()));
        found.len() <= MOST
    })?;
    if found.len() > MOST {
        return Ok(Err(format!("it has more than {MOST} files")));
    }
    let mut left = LARGEST;
    let mut entries = Vec::new();
    for (path, meta) in found {
        let full = directory.join(&path);
        let kind = meta.file_type();
        let data = if kind.is_dir() {
            Vec::new()
        } else if kind.is_symlink() {
            fs::read_link(&full)?.as_os_str().as_bytes().to_vec()
        } else if kind.is_file() {
            let file = fs::OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
                .open(&full)?;
            let mut data = Vec::new();
            file.take(left + 1).read_to_end(&mut data)?;
            data
        } else {
            return Ok(Err(format!("{} is no file", path.display())));
        };
        match left.checked_sub(data.len() as u64) {
            Some(rest) => left = rest,
            None => return Ok(Err(format!("it has more than {LARGEST} bytes"))),
        }
        let Some(path) = path.to_str() else {
            return Ok(Err(format!("{path:?} is no UTF-8")));
        };
        entries.push(MirrorEntry {
            path: path.into(),
            mode: meta.mode(),
            uid: ids.map_or(meta.uid(), |ids| ids.user(meta.uid())),
            gid: ids.map_or(meta.gid(), |ids| ids.group(meta.gid())),
            data,
            identity: meta.ino(),
            modified_ns: meta.mtime() * 1_000_000_000 + meta.mtime_nsec(),
            ..Default::default()
        });
    }
    Ok(Ok(entries))
}

/// Calls `each` for everything below `top`, directories before what is in
/// them, until it says `false`.
fn walk(
    top: &Path,
    below: &Path,
    each: &mut impl FnMut(&Path, &fs::Metadata) -> bool,
) -> io::Result<()> {
    let place = top.join(below);
    let meta = fs::symlink_metadata(&place)?;
    if !each(below, &meta) || !meta.is_dir() {
        return Ok(());
    }
    let mut names = fs::read_dir(&place)?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<io::Result<Vec<_>>>()?;
    names.sort();
    for name in names {
        walk(top, &below.join(name), each)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::idmap::IdRange;

    use std::os::unix::fs::symlink;

    fn volume() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("volume");
        fs::create_dir_all(place.join("..1")).unwrap();
        fs::write(place.join("..1/key"), "value").unwrap();
        symlink("..1", place.join("..data")).unwrap();
        symlink("..data/key", place.join("key")).unwrap();
        (directory, place)
    }

    #[test]
    fn kubelets_volumes_are_known_by_their_place() {
        let pod = Path::new("/var/lib/kubelet/pods/x/volumes");
        for (name, wanted) in [
            ("kubernetes.io~configmap/config", true),
            ("kubernetes.io~projected/kube-api-access-x", true),
            ("kubernetes.io~empty-dir/data", false),
            ("kubernetes.io~configmap", false),
            ("kubernetes.io~secret/s/below", false),
        ] {
            assert_eq!(is_kubelets(&pod.join(name)), wanted, "{name}");
        }
    }

    #[test]
    fn a_tree_is_read_whole() {
        let (_directory, place) = volume();
        let entries = read(&place, None).unwrap().unwrap();
        let paths: Vec<&str> = entries.iter().map(|entry| entry.path.as_str()).collect();
        assert_eq!(paths, ["", "..1", "..1/key", "..data", "key"]);
        assert_eq!(entries[2].data, b"value");
        assert_eq!(entries[3].data, b"..1");
        assert_eq!(entries[2].mode & libc::S_IFMT, libc::S_IFREG);
        // With other ids, as a container with a user namespace has it.
        let range = |stored, shown| IdRange {
            stored,
            shown,
            size: 1,
        };
        let owner = (entries[2].uid, entries[2].gid);
        let (users, groups) = (range(owner.0, 7000), range(owner.1 + 1, 9));
        let ids = IdMapping::new(vec![users], vec![groups]).unwrap();
        let entries = read(&place, Some(&ids)).unwrap().unwrap();
        assert_eq!((entries[2].uid, entries[2].gid), (7000, 65534));
    }

    #[test]
    fn what_is_too_big_or_no_file_is_not_copied() {
        let (_directory, place) = volume();
        let why = || read(&place, None).unwrap().unwrap_err();
        let big = fs::File::create(place.join("big")).unwrap();
        big.set_len(LARGEST).unwrap();
        assert!(why().contains("bytes"), "{}", why());
        fs::remove_file(place.join("big")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(place.join("socket")).unwrap();
        assert!(why().contains("no file"), "{}", why());
        fs::remove_file(place.join("socket")).unwrap();
        for number in 0..MOST {
            fs::write(place.join(number.to_string()), "").unwrap();
        }
        assert!(why().contains("more than 1024 files"), "{}", why());
    }

    #[tokio::test]
    async fn every_change_is_seen() {
        let (_directory, place) = volume();
        let watch = Watch::of(&place).unwrap();
        let mut events = watch.events().unwrap();
        let seen = async |events: &mut Events| {
            let change = tokio::time::timeout(Duration::from_secs(60), events.change());
            change.await.expect("no event").unwrap();
            events.below(&place).unwrap();
        };
        fs::write(place.join("..1/key"), "else").unwrap();
        seen(&mut events).await;
        fs::create_dir(place.join("..2")).unwrap();
        seen(&mut events).await;
        // In a directory that was not there at first.
        fs::write(place.join("..2/key"), "new").unwrap();
        seen(&mut events).await;
        symlink("..2", place.join("..data_tmp")).unwrap();
        fs::rename(place.join("..data_tmp"), place.join("..data")).unwrap();
        seen(&mut events).await;
        assert!(!drain(events.0.get_ref()).unwrap());
    }
}
