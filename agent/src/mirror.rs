// SPDX-License-Identifier: Apache-2.0
//! Copies of small directories of the host, in memory. virtio-fs tells nobody
//! in the guest of the host's changes; here the agent makes them, and the
//! kernel tells who watches (inotify(7)). They are made as kubelet makes its
//! own: what is new first, then links are switched by a rename, then what is
//! no longer there is removed.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use bulkhead_agent_protocol::agent::{Mirror as Wanted, MirrorEntry};
use nix::errno::Errno;
use nix::fcntl::{openat, readlinkat, renameat, AtFlags, OFlag};
use nix::sys::stat::{
    fchmodat, fstatat, mkdirat, utimensat, FchmodatFlags, FileStat, Mode, UtimensatFlags,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{fchownat, symlinkat, unlinkat, Gid, Uid, UnlinkatFlags};

use crate::container::check_name;
use crate::error::{AgentError, Context, Result};
use crate::sys::mount::open_in_root;

/// The copies of one container; gone when dropped.
#[derive(Debug)]
pub struct Mirrors {
    directory: PathBuf,
    all: BTreeMap<String, Mirror>,
}

#[derive(Debug)]
struct Mirror {
    root: PathBuf,
    /// What is there: its type and its identity on the host.
    known: BTreeMap<String, (u32, u64)>,
}

impl Mirrors {
    /// Makes all of them in `directory`, which is made where there are any.
    ///
    /// # Errors
    /// [`AgentError::Invalid`] naming the entry, or the step that failed.
    pub fn make(directory: &Path, wanted: &[Wanted]) -> Result<Self> {
        let mut mirrors = Self {
            directory: directory.to_owned(),
            all: BTreeMap::new(),
        };
        if !wanted.is_empty() {
            fs::create_dir_all(directory).step(|| format!("create {}", directory.display()))?;
        }
        for each in wanted {
            check_name(&each.name, "mirrors.name")?;
            let root = directory.join(&each.name);
            fs::create_dir(&root).step(|| format!("create {}", root.display()))?;
            let known = BTreeMap::new();
            let mut mirror = Mirror { root, known };
            mirror.update(&each.entries)?;
            mirrors.all.insert(each.name.clone(), mirror);
        }
        Ok(mirrors)
    }

    /// Makes one of them what it is now on the host.
    ///
    /// # Errors
    /// [`AgentError::NotFound`], and those of [`Self::make`].
    pub fn update(&mut self, wanted: &Wanted) -> Result<()> {
        let mirror = self
            .all
            .get_mut(&wanted.name)
            .ok_or_else(|| AgentError::NotFound(format!("mirror {:?}", wanted.name)))?;
        mirror.update(&wanted.entries)
    }
}

impl Drop for Mirrors {
    fn drop(&mut self) {
        match fs::remove_dir_all(&self.directory) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => crate::warn!("msg=\"copies left behind\" error=\"{error}\""),
        }
    }
}

/// Checks that entries name places below one directory, each in a directory
/// that comes before it.
///
/// # Errors
/// [`AgentError::Invalid`] naming the entry.
pub fn check(entries: &[MirrorEntry]) -> Result<()> {
    let wrong = |entry: &MirrorEntry, why: &str| {
        Err(AgentError::Invalid(format!(
            "mirrors.entries: {:?}: {why}",
            entry.path
        )))
    };
    let mut seen: BTreeMap<&Path, u32> = BTreeMap::new();
    for entry in entries {
        let path = Path::new(&entry.path);
        let kind = kind(entry.mode);
        if !matches!(kind, libc::S_IFDIR | libc::S_IFREG | libc::S_IFLNK) {
            return wrong(entry, "not a directory, a file or a symbolic link");
        }
        let plain = path
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
        if !plain || entry.path.contains('\0') || path.as_os_str() != normal(path).as_os_str() {
            return wrong(entry, "not a path within the directory");
        }
        match path.parent() {
            None if kind != libc::S_IFDIR => return wrong(entry, "not a directory"),
            None => {}
            Some(parent) if seen.get(parent) != Some(&libc::S_IFDIR) => {
                return wrong(entry, "no directory comes before it")
            }
            Some(_) => {}
        }
        if seen.insert(path, kind).is_some() {
            return wrong(entry, "is there twice");
        }
    }
    Ok(())
}

