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
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use nix::mount::{mount, MsFlags};

use super::RootfsMount;
use crate::{
    error::{Error, Step},
    oci::Volume,
    resource::mount as mounts,
};

/// mount(2) takes its options in one page.
const OPTIONS_MAX: usize = 4096;

/// Mounts everything a container needs. Blocks. Whatever it has mounted when
/// it fails is unmounted with the directory.
pub fn prepare(
    directory: &Path,
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
        mount_snapshot(each, &root)?;
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
    match volume.follows {
        true => mounts::follow(&volume.source, target),
        false => mounts::bind(&volume.source, target, volume.recursive, volume.read_only),
    }
    .map_err(failed)
}

/// Makes one mount of a snapshotter.
fn mount_snapshot(snapshot: &RootfsMount, root: &Path) -> Result<(), Error> {
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
    let options = Options::parse(&snapshot.options);
    if kind == "bind" || options.flags.contains(MsFlags::MS_BIND) {
        let recursive = options.flags.contains(MsFlags::MS_REC);
        let read_only = options.flags.contains(MsFlags::MS_RDONLY);
        let source = Path::new(&snapshot.source);
        return mounts::bind(source, &target, recursive, read_only).map_err(failed);
    }
    if options.data.iter().any(|option| option == "loop") {
        return Err(Error::Unimplemented(format!(
            "rootfs: a {kind} image in a file (option loop)"
        )));
    }
    let data = options.data.join(",");
    let call = |data: &str| {
        let source = Path::new(&snapshot.source);
        mount(Some(source), &target, Some(kind), options.flags, Some(data)).map_err(Into::into)
    };
    if data.len() < OPTIONS_MAX {
        return call(&data).map_err(failed);
    }
    let Some((directory, data)) = shorten(&options.data) else {
        return Err(failed(std::io::ErrorKind::ArgumentListTooLong.into()));
    };
    in_directory(&directory, || call(&data)).map_err(failed)
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
    use super::*;

    #[test]
    fn options_are_flags_or_the_file_systems() {
        let options = ["ro", "noatime", "lowerdir=/a:/b", "rw"].map(String::from);
        let parsed = Options::parse(&options);
        assert_eq!(parsed.flags, MsFlags::MS_NOATIME);
        assert_eq!(parsed.data, ["lowerdir=/a:/b"]);
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
