// SPDX-License-Identifier: Apache-2.0
//! A container's files on the host: its root file system and single files,
//! mounted below the directory that the guest shares.
//!
//! ```text
//! <sandbox>/shared/<container>/rootfs      from a snapshotter, or root.path
//! <sandbox>/shared/<container>/mounts/<n>  files that the specification binds
//! ```

use std::{
    fs::{self, DirBuilder, File},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::DirBuilderExt,
    },
    path::{Path, PathBuf},
};

use nix::mount::{mount, MsFlags};

use super::{
    layers::{self, Layers},
    RootfsMount,
};
use crate::{
    error::{Error, Step},
    oci::Volume,
    resource::mount as mounts,
};

/// mount(2) takes its options in one page.
pub const OPTIONS_MAX: usize = 4096;

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
    let find = || -> std::io::Result<(Option<OwnedFd>, PathBuf)> {
        if snapshot.target.is_empty() {
            return Ok((None, root.into()));
        }
        let (held, target) = mounts::inside(root, Path::new(&snapshot.target))?;
        Ok((Some(held), target))
    };
    let (held, target) = find().map_err(failed)?;
    let mut options = Options::parse(&snapshot.options);
    let mapped = layers::mapped(&mut options.data)?;
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
        return on(source, (&held, target.as_path()), kind).map_err(failed);
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
        return layers.overlay(&options.data, mapped, call, failed);
    }
    if let Some(mapped) = &mapped {
        call(&options.data.join(",")).map_err(failed)?;
        // Over itself, which what was found before does not lead to.
        let (held, target) = find().map_err(failed)?;
        let again = mounts::Kind {
            mapped: Some(mapped),
            read_only: options.flags.contains(MsFlags::MS_RDONLY),
            ..mounts::Kind::default()
        };
        return on(&target, (&held, target.as_path()), again).map_err(failed);
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

/// Mounts on what was found in the root, or else by its path.
fn on(
    source: &Path,
    (held, target): (&Option<OwnedFd>, &Path),
    kind: mounts::Kind<'_>,
) -> std::io::Result<()> {
    match held {
        Some(held) => mounts::again_on(source, held.as_fd(), kind),
        None => mounts::again(source, target, kind),
    }
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
pub fn in_directory<T: Send>(
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
    use crate::resource::journal::Journal;

    #[test]
    fn options_are_flags_or_the_file_systems() {
        let options = ["ro", "noatime", "lowerdir=/a:/b", "rw"].map(String::from);
        let parsed = Options::parse(&options);
        assert_eq!(parsed.flags, MsFlags::MS_NOATIME);
        assert_eq!(parsed.data, ["lowerdir=/a:/b"]);
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
        // In the root, where a link leads to.
        fs::create_dir_all(at("work/below/x")).unwrap();
        std::os::unix::fs::symlink("/below", at("work/link")).unwrap();
        let bound = RootfsMount {
            target: "link/x".into(),
            ..snapshot("bind", &at("1"), &["rbind"])
        };
        mount_snapshot(&bound, &at("work"), place).unwrap();
        assert_eq!(fs::read(at("work/below/x/file")).unwrap(), b"seen");
        // One that is made, at a place in the root.
        let made = RootfsMount {
            target: "in".into(),
            ..snapshot("tmpfs", Path::new("tmpfs"), &[ids[0], ids[1], "size=1m"])
        };
        fs::create_dir(at("work/in")).unwrap();
        match mount_snapshot(&made, &at("work"), place) {
            Ok(()) => assert_eq!(owner(at("work/in")), (7000, 8000)),
            // Before Linux 6.3.
            Err(error) => {
                let why = error.to_string();
                assert!(why.contains("tmpfs, the file system of"), "{why}");
            }
        }
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