fn normal(path: &Path) -> PathBuf {
    path.components().collect()
}

fn kind(mode: u32) -> u32 {
    mode & libc::S_IFMT
}

/// The directory that an entry is in, and its name there.
struct Place {
    directory: OwnedFd,
    name: PathBuf,
}

impl Mirror {
    fn update(&mut self, entries: &[MirrorEntry]) -> Result<()> {
        check(entries)?;
        let root: OwnedFd = File::open(&self.root)
            .step(|| format!("open {}", self.root.display()))?
            .into();
        self.remove(&root, |path, had| {
            // What was something else makes room first.
            entries
                .iter()
                .any(|entry| entry.path == path && kind(entry.mode) != had)
        })?;
        let (links, others): (Vec<_>, Vec<_>) = entries
            .iter()
            .partition(|entry| kind(entry.mode) == libc::S_IFLNK);
        for entry in others.into_iter().chain(links) {
            self.put(&root, entry)
                .step(|| format!("write {}/{}", self.root.display(), entry.path))?;
            let now = (kind(entry.mode), entry.identity);
            self.known.insert(entry.path.clone(), now);
        }
        let wanted: std::collections::BTreeSet<&str> =
            entries.iter().map(|entry| entry.path.as_str()).collect();
        self.remove(&root, |path, _| !wanted.contains(path))
    }

    /// Removes what is chosen, and what is below it.
    fn remove(&mut self, root: &OwnedFd, chosen: impl Fn(&str, u32) -> bool) -> Result<()> {
        let mut tops: Vec<PathBuf> = Vec::new();
        for (path, (kind, _)) in &self.known {
            let below = tops.iter().any(|top| Path::new(path).starts_with(top));
            if below || !path.is_empty() && chosen(path, *kind) {
                tops.push(path.into());
            }
        }
        // What is in a directory comes behind it.
        for path in tops.iter().rev() {
            let text = path.to_string_lossy();
            let directory = self
                .known
                .remove(text.as_ref())
                .is_some_and(|(kind, _)| kind == libc::S_IFDIR);
            let how = match directory {
                true => UnlinkatFlags::RemoveDir,
                false => UnlinkatFlags::NoRemoveDir,
            };
            let removed =
                place(root, path).and_then(|place| unlinkat(&place.directory, &place.name, how));
            match removed {
                Ok(()) | Err(Errno::ENOENT) => {}
                Err(errno) => return Err(errno).step(|| format!("remove {text}")),
            }
        }
        Ok(())
    }

    fn put(&self, root: &OwnedFd, entry: &MirrorEntry) -> nix::Result<()> {
        let place = place(root, Path::new(&entry.path))?;
        let known = self.known.get(&entry.path);
        match kind(entry.mode) {
            libc::S_IFDIR => {
                let missing = known.is_none() && !entry.path.is_empty();
                if missing {
                    mkdirat(&place.directory, &place.name, Mode::from_bits_retain(0o700))?;
                }
                place.own(&place.name, entry)
            }
            libc::S_IFLNK => {
                let target = OsStr::from_bytes(&entry.data);
                match readlinkat(&place.directory, &place.name) {
                    Ok(now) if now == target => place.own(&place.name, entry),
                    Ok(_) => {
                        place.exchange(entry, |name| symlinkat(target, &place.directory, name))
                    }
                    Err(Errno::ENOENT) => {
                        symlinkat(target, &place.directory, &place.name)?;
                        place.own(&place.name, entry)
                    }
                    Err(errno) => Err(errno),
                }
            }
            _ => match known {
                None => {
                    place.create(&place.name, entry)?;
                    place.own(&place.name, entry)
                }
                Some((_, identity)) if *identity != entry.identity => {
                    place.exchange(entry, |name| place.create(name, entry))
                }
                Some(_) => {
                    place.write(entry)?;
                    place.own(&place.name, entry)
                }
            },
        }
    }
}

