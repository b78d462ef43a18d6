// SPDX-License-Identifier: Apache-2.0
//! A container's files on the host: its root file system and single files,
//! mounted below the directory that the guest shares.
//!
//! ```text
//! <sandbox>/shared/<container>/rootfs      from a snapshotter, or root.path
//! <sandbox>/shared/<container>/mounts/<n>  files that the specification binds
//! ```
//!
//! A snapshotter may say that a container with a user namespace is to see its
//! files as its own (options `uidmap` and `gidmap`, containerd 2). The layers of
//! an overlay have those ids then, which the kernel takes from mounts of theirs:
//!
//! ```text
//! <sandbox>/layers/<container>/<n>         while the overlay is being mounted
//! ```

use std::{
    fs::{self, DirBuilder, File},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use nix::mount::{mount, MsFlags};

use super::RootfsMount;
use crate::{
    error::{Error, Step},
    oci::Volume,
    resource::{
        idmap::{IdMapping, IdRange, Mapped},
        journal::{Journal, Resource},
        mount as mounts,
    },
};

/// mount(2) takes its options in one page.
const OPTIONS_MAX: usize = 4096;

/// Where mounts of a container's layers are, for a moment; not below what the
/// guest sees.
#[derive(Debug, Clone, Copy)]
pub struct Layers<'a> {
    /// The directory, which is made when it is needed.
    pub directory: &'a Path,
    /// Where that is written down.
    pub journal: &'a Journal,
}

/// Mounts everything a container needs. Blocks. Whatever it has mounted when
/// it fails is unmounted with the directory.
pub fn prepare(
    directory: &Path,
    layers: Layers<'_>,
    rootfs: &[RootfsMount],
    root_path: &Path,
    read_only: bool,
    volumes: &[Volume],
) -> Result<(), Error> {
    make_directory(directory)?;
    let root = directory.join("rootfs");
    make_directory(&root)?;
    if rootfs.is_empty() {
        let failed = |problem: std::io::Error| {
            Error::Invalid(format!("root.path: {}: {problem}", root_path.display()))
        };
        if !fs::metadata(root_path).map_err(failed)?.is_dir() {
            return Err(failed(std::io::ErrorKind::NotADirectory.into()));
        }
        mounts::bind(root_path, &root, true, read_only).map_err(failed)?;
    }
    for each in rootfs {
        mount_snapshot(each, &root, layers)?;
    }
    if volumes.is_empty() {
        return Ok(());
    }
    let below = directory.join("mounts");
    make_directory(&below)?;
    for volume in volumes {
        bind_volume(volume, &below.join(&volume.name))?;
    }
    Ok(())
}

pub fn make_directory(path: &Path) -> Result<(), Error> {
    // Users of the container, not of the host, come through it; the
    // sandbox's own directory keeps the host's out.
    let made = DirBuilder::new().mode(0o755).create(path);
    made.step(|| format!("create {}", path.display()))
}

pub fn bind_volume(volume: &Volume, target: &Path) -> Result<(), Error> {
    let failed = |problem: std::io::Error| {
        Error::Invalid(format!(
            "mounts: source {}: {problem}",
            volume.source.display()
        ))
    };
    if fs::metadata(&volume.source).map_err(failed)?.is_dir() {
        make_directory(target)?;
    } else {
        File::create_new(target).step(|| format!("create {}", target.display()))?;
    }
    let kind = mounts::Kind {
        recursive: volume.recursive,
        read_only: volume.read_only,
        follows: volume.follows,
        mapped: volume.mapped.as_ref(),
    };
    mounts::again(&volume.source, target, kind).map_err(failed)
}

