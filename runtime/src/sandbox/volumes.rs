// SPDX-License-Identifier: Apache-2.0
//! Directories of the host that containers of the pod mount. Each is mounted
//! for the guest once, whichever containers have it:
//!
//! ```text
//! <sandbox>/shared/.volumes/<n>
//! ```
//!
//! To the guest two mounts of one directory would be two directories with files
//! of their own: a socket made in one could not be connected to in the other,
//! and what is written in one would be seen late in the other.
//!
//! But where the files have other ids (`idmap`): those are two mounts.
//!
//! Files that are mounted by themselves are each container's own (`rootfs`).

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use bulkhead_agent_protocol::SHARED_MOUNT;

use super::rootfs::{bind_volume, make_directory};
use crate::{
    error::{chain, Error, Step},
    oci::{Prepared, Volume},
    resource::{
        journal::{Journal, Resource},
        mount,
    },
};

/// Below the shared directory, beside the containers', whose ids do not begin
/// with a dot.
const DIRECTORY: &str = ".volumes";

/// The pod's volumes.
#[derive(Debug, Default)]
pub struct Volumes {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The directory for them is there.
    made: bool,
    next: u64,
    mounted: Vec<Mounted>,
    /// Mounted since somebody has asked last, below the shared directory.
    unwatched: Vec<PathBuf>,
}

#[derive(Debug)]
struct Mounted {
    volume: Volume,
    target: PathBuf,
    /// Device and inode of the source: another one may come to its path.
    identity: (u64, u64),
    /// Containers that have it.
    users: BTreeSet<String>,
}

impl Mounted {
    /// Whether a container that wants `volume` can have this. One that is only
    /// to read may have what another one writes: the guest keeps it from
    /// writing, and the machine as a whole may write anyway.
    fn serves(&self, volume: &Volume, identity: (u64, u64), below: &BTreeSet<PathBuf>) -> bool {
        let ours = &self.volume;
        self.identity == identity
            && ours.source == volume.source
            && ours.recursive == volume.recursive
            && ours.follows == volume.follows
            && ours.mapped == volume.mapped
            && (!ours.read_only || volume.read_only)
            && (ours.follows || !ours.recursive || self.below().is_ok_and(|ours| ours == *below))
    }

    /// What was mounted below the source when it was mounted itself.
    fn below(&self) -> std::io::Result<BTreeSet<PathBuf>> {
        below(&self.target)
    }
}

/// Mount points below a directory, relative to it.
fn below(directory: &Path) -> std::io::Result<BTreeSet<PathBuf>> {
    let found = mount::mount_points_below(directory)?;
    let relative = found
        .iter()
        .filter_map(|path| path.strip_prefix(directory).ok());
    let relative = relative.filter(|path| !path.as_os_str().is_empty());
    Ok(relative.map(Path::to_path_buf).collect())
}

impl Volumes {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the directories out of `prepared` that container `id` mounts, and
    /// has the guest look for them where the pod has them below `shared`.
    /// Blocks.
    ///
    /// # Errors
    /// A source is not there, or cannot be mounted. What was mounted before
    /// stays the container's, for [`Volumes::leave`].
    pub fn place(
        &self,
        prepared: &mut Prepared,
        id: &str,
        shared: &Path,
        journal: &Journal,
    ) -> Result<(), Error> {
        let mut state = self.state();
        for volume in std::mem::take(&mut prepared.volumes) {
            // A volume's name is the number of its mount; a hook's file has
            // another one.
            let number: Option<usize> = volume.name.parse().ok();
            let mounts = &mut prepared.spec.mounts;
            let mount = number.and_then(|number| mounts.get_mut(number));
            // What is not there is told where it is mounted.
            let found = fs::metadata(&volume.source)
                .ok()
                .filter(fs::Metadata::is_dir);
            let (Some(mount), Some(found)) = (mount, found) else {
                prepared.volumes.push(volume);
                continue;
            };
            let identity = (found.dev(), found.ino());
            let name = state.mounted(volume, identity, id, shared, journal)?;
            let before = std::mem::replace(
                &mut mount.source,
                format!("{SHARED_MOUNT}/{DIRECTORY}/{name}"),
            );
            // A listener's socket is below one of them.
            if let Some(seccomp) = prepared
                .spec
                .linux
                .as_mut()
                .and_then(|l| l.seccomp.as_mut())
            {
                let rest = seccomp.listener_path.strip_prefix(&before);
                if let Some(rest) = rest.filter(|rest| rest.starts_with('/')) {
                    seccomp.listener_path = format!("{}{rest}", mount.source);
                }
            }
        }
        Ok(())
    }