/// Nothing that a container has put in the way leads out of `root`.
fn place(root: &OwnedFd, path: &Path) -> nix::Result<Place> {
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    let (above, name) = match (path.parent(), path.file_name()) {
        (Some(above), Some(name)) => (above, Path::new(name)),
        _ => (Path::new(""), Path::new(".")),
    };
    let directory = open_in_root(root.as_fd(), &Path::new("/").join(above), flags, 0)?;
    Ok(Place {
        directory,
        name: name.into(),
    })
}

impl Place {
    fn open(&self, name: &Path, flags: OFlag) -> nix::Result<File> {
        let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let mode = Mode::from_bits_retain(0o600);
        openat(&self.directory, name, flags, mode).map(File::from)
    }

    fn create(&self, name: &Path, entry: &MirrorEntry) -> nix::Result<()> {
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY;
        let mut file = self.open(name, flags)?;
        file.write_all(&entry.data).map_err(errno)
    }

    /// Writes to a file that is there, unless it has these contents.
    fn write(&self, entry: &MirrorEntry) -> nix::Result<()> {
        let mut now = Vec::new();
        self.open(&self.name, OFlag::O_RDONLY)?
            .read_to_end(&mut now)
            .map_err(errno)?;
        if now == entry.data {
            return Ok(());
        }
        let mut file = self.open(&self.name, OFlag::O_WRONLY)?;
        // Never shorter than it will be: who reads meanwhile sees no empty file
        // that was not one.
        file.write_all(&entry.data).map_err(errno)?;
        let end = file.stream_position().map_err(errno)?;
        file.set_len(end).map_err(errno)
    }

    /// Makes something by another name, and puts it in this one's place.
    fn exchange(
        &self,
        entry: &MirrorEntry,
        make: impl FnOnce(&Path) -> nix::Result<()>,
    ) -> nix::Result<()> {
        // kubelet's own name for what replaces `..data`.
        let mut name = self.name.clone().into_os_string();
        name.push("_tmp");
        let name = PathBuf::from(name);
        match unlinkat(&self.directory, &name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(errno) => return Err(errno),
        }
        make(&name)?;
        self.own(&name, entry)?;
        renameat(&self.directory, &name, &self.directory, &self.name)
    }

    /// Sets owner, permissions and time, where they differ: each change is told.
    fn own(&self, name: &Path, entry: &MirrorEntry) -> nix::Result<()> {
        let now: FileStat = fstatat(&self.directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        if (now.st_uid, now.st_gid) != (entry.uid, entry.gid) {
            let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
            let flags = AtFlags::AT_SYMLINK_NOFOLLOW;
            fchownat(&self.directory, name, Some(uid), Some(gid), flags)?;
        }
        if kind(now.st_mode) == libc::S_IFLNK {
            return Ok(());
        }
        if now.st_mode & 0o7777 != entry.mode & 0o7777 {
            let mode = Mode::from_bits_retain(entry.mode & 0o7777);
            fchmodat(&self.directory, name, mode, FchmodatFlags::NoFollowSymlink)?;
        }
        let modified = TimeSpec::new(
            entry.modified_ns.div_euclid(1_000_000_000),
            entry.modified_ns.rem_euclid(1_000_000_000),
        );
        let same = (now.st_mtime, now.st_mtime_nsec) == (modified.tv_sec(), modified.tv_nsec());
        if kind(now.st_mode) == libc::S_IFREG && !same {
            let flags = UtimensatFlags::NoFollowSymlink;
            utimensat(
                &self.directory,
                name,
                &TimeSpec::UTIME_OMIT,
                &modified,
                flags,
            )?;
        }
        Ok(())
    }
}

fn errno(error: std::io::Error) -> Errno {
    crate::error::errno_of(&error)
}

#[cfg(test)]
#[path = "mirror_tests.rs"]
mod tests;