/// Makes one mount of a snapshotter.
fn mount_snapshot(snapshot: &RootfsMount, root: &Path, layers: Layers<'_>) -> Result<(), Error> {
    let kind = snapshot.fs_type.as_str();
    let failed = |problem: std::io::Error| {
        let source = &snapshot.source;
        let problem = match problem.raw_os_error() {
            // The kernel's log has the details; this is what it mostly is.
            Some(libc::EINVAL) => format!("{problem}; see the kernel's log"),
            _ => problem.to_string(),
        };
        Error::Precondition(format!("rootfs: mount {kind} of {source}: {problem}"))
    };
    let (_held, target): (_, PathBuf) = if snapshot.target.is_empty() {
        (None, root.into())
    } else {
        let below = Path::new(&snapshot.target);
        let (held, target) = mounts::inside(root, below).map_err(failed)?;
        (Some(held), target)
    };
    let mut options = Options::parse(&snapshot.options);
    let mapped = mapped(&mut options.data)?;
    if kind == "bind" || options.flags.contains(MsFlags::MS_BIND) {
        let recursive = options.flags.contains(MsFlags::MS_REC);
        let read_only = options.flags.contains(MsFlags::MS_RDONLY);
        let source = Path::new(&snapshot.source);
        let kind = mounts::Kind {
            recursive,
            read_only,
            mapped: mapped.as_ref(),
            ..mounts::Kind::default()
        };
        return mounts::again(source, &target, kind).map_err(failed);
    }
    if options.data.iter().any(|option| option == "loop") {
        return Err(Error::Unimplemented(format!(
            "rootfs: a {kind} image in a file (option loop)"
        )));
    }
    let call = |data: &str| {
        let source = Path::new(&snapshot.source);
        mount(Some(source), &target, Some(kind), options.flags, Some(data)).map_err(Into::into)
    };
    if let (Some(mapped), "overlay") = (&mapped, kind) {
        return overlay_mapped(&options.data, mapped, layers, call, failed);
    }
    if let Some(mapped) = &mapped {
        call(&options.data.join(",")).map_err(failed)?;
        // Over itself, which the path as it was found before does not lead to.
        let (_held, target): (_, PathBuf) = if snapshot.target.is_empty() {
            (None, target)
        } else {
            let found = mounts::inside(root, Path::new(&snapshot.target));
            let (held, target) = found.map_err(failed)?;
            (Some(held), target)
        };
        let again = mounts::Kind {
            mapped: Some(mapped),
            read_only: options.flags.contains(MsFlags::MS_RDONLY),
            ..mounts::Kind::default()
        };
        return mounts::again(&target, &target, again).map_err(failed);
    }
    let data = options.data.join(",");
    if data.len() < OPTIONS_MAX {
        return call(&data).map_err(failed);
    }
    let Some((directory, data)) = shorten(&options.data) else {
        return Err(failed(std::io::ErrorKind::ArgumentListTooLong.into()));
    };
    in_directory(&directory, || call(&data)).map_err(failed)
}

/// Takes the mapping out of a mount's options: `uidmap=` and `gidmap=`, each a
/// list of ranges `container:host:size` with commas between.
fn mapped(options: &mut Vec<String>) -> Result<Option<Mapped>, Error> {
    let mut take = |key: &str| {
        let place = options.iter().position(|option| option.starts_with(key))?;
        Some(options.remove(place).split_off(key.len()))
    };
    let (users, groups) = (take("uidmap="), take("gidmap="));
    let invalid = |why: String| Error::Invalid(format!("rootfs: {why}"));
    let (users, groups) = match (users, groups) {
        (None, None) => return Ok(None),
        (Some(users), Some(groups)) => (users, groups),
        _ => {
            return Err(invalid(
                "one of the options uidmap and gidmap is missing: give both".into(),
            ))
        }
    };
    let ranges = |key: &str, text: &str| {
        let list: Option<Vec<IdRange>> = text.split(',').map(range).collect();
        list.ok_or_else(|| {
            invalid(format!(
                "option {key}={text}: it should be like 0:100000:65536"
            ))
        })
    };
    let ids = IdMapping::new(ranges("uidmap", &users)?, ranges("gidmap", &groups)?)
        .map_err(|why| invalid(format!("options uidmap, gidmap: {why}")))?;
    Ok(Some(Mapped {
        ids,
        recursive: false,
    }))
}

fn range(text: &str) -> Option<IdRange> {
    let mut numbers = text.split(':').map(|number| number.parse().ok());
    let mut next = || numbers.next().flatten();
    let range = IdRange {
        stored: next()?,
        shown: next()?,
        size: next()?,
    };
    numbers.next().is_none().then_some(range)
}