    /// Those that were mounted since the last time, below the shared
    /// directory, and that others than the pod may change.
    pub fn unwatched(&self) -> Vec<PathBuf> {
        std::mem::take(&mut self.state().unwatched)
    }

    /// Container `id` has none any more: unmounts what nobody has, after
    /// `before` was called with it. Blocks.
    ///
    /// # Errors
    /// Something cannot be unmounted; the journal has it still.
    pub fn leave(&self, id: &str, before: impl Fn(&Path)) -> Result<(), Error> {
        let mut state = self.state();
        let mut outcome = Ok(());
        state.mounted.retain_mut(|mounted| {
            if !mounted.users.remove(id) || !mounted.users.is_empty() {
                return true;
            }
            let target = &mounted.target;
            before(&Path::new(DIRECTORY).join(name_of(target)));
            let removed = mount::remove_tree(target);
            if let Err(error) = removed.step(|| format!("remove {}", target.display())) {
                tracing::warn!(container = id, error = chain(&error), "volume not removed");
                outcome = Err(error);
            }
            false
        });
        outcome
    }
}

impl State {
    /// The name of what serves a volume, mounted if it was not.
    fn mounted(
        &mut self,
        volume: Volume,
        identity: (u64, u64),
        id: &str,
        shared: &Path,
        journal: &Journal,
    ) -> Result<String, Error> {
        let known = |mounted: &&mut Mounted| mounted.identity == identity;
        let mut candidates = self.mounted.iter_mut().filter(known).peekable();
        if candidates.peek().is_some() {
            let points = below(&volume.source).step(|| "read /proc/self/mountinfo")?;
            if let Some(found) =
                candidates.find(|mounted| mounted.serves(&volume, identity, &points))
            {
                found.users.insert(id.into());
                return Ok(name_of(&found.target));
            }
        }
        let directory = shared.join(DIRECTORY);
        if !self.made {
            let path = directory.clone();
            let journaled = journal.record(Resource::Directory { path });
            journaled.step(|| "write the journal")?;
            make_directory(&directory)?;
            self.made = true;
        }
        let target = directory.join(self.next.to_string());
        self.next += 1;
        bind_volume(&volume, &target)?;
        let name = name_of(&target);
        if !is_the_pods_own(&volume.source) {
            self.unwatched.push(Path::new(DIRECTORY).join(&name));
        }
        self.mounted.push(Mounted {
            volume,
            target,
            identity,
            users: BTreeSet::from([id.to_owned()]),
        });
        Ok(name)
    }
}

/// kubelet's emptyDir, which nobody else knows.
fn is_the_pods_own(source: &Path) -> bool {
    let kind = source.parent().and_then(Path::file_name);
    kind.is_some_and(|kind| kind == "kubernetes.io~empty-dir")
}

