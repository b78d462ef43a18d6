// SPDX-License-Identifier: Apache-2.0
//! The host cgroups of a sandbox: its front end and its VMM run in the pod's,
//! so that the pod's memory and CPU are accounted where the caller asked. On a
//! host with cgroup v1 these are several, one in each hierarchy.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Write as _},
    path::{Component, Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use rustix::process::{kill_process, Pid, Signal};

use super::journal::{Journal, Resource};

/// Where cgroup v2 is mounted on a host that has it alone (`/sys/fs/cgroup`)
/// or beside v1 (`unified`).
const MOUNTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// How long the processes of a removed cgroup may take to end.
const EMPTY_WITHIN: Duration = Duration::from_secs(2);

/// How often making the directories is tried when a parent vanishes.
const CREATE_TRIES: usize = 8;

/// What a cgroup of v1's cpuset controller lacks at first, without which no
/// process may enter it.
const CPUSET: [&str; 2] = ["cpuset.cpus", "cpuset.mems"];

/// Where this process was before it joined cgroups, by what it joined.
static ORIGINS: Mutex<BTreeMap<PathBuf, PathBuf>> = Mutex::new(BTreeMap::new());

/// One of the host's hierarchies of cgroups.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    /// Where it is mounted.
    root: PathBuf,
    /// How `/proc/PID/cgroup` names it: its controllers, none for v2.
    controllers: String,
}

/// A sandbox's cgroup on the host, one in each hierarchy.
#[derive(Debug)]
pub struct SandboxCgroup {
    parts: Vec<(Hierarchy, PathBuf)>,
}

impl SandboxCgroup {
    /// Makes the cgroup that the bundle's `linux.cgroupsPath` names
    /// (config-linux.md, "Cgroups Path"), below the root of each hierarchy.
    /// Parents that were missing are given back too, once nobody else uses
    /// them. None on a host without cgroups, or for an empty path.
    ///
    /// # Errors
    /// `InvalidInput` for a path that leaves the root or names no slice.
    pub fn create(cgroups_path: &str, journal: &Journal) -> io::Result<Option<Self>> {
        let Some(relative) = relative_path(cgroups_path)? else {
            return Ok(None);
        };
        let mut parts = Vec::new();
        for hierarchy in hierarchies()? {
            let path = create_in(&hierarchy.root, &relative, journal)?;
            parts.push((hierarchy, path));
        }
        Ok((!parts.is_empty()).then_some(Self { parts }))
    }

    /// Moves a process, with all its threads, into the cgroup.
    ///
    /// # Errors
    /// The kernel's: the process is gone, or a cgroup has children that hold
    /// controllers.
    pub fn add(&self, pid: u32) -> io::Result<()> {
        for (_, path) in &self.parts {
            enter(path, pid)?;
        }
        Ok(())
    }

    /// Moves this process into the cgroup, and what it starts from now on. It
    /// goes back where it was when the cgroup is removed.
    ///
    /// # Errors
    /// As [`SandboxCgroup::add`].
    pub fn join(&self) -> io::Result<()> {
        let now = std::fs::read_to_string("/proc/self/cgroup")?;
        for (hierarchy, path) in &self.parts {
            if let Some(within) = within(&now, &hierarchy.controllers) {
                let origin = hierarchy.root.join(within.trim_start_matches('/'));
                let mut origins = ORIGINS.lock().unwrap_or_else(PoisonError::into_inner);
                origins.insert(path.clone(), origin);
            }
        }
        self.add(std::process::id())
    }

    /// Its directories.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.parts.iter().map(|(_, path)| path.as_path())
    }
}

fn create_in(root: &Path, relative: &Path, journal: &Journal) -> io::Result<PathBuf> {
    let mut path = root.to_owned();
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
            Ok(()) => {
                fill_cpuset(root, relative)?;
                return Ok(path);
            }
        }
    }
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        format!("{} could not be made: its parents vanish", path.display()),
    ))
}

/// Gives cgroups of v1's cpuset controller what their parents have, where they
/// have nothing.
fn fill_cpuset(root: &Path, relative: &Path) -> io::Result<()> {
    let mut path = root.to_owned();
    for name in CPUSET {
        // Only there in v1: v2 has them too, but empty means the parent's.
        if !root.join("cgroup.clone_children").exists() || !root.join(name).exists() {
            return Ok(());
        }
    }
    for part in relative.components() {
        let parent = path.clone();
        path.push(part);
        for name in CPUSET {
            if std::fs::read_to_string(path.join(name))?.trim().is_empty() {
                let value = std::fs::read(parent.join(name))?;
                std::fs::write(path.join(name), value)?;
            }
        }
    }
    Ok(())
}

fn enter(path: &Path, pid: u32) -> io::Result<()> {
    std::fs::write(path.join("cgroup.procs"), pid.to_string())
}

/// The root of the v2 hierarchy.
pub fn v2_root() -> Option<PathBuf> {
    MOUNTS
        .iter()
        .map(PathBuf::from)
        .find(|root| root.join("cgroup.controllers").exists())
}