/// Mounts an overlay over mounts of its lower directories that have the ids.
/// The upper one is the container's, and has them on the disk.
fn overlay_mapped(
    options: &[String],
    mapped: &Mapped,
    layers: Layers<'_>,
    call: impl Fn(&str) -> std::io::Result<()> + Sync,
    failed: impl Fn(std::io::Error) -> Error,
) -> Result<(), Error> {
    const KEY: &str = "lowerdir=";
    let Some(lower) = options.iter().find_map(|option| option.strip_prefix(KEY)) else {
        return Err(Error::Invalid(
            "rootfs: uidmap of an overlay without a lowerdir".into(),
        ));
    };
    let Layers { directory, journal } = layers;
    let path = directory.to_path_buf();
    let entry = journal
        .record(Resource::Directory { path })
        .step(|| "write the journal")?;
    let mounted = || -> Result<(), Error> {
        let made = fs::create_dir_all(directory);
        made.step(|| format!("create {}", directory.display()))?;
        let mut names = Vec::new();
        for (number, layer) in lower.split(':').enumerate() {
            let name = number.to_string();
            let target = directory.join(&name);
            make_directory(&target)?;
            let kind = mounts::Kind {
                read_only: true,
                mapped: Some(mapped),
                ..mounts::Kind::default()
            };
            mounts::again(Path::new(layer), &target, kind).map_err(&failed)?;
            names.push(name);
        }
        // From their directory they have short names, however many they are.
        let lower = format!("{KEY}{}", names.join(":"));
        let data: Vec<&str> = options
            .iter()
            .map(|option| match option.starts_with(KEY) {
                true => lower.as_str(),
                false => option.as_str(),
            })
            .collect();
        let data = data.join(",");
        if data.len() >= OPTIONS_MAX {
            return Err(failed(std::io::ErrorKind::ArgumentListTooLong.into()));
        }
        in_directory(directory, || call(&data)).map_err(&failed)
    };
    let outcome = mounted();
    // The overlay has mounts of its own, nowhere to be seen.
    mounts::remove_tree(directory)
        .step(|| format!("remove {}", directory.display()))
        .and_then(|()| journal.forget(entry).step(|| "write the journal"))
        .and(outcome)
}

/// Overlay options with paths relative to the directory they have in common.
/// None: still too long.
fn shorten(options: &[String]) -> Option<(PathBuf, String)> {
    const KEYS: [&str; 3] = ["lowerdir=", "upperdir=", "workdir="];
    let paths = options.iter().flat_map(|option| {
        let list = KEYS.iter().find_map(|key| option.strip_prefix(key));
        list.into_iter().flat_map(|list| list.split(':'))
    });
    let mut common: Option<PathBuf> = None;
    for path in paths {
        let path = Path::new(path);
        let found = match common {
            None => path.parent()?.to_path_buf(),
            Some(common) => common
                .ancestors()
                .find(|ancestor| path.starts_with(ancestor))?
                .to_path_buf(),
        };
        common = Some(found);
    }
    let common = common?;
    let relative = |path: &str| -> Option<String> {
        let rest = Path::new(path).strip_prefix(&common).ok()?;
        Some(rest.to_str()?.to_owned())
    };
    let mut short = Vec::with_capacity(options.len());
    for option in options {
        let key = KEYS.iter().find(|key| option.starts_with(**key));
        short.push(match key {
            Some(key) => {
                let paths: Option<Vec<String>> =
                    option[key.len()..].split(':').map(relative).collect();
                format!("{key}{}", paths?.join(":"))
            }
            None => option.clone(),
        });
    }
    let data = short.join(",");
    (data.len() < OPTIONS_MAX).then_some((common, data))
}

/// Runs `work` on a thread with a working directory of its own.
fn in_directory<T: Send>(
    directory: &Path,
    work: impl FnOnce() -> std::io::Result<T> + Send,
) -> std::io::Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
            std::env::set_current_dir(directory)?;
            work()
        });
        thread
            .join()
            .unwrap_or_else(|_| Err(std::io::Error::other("mounting panicked")))
    })
}

/// Mount options as flags and the file system's own.
struct Options {
    flags: MsFlags,
    data: Vec<String>,
}