fn name_of(target: &Path) -> String {
    let name = target.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use bulkhead_agent_protocol::oci;

    use super::*;
    use crate::resource::idmap::{IdMapping, IdRange, Mapped};

    fn prepared(source: &Path, read_only: bool) -> Prepared {
        Prepared {
            spec: oci::Spec {
                mounts: vec![oci::Mount::default()],
                ..Default::default()
            },
            volumes: vec![Volume {
                source: source.into(),
                name: "0".into(),
                recursive: true,
                read_only,
                follows: false,
                mapped: None,
            }],
            pod_sysctls: Default::default(),
        }
    }

    #[test]
    fn a_directory_is_mounted_once_for_as_long_as_somebody_has_it() {
        if !nix::unistd::geteuid().is_root() {
            println!(
                "SKIPPED: a_directory_is_mounted_once_for_as_long_as_somebody_has_it: needs root"
            );
            return;
        }
        let base = std::env::temp_dir().join(format!("bulkhead-volumes-{}", std::process::id()));
        let _ = mount::remove_tree(&base);
        let (shared, source) = (base.join("shared"), base.join("source"));
        for directory in [&shared, &source.join("below")] {
            fs::create_dir_all(directory).unwrap();
        }
        fs::write(source.join("file"), "seen").unwrap();
        let journal = Journal::create(&base).unwrap();
        let volumes = Volumes::default();
        let place = |id: &str, read_only: bool| {
            let mut prepared = prepared(&source, read_only);
            volumes.place(&mut prepared, id, &shared, &journal).unwrap();
            assert!(prepared.volumes.is_empty());
            let place = prepared.spec.mounts[0].source.clone();
            let name = place.rsplit('/').next().unwrap().to_owned();
            assert_eq!(place, format!("{SHARED_MOUNT}/.volumes/{name}"));
            assert!(shared.join(DIRECTORY).join(&name).join("file").exists());
            name
        };
        // Who may only read gets no writer's mount later.
        let reader = place("reader", true);
        let writer = place("writer", false);
        assert_ne!(reader, writer);
        assert!(fs::write(shared.join(DIRECTORY).join(&reader).join("x"), "").is_err());
        assert_eq!(place("other", false), writer);
        assert!([&reader, &writer].contains(&&place("both", true)));
        // Something has been mounted below it since: a new one sees that.
        mount::bind(&shared, &source.join("below"), false, false).unwrap();
        let later = place("later", false);
        assert!(later != writer && later != reader);
        mount::unmount(&source.join("below")).unwrap();

        let there = |name: &str| shared.join(DIRECTORY).join(name).exists();
        volumes.leave("writer", |_| ()).unwrap();
        assert!(there(&writer));
        for id in ["other", "both", "reader", "nobody"] {
            volumes.leave(id, |_| ()).unwrap();
        }
        assert!(!there(&writer) && !there(&reader) && there(&later));
        volumes.leave("later", |_| ()).unwrap();
        assert!(!there(&later));
        assert_eq!(fs::read(source.join("file")).unwrap(), b"seen");
        mount::remove_tree(&base).unwrap();
    }

    #[test]
    fn other_ids_are_another_mount() {
        const NAME: &str = "other_ids_are_another_mount";
        if !nix::unistd::geteuid().is_root() {
            println!("SKIPPED: {NAME}: needs root");
            return;
        }
        let base = std::env::temp_dir().join(format!("bulkhead-ids-{}", std::process::id()));
        let _ = mount::remove_tree(&base);
        let (shared, source) = (base.join("shared"), base.join("source"));
        for directory in [&shared, &source] {
            fs::create_dir_all(directory).unwrap();
        }
        let journal = Journal::create(&base).unwrap();
        let volumes = Volumes::default();
        let place = |id: &str, shown: u32| {
            let range = || {
                vec![IdRange {
                    stored: 0,
                    shown,
                    size: 1,
                }]
            };
            let mut prepared = prepared(&source, false);
            prepared.volumes[0].mapped = (shown != 0).then(|| Mapped {
                ids: IdMapping::new(range(), range()).unwrap(),
                recursive: true,
            });
            volumes.place(&mut prepared, id, &shared, &journal)?;
            let place = prepared.spec.mounts[0].source.clone();
            let name = place.rsplit('/').next().unwrap().to_owned();
            let found = fs::metadata(shared.join(DIRECTORY).join(&name)).unwrap();
            assert_eq!((found.uid(), found.gid()), (shown, shown));
            Ok::<_, Error>(name)
        };
        let plain = place("a", 0).unwrap();
        match place("b", 7000) {
            Ok(first) => {
                let second = place("c", 8000).unwrap();
                assert!(plain != first && first != second && plain != second);
                assert_eq!(place("d", 7000).unwrap(), first);
                assert_eq!(place("e", 0).unwrap(), plain);
            }
            Err(error) => {
                let why = error.to_string();
                assert!(why.contains("cannot be id-mapped"), "{why}");
                println!("SKIPPED: {NAME}: {why}");
            }
        }
        for id in ["a", "b", "c", "d", "e"] {
            volumes.leave(id, |_| ()).unwrap();
        }
        mount::remove_tree(&base).unwrap();
    }

    #[test]
    fn files_and_what_is_not_there_are_left_alone() {
        let base = std::env::temp_dir();
        let volumes = Volumes::default();
        let journal = base.join(format!("bulkhead-no-volumes-{}", std::process::id()));
        fs::create_dir_all(&journal).unwrap();
        let open = Journal::create(&journal).unwrap();
        for source in ["/etc/hosts", "/no/such/directory"] {
            let mut prepared = prepared(Path::new(source), true);
            volumes.place(&mut prepared, "c", &base, &open).unwrap();
            assert_eq!(prepared.volumes.len(), 1);
            assert_eq!(prepared.spec.mounts[0].source, "");
        }
        fs::remove_dir_all(&journal).unwrap();
    }
}
