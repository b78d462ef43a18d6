// SPDX-License-Identifier: Apache-2.0
//! The host cgroup of a sandbox (cgroup v2): the VMM runs in it, so that the
//! pod's memory and CPU are accounted where the caller asked.

use std::{
    io,
    path::{Component, Path, PathBuf},
    time::{Duration, Instant},
};

use super::journal::{Journal, Resource};

/// Where cgroup v2 is mounted on a host that has it alone (`/sys/fs/cgroup`)
/// or beside v1 (`unified`).
const MOUNTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// How long the processes of a removed cgroup may take to end.
const EMPTY_WITHIN: Duration = Duration::from_secs(2);

/// How often making the directories is tried when a parent vanishes.
const CREATE_TRIES: usize = 8;

/// A sandbox's cgroup on the host.
#[derive(Debug)]
pub struct SandboxCgroup {
    path: PathBuf,
}

impl SandboxCgroup {
    /// Makes the cgroup that the bundle's `linux.cgroupsPath` names
    /// (config-linux.md, "Cgroups Path"), below the cgroup v2 root. Parents
    /// that were missing are given back too, once nobody else uses them. None
    /// on a host without cgroup v2, or for an empty path.
    ///
    /// # Errors
    /// `InvalidInput` for a path that leaves the root or names no slice.
    pub fn create(cgroups_path: &str, journal: &Journal) -> io::Result<Option<Self>> {
        let Some(root) = v2_root() else {
            return Ok(None);
        };
        let Some(relative) = relative_path(cgroups_path)? else {
            return Ok(None);
        };
        let mut path = root;
        let mut parts = relative.components().peekable();
        while let Some(part) = parts.next() {
            path.push(part);
            if parts.peek().is_none() {
                journal.record(Resource::Cgroup { path: path.clone() })?;
            } else if !path.exists() {
                journal.record(Resource::CgroupParent { path: path.clone() })?;
            }
        }
        // Another sandbox may give a common parent back in between.
        for _ in 0..CREATE_TRIES {
            match std::fs::create_dir_all(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
                Ok(()) => return Ok(Some(Self { path })),
            }
        }
        Err(io::Error::new(
            io::ErrorKind::NotFound,
            format!("{} could not be made: its parents vanish", path.display()),
        ))
    }

    /// Moves a process, with all its threads, into the cgroup.
    pub fn add(&self, pid: u32) -> io::Result<()> {
        std::fs::write(self.path.join("cgroup.procs"), pid.to_string())
    }

    /// The cgroup's directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The root of the v2 hierarchy.
pub fn v2_root() -> Option<PathBuf> {
    MOUNTS
        .iter()
        .map(PathBuf::from)
        .find(|root| root.join("cgroup.controllers").exists())
}

/// A `cgroupsPath` as a path below the root; none when it names the root.
fn relative_path(cgroups_path: &str) -> io::Result<Option<PathBuf>> {
    // systemd's `slice:prefix:name` becomes the scope that its driver makes.
    let translated = match cgroups_path.split(':').collect::<Vec<_>>()[..] {
        [slice, prefix, name] => {
            let slice = if slice.is_empty() {
                "system.slice"
            } else {
                slice
            };
            let mut path = slice_path(slice)?;
            path.push(format!("{prefix}-{name}.scope"));
            path
        }
        _ => PathBuf::from(cgroups_path),
    };
    let mut relative = PathBuf::new();
    for part in translated.components() {
        match part {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => relative.push(name),
            Component::ParentDir | Component::Prefix(_) => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!("linux.cgroupsPath: {cgroups_path:?} must not contain '..'"),
                ));
            }
        }
    }
    Ok((relative != Path::new("")).then_some(relative))
}

/// The directory of a systemd slice: `a-b.slice` lies in `a.slice`
/// (systemd.slice(5)).
fn slice_path(slice: &str) -> io::Result<PathBuf> {
    let invalid = || {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("linux.cgroupsPath: {slice:?} is not a slice name"),
        )
    };
    let name = slice.strip_suffix(".slice").ok_or_else(invalid)?;
    if name.contains('/') {
        return Err(invalid());
    }
    let mut path = PathBuf::new();
    if name == "-" {
        return Ok(path);
    }
    let mut prefix = String::new();
    for part in name.split('-') {
        if part.is_empty() {
            return Err(invalid());
        }
        prefix.push_str(part);
        path.push(format!("{prefix}.slice"));
        prefix.push('-');
    }
    Ok(path)
}

/// Kills what is in the cgroup and below it, and removes it.
pub fn remove(path: &Path) -> io::Result<()> {
    let kill = path.join("cgroup.kill");
    match std::fs::write(&kill, "1") {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if !path.exists() {
                return Ok(());
            }
        }
        Err(error) => return Err(error),
    }
    let deadline = Instant::now() + EMPTY_WITHIN;
    loop {
        match remove_empty(path) {
            Err(error)
                if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline =>
            {
                std::thread::sleep(Duration::from_millis(5));
            }
            other => return other,
        }
    }
}

/// Removes a cgroup that others may share, if nothing is left in it.
pub fn remove_parent(path: &Path) -> io::Result<()> {
    match std::fs::remove_dir(path) {
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound
                    | io::ErrorKind::ResourceBusy
                    | io::ErrorKind::DirectoryNotEmpty
            ) =>
        {
            Ok(())
        }
        other => other,
    }
}

/// Removes a cgroup that holds no process, children first.
fn remove_empty(path: &Path) -> io::Result<()> {
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_empty(&entry.path())?;
        }
    }
    match std::fs::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_directories_below_the_root() {
        let path = |text: &str| relative_path(text).unwrap();
        assert_eq!(path("/default/demo"), Some("default/demo".into()));
        assert_eq!(path("pods/a"), Some("pods/a".into()));
        assert_eq!(path(""), None);
        assert_eq!(path("/"), None);
        assert_eq!(
            path("kubepods-burstable.slice:cri-containerd:abc"),
            Some("kubepods.slice/kubepods-burstable.slice/cri-containerd-abc.scope".into())
        );
        assert_eq!(path(":p:n"), Some("system.slice/p-n.scope".into()));
    }

    #[test]
    fn a_path_that_climbs_out_is_refused() {
        assert!(relative_path("/../etc").is_err());
        assert!(relative_path("a--b.slice:p:n").is_err());
        assert!(relative_path("a/b.slice:p:n").is_err());
    }

    #[test]
    fn a_cgroup_is_made_used_and_removed_with_its_processes() {
        let name = format!("/bulkhead-test-{}/inner", std::process::id());
        let dir = std::env::temp_dir().join(format!("bulkhead-cgroup-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let journal = Journal::create(&dir).unwrap();
        let cgroup = match SandboxCgroup::create(&name, &journal) {
            Ok(Some(cgroup)) => cgroup,
            Ok(None) => {
                println!("SKIPPED: a_cgroup_is_made_used_and_removed_with_its_processes: no cgroup v2 here");
                return;
            }
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                println!("SKIPPED: a_cgroup_is_made_used_and_removed_with_its_processes: {error}");
                return;
            }
            Err(error) => panic!("{error}"),
        };
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        cgroup.add(child.id()).unwrap();
        Journal::release_all(&dir).unwrap();
        assert!(!child.wait().unwrap().success());
        assert!(!cgroup.path().exists());
        assert!(!cgroup.path().parent().unwrap().exists());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