/// All hierarchies that this process may use.
fn hierarchies() -> io::Result<Vec<Hierarchy>> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let mut all = v1(&mounts);
    all.extend(v2_root().map(|root| Hierarchy {
        root,
        controllers: String::new(),
    }));
    Ok(all)
}

/// The hierarchies of v1 that have controllers, each once (proc(5), mountinfo).
fn v1(mountinfo: &str) -> Vec<Hierarchy> {
    let mut all: Vec<Hierarchy> = Vec::new();
    for line in mountinfo.lines() {
        let Some((mount, rest)) = line.split_once(" - cgroup ") else {
            continue;
        };
        let mut fields = mount.split(' ').skip(3);
        let (Some("/"), Some(root)) = (fields.next(), fields.next()) else {
            continue;
        };
        let Some(options) = rest.split(' ').nth(1) else {
            continue;
        };
        const GENERIC: [&str; 5] = ["rw", "ro", "xattr", "noprefix", "clone_children"];
        let controllers: Vec<&str> = options
            .split(',')
            .filter(|option| !GENERIC.contains(option) && !option.contains('='))
            .collect();
        let controllers = controllers.join(",");
        // A name and no controller: systemd's own.
        let named = options.split(',').any(|option| option.starts_with("name="));
        let known = all.iter().any(|other| other.controllers == controllers);
        if !controllers.is_empty() && !named && !known {
            all.push(Hierarchy {
                root: root.into(),
                controllers,
            });
        }
    }
    all
}

/// The path of a hierarchy in `/proc/PID/cgroup` (cgroups(7)).
fn within<'a>(cgroup: &'a str, controllers: &str) -> Option<&'a str> {
    cgroup.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (_, named, path) = (fields.next()?, fields.next()?, fields.next()?);
        (named == controllers).then_some(path)
    })
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

/// Kills what is in the cgroup and below it, and removes it. This process
/// leaves it first.
pub fn remove(path: &Path) -> io::Result<()> {
    leave(path)?;
    let deadline = Instant::now() + EMPTY_WITHIN;
    loop {
        kill_all(path)?;
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

/// Takes this process out of a cgroup that it has joined: to where it was, or,
/// where that is gone, as far up as the kernel lets it.
fn leave(path: &Path) -> io::Result<()> {
    let this = std::process::id();
    if !processes(path)?.contains(&this) {
        return Ok(());
    }
    let origin = {
        let mut origins = ORIGINS.lock().unwrap_or_else(PoisonError::into_inner);
        origins.remove(path)
    };
    let up = path.ancestors().skip(1).map(Path::to_owned);
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for place in origin.into_iter().chain(up) {
        match enter(&place, this) {
            Ok(()) => return Ok(()),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Kills everything in a cgroup.
fn kill_all(path: &Path) -> io::Result<()> {
    // Opened as it is: making a file that is missing is forbidden here.
    let kill = File::options().write(true).open(path.join("cgroup.kill"));
    match kill {
        Ok(mut kill) => return kill.write_all(b"1"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    // cgroup v1, a kernel before 5.14, or nothing there any more.
    for pid in processes(path)? {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        match pid.map(|pid| kill_process(pid, Signal::KILL)) {
            Some(Err(error)) if error != rustix::io::Errno::SRCH => return Err(error.into()),
            _ => {}
        }
    }
    Ok(())
}

/// What is in a cgroup; nothing when it is gone.
fn processes(path: &Path) -> io::Result<Vec<u32>> {
    match std::fs::read_to_string(path.join("cgroup.procs")) {
        Ok(text) => Ok(text.lines().filter_map(|line| line.parse().ok()).collect()),
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || error.raw_os_error() == Some(libc::ENODEV) =>
        {
            Ok(Vec::new())
        }
        Err(error) => Err(error),
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
    fn hierarchies_of_v1_are_those_with_controllers() {
        let mountinfo = "\
            25 1 0:22 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755\n\
            26 25 0:23 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
            27 25 0:24 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
            28 25 0:25 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
            29 25 0:25 /a /mnt/memory rw - cgroup cgroup rw,memory\n\
            30 25 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let found = v1(mountinfo);
        let expected = [
            ("/sys/fs/cgroup/cpu,cpuacct", "cpu,cpuacct"),
            ("/sys/fs/cgroup/memory", "memory"),
        ];
        let found: Vec<(&str, &str)> = found
            .iter()
            .map(|h| (h.root.to_str().unwrap(), h.controllers.as_str()))
            .collect();
        assert_eq!(found, expected);
        let cgroup = "8:cpu,cpuacct:/a:b\n4:memory:/\n0::/x\n";
        assert_eq!(within(cgroup, "cpu,cpuacct"), Some("/a:b"));
        assert_eq!(within(cgroup, ""), Some("/x"));
        assert_eq!(within(cgroup, "pids"), None);
    }
}