impl Options {
    fn parse(options: &[String]) -> Self {
        let mut flags = MsFlags::empty();
        let mut data = Vec::new();
        for option in options {
            match flag(option) {
                Some((flag, true)) => flags |= flag,
                Some((flag, false)) => flags &= !flag,
                None => data.push(option.clone()),
            }
        }
        Self { flags, data }
    }
}

/// The flag of a mount option, and whether the option sets it (mount(8),
/// "Filesystem-independent mount options").
fn flag(option: &str) -> Option<(MsFlags, bool)> {
    Some(match option {
        "defaults" | "rw" => (MsFlags::MS_RDONLY, false),
        "ro" => (MsFlags::MS_RDONLY, true),
        "bind" => (MsFlags::MS_BIND, true),
        "rbind" => (MsFlags::MS_BIND | MsFlags::MS_REC, true),
        "suid" => (MsFlags::MS_NOSUID, false),
        "nosuid" => (MsFlags::MS_NOSUID, true),
        "dev" => (MsFlags::MS_NODEV, false),
        "nodev" => (MsFlags::MS_NODEV, true),
        "exec" => (MsFlags::MS_NOEXEC, false),
        "noexec" => (MsFlags::MS_NOEXEC, true),
        "sync" => (MsFlags::MS_SYNCHRONOUS, true),
        "async" => (MsFlags::MS_SYNCHRONOUS, false),
        "dirsync" => (MsFlags::MS_DIRSYNC, true),
        "atime" => (MsFlags::MS_NOATIME, false),
        "noatime" => (MsFlags::MS_NOATIME, true),
        "diratime" => (MsFlags::MS_NODIRATIME, false),
        "nodiratime" => (MsFlags::MS_NODIRATIME, true),
        "relatime" => (MsFlags::MS_RELATIME, true),
        "norelatime" => (MsFlags::MS_RELATIME, false),
        "strictatime" => (MsFlags::MS_STRICTATIME, true),
        "nostrictatime" => (MsFlags::MS_STRICTATIME, false),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{chown, MetadataExt, PermissionsExt};

    use super::*;

    #[test]
    fn options_are_flags_or_the_file_systems() {
        let options = ["ro", "noatime", "lowerdir=/a:/b", "rw"].map(String::from);
        let parsed = Options::parse(&options);
        assert_eq!(parsed.flags, MsFlags::MS_NOATIME);
        assert_eq!(parsed.data, ["lowerdir=/a:/b"]);
    }

    #[test]
    fn mappings_are_among_the_options() {
        let taken = |options: &[&str]| {
            let mut options: Vec<String> = options.iter().map(|option| (*option).into()).collect();
            let mapped = mapped(&mut options).map_err(|error| error.to_string())?;
            Ok::<_, String>((options, mapped.map(|mapped| mapped.ids)))
        };
        let (left, ids) = taken(&[
            "index=off",
            "uidmap=0:7000:10,10:9:1",
            "gidmap=0:8000:10",
            "lowerdir=/a",
        ])
        .unwrap();
        assert_eq!(left, ["index=off", "lowerdir=/a"]);
        let ids = ids.unwrap();
        assert_eq!((ids.user(1), ids.user(10), ids.group(2)), (7001, 9, 8002));
        assert_eq!(taken(&["ro"]).unwrap(), (vec!["ro".into()], None));
        for (options, word) in [
            (&["uidmap=0:1:1"][..], "give both"),
            (&["uidmap=0:1", "gidmap=0:1:1"], "uidmap=0:1: it should"),
            (&["uidmap=0:1:1:1", "gidmap=0:1:1"], "uidmap=0:1:1:1"),
            (&["uidmap=0:1:1", "gidmap=0:-1:1"], "gidmap=0:-1:1"),
            (&["uidmap=0:1:0", "gidmap=0:1:1"], "users: a range"),
        ] {
            let why = taken(options).unwrap_err();
            assert!(why.contains(word), "{why}");
        }
    }

    fn snapshot(fs_type: &str, source: &Path, options: &[&str]) -> RootfsMount {
        RootfsMount {
            fs_type: fs_type.into(),
            source: source.to_string_lossy().into_owned(),
            options: options.iter().map(|option| (*option).into()).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn a_snapshot_has_the_ids_of_its_container() {
        const NAME: &str = "a_snapshot_has_the_ids_of_its_container";
        if !nix::unistd::geteuid().is_root() {
            println!("SKIPPED: {NAME}: needs root");
            return;
        }
        let base = std::env::temp_dir().join(format!("bulkhead-mapped-{}", std::process::id()));
        let _ = mounts::remove_tree(&base);
        let at = |name: &str| base.join(name);
        for name in ["1", "2", "upper", "work", "c1", "c2"] {
            fs::create_dir_all(at(name)).unwrap();
        }
        fs::write(at("1/file"), "seen").unwrap();
        chown(at("2"), Some(5), Some(6)).unwrap();
        for name in ["upper", "work"] {
            chown(at(name), Some(7000), Some(8000)).unwrap();
        }
        let journal = Journal::create(&base).unwrap();
        let (lower, upper, work) = (
            format!("lowerdir={}:{}", at("1").display(), at("2").display()),
            format!("upperdir={}", at("upper").display()),
            format!("workdir={}", at("work").display()),
        );
        let ids = ["uidmap=0:7000:10", "gidmap=0:8000:10"];
        let overlay = [ids[0], ids[1], &lower, &upper, &work];
        let layers = at("layers/c");
        let place = Layers {
            directory: &layers,
            journal: &journal,
        };
        let owner = |path: PathBuf| {
            let found = fs::metadata(path).unwrap();
            (found.uid(), found.gid())
        };
        let made = mount_snapshot(
            &snapshot("overlay", Path::new("overlay"), &overlay),
            &at("c1"),
            place,
        );
        assert!(!layers.exists());
        if let Err(error) = made {
            let why = error.to_string();
            mounts::remove_tree(&base).unwrap();
            assert!(why.contains("cannot be id-mapped"), "{why}");
            println!("SKIPPED: {NAME}: {why}");
            return;
        }
        assert_eq!(fs::read(at("c1/file")).unwrap(), b"seen");
        assert_eq!(owner(at("c1/file")), (7000, 8000));
        // What is changed is stored for the container.
        let chmod = |path: PathBuf| fs::set_permissions(path, fs::Permissions::from_mode(0o640));
        chmod(at("c1/file")).unwrap();
        assert_eq!(owner(at("upper/file")), (7000, 8000));
        assert_eq!(owner(at("1/file")), (0, 0));

        let bind = snapshot("bind", &at("2"), &[ids[0], ids[1], "rbind", "ro"]);
        mount_snapshot(&bind, &at("c2"), place).unwrap();
        assert_eq!(owner(at("c2")), (7005, 8006));
        assert!(fs::write(at("c2/x"), "").is_err());
        // A layer that cannot have them leaves nothing.
        let lower = format!("lowerdir={}:/proc/sys", at("1").display());
        let bad = [ids[0], ids[1], &lower, &upper, &work];
        let bad = snapshot("overlay", Path::new("overlay"), &bad);
        let why = mount_snapshot(&bad, &at("c2"), place).unwrap_err();
        let why = why.to_string();
        assert!(why.contains("proc, the file system of /proc/sys"), "{why}");
        assert!(!layers.exists());
        let points = mounts::mount_points_below(&base).unwrap();
        assert_eq!(points, [at("c1"), at("c2")]);
        mounts::remove_tree(&base).unwrap();
    }

    #[test]
    fn many_layers_are_named_from_the_directory_they_share() {
        let lower: Vec<String> = (0..100)
            .map(|n| format!("/var/lib/containerd/snapshots/{n}/fs"))
            .collect();
        let options = [
            "index=off".to_owned(),
            format!("lowerdir={}", lower.join(":")),
            "upperdir=/var/lib/containerd/snapshots/200/fs".to_owned(),
        ];
        let (directory, data) = shorten(&options).unwrap();
        assert_eq!(directory, Path::new("/var/lib/containerd/snapshots"));
        assert!(data.starts_with("index=off,lowerdir=0/fs:1/fs:"), "{data}");
        assert!(data.ends_with(",upperdir=200/fs"), "{data}");
        let long: Vec<String> = (0..1000).map(|n| format!("/a/{n:08}")).collect();
        assert!(shorten(&[format!("lowerdir={}", long.join(":"))]).is_none());
    }
}
