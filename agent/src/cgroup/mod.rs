// SPDX-License-Identifier: Apache-2.0
//! cgroup v2 (Linux: admin-guide/cgroup-v2.rst): the agent's own group, the
//! pod's, and one per container below the pod's.

pub mod devices;
pub mod resources;
pub mod stats;

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::statfs::{statfs, CGROUP2_SUPER_MAGIC};
use tokio::time::{sleep, Instant};

use crate::error::{AgentError, Context, Result};

/// How long a group may take to freeze or to become empty after a kill.
const SETTLE: Duration = Duration::from_secs(5);

/// What the agent keeps of memory when there is none: several times what it
/// uses with many containers.
const AGENT_MEMORY: &str = "16M";
/// The agent's share of the processors beside the pod's, which is 100.
const AGENT_WEIGHT: &str = "1000";
/// Processes that the pod leaves to the guest's kernel and the agent.
const RESERVED_PIDS: u64 = 256;

/// Memory that the pod leaves to the guest's kernel and the agent. A pod that
/// wants more is at its own limit, and its processes wait or die for it, not
/// the kernel's memory for what comes from the host.
const RESERVED_MEMORY: u64 = 8 << 20;

/// How much of `total` bytes the pod may have.
fn pods_memory(total: u64) -> u64 {
    total.saturating_sub(RESERVED_MEMORY).max(total / 2)
}

/// How much memory the guest has, of what /proc/meminfo says. None: it may get
/// more, so that no limit would be right for long.
fn fixed_memory(meminfo: &str, cmdline: &str) -> Option<u64> {
    if cmdline.contains("memhp_default_state=") {
        return None;
    }
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

/// How many of `most` processes the pod may have.
fn pods_share(most: u64) -> u64 {
    most.saturating_sub(RESERVED_PIDS).max(most / 2)
}

/// Where containers' groups are made.
#[derive(Clone, Debug)]
pub struct Hierarchy {
    pod: PathBuf,
    controllers: BTreeSet<String>,
    /// Outside a guest the machine may give no controllers; limits are then
    /// warned about instead of refused.
    lenient: bool,
}

impl Hierarchy {
    /// Prepares the hierarchy mounted at `root`: the agent moves itself to
    /// `agent`, and what controllers there are become available to `pod`.
    ///
    /// # Errors
    /// When `root` is no cgroup v2 hierarchy or refuses the changes.
    pub fn in_guest(root: &Path) -> Result<Self> {
        let agent = make_group(&root.join("agent"))?;
        write(&agent, "cgroup.procs", "0")?;
        let hierarchy = Self::below(root, false)?;
        hierarchy.protect(&agent)?;
        Ok(hierarchy)
    }

    /// Whatever containers do, the agent has memory, processor time and
    /// process ids left.
    fn protect(&self, agent: &Path) -> Result<()> {
        if self.controllers.contains("memory") {
            write(agent, "memory.min", AGENT_MEMORY)?;
            let proc = |name: &str| read(Path::new("/proc"), name);
            if let Some(total) = fixed_memory(&proc("meminfo")?, &proc("cmdline")?) {
                write(&self.pod, "memory.max", &pods_memory(total).to_string())?;
            }
        }
        if self.controllers.contains("cpu") {
            write(agent, "cpu.weight", AGENT_WEIGHT)?;
        }
        if self.controllers.contains("pids") {
            let limit = |name: &str| read(Path::new("/proc/sys/kernel"), name);
            let number = |text: String| text.trim().parse::<u64>().unwrap_or(u64::MAX);
            let most = number(limit("threads-max")?).min(number(limit("pid_max")?));
            write(&self.pod, "pids.max", &pods_share(most).to_string())?;
        }
        Ok(())
    }

    /// A hierarchy for tests, at a group of its own on the host.
    ///
    /// # Errors
    /// When the group cannot be made.
    pub fn for_tests(root: &Path) -> Result<Self> {
        make_group(root)?;
        Self::below(root, true)
    }

    fn below(root: &Path, lenient: bool) -> Result<Self> {
        let available = read(root, "cgroup.controllers")?;
        let mut controllers = BTreeSet::new();
        let pod = make_group(&root.join("pod"))?;
        for name in available.split_ascii_whitespace() {
            // One at a time: a controller that refuses (cpu, with real-time
            // processes about) must not take the others with it.
            let enable = format!("+{name}");
            match write(root, "cgroup.subtree_control", &enable)
                .and_then(|()| write(&pod, "cgroup.subtree_control", &enable))
            {
                Ok(()) => {
                    controllers.insert(name.to_owned());
                }
                Err(error) => {
                    crate::warn!("msg=\"controller left out\" controller={name} error=\"{error}\"");
                }
            }
        }
        Ok(Self {
            pod,
            controllers,
            lenient,
        })
    }

    /// Kills every process of every container and waits until they are gone.
    ///
    /// # Errors
    /// When one does not die.
    pub async fn kill_all(&self) -> Result<()> {
        write(&self.pod, "cgroup.kill", "1")?;
        wait_event(&self.pod, "populated", 0, SETTLE).await
    }

    /// Removes the pod's group and what it is in (tests only: a guest ends
    /// with its groups).
    pub fn remove_all(&self) {
        let top = self.pod.parent().unwrap_or(&self.pod);
        if let Err(error) = remove_tree(top) {
            crate::warn!("msg=\"cgroup left behind\" error=\"{error}\"");
        }
    }

    /// Makes the group of the container `id`, which must be a valid name.
    ///
    /// # Errors
    /// When the group is there already or cannot be made.
    pub fn container(&self, id: &str) -> Result<Cgroup> {
        self.make(self.pod.join(id))
    }

    /// Makes a group beside the pod's for processes of the guest itself that
    /// belong to the container `id`.
    ///
    /// # Errors
    /// As for [`Self::container`].
    pub fn beside(&self, id: &str) -> Result<Cgroup> {
        let top = self.pod.parent().unwrap_or(&self.pod);
        self.make(top.join(format!("guest-{id}")))
    }

    fn make(&self, path: PathBuf) -> Result<Cgroup> {
        fs::create_dir(&path).step(|| format!("create cgroup {}", path.display()))?;
        let directory = File::open(&path).step(|| format!("open cgroup {}", path.display()))?;
        Ok(Cgroup {
            path,
            directory: directory.into(),
            hierarchy: self.clone(),
        })
    }
}

/// One container's group.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
    hierarchy: Hierarchy,
}

impl Cgroup {
    /// The group's directory, for clone3 and bpf.
    pub fn directory(&self) -> &OwnedFd {
        &self.directory
    }

    /// The group's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the controller `name` works here.
    fn has(&self, name: &str) -> bool {
        self.hierarchy.controllers.contains(name)
    }

    /// Contents of one of the group's files.
    pub fn read(&self, file: &str) -> Result<String> {
        read(&self.path, file)
    }

    /// Writes one of the group's files.
    pub fn write(&self, file: &str, value: &str) -> Result<()> {
        write(&self.path, file, value)
    }

    /// Kills every process in the group and below it.
    pub fn kill(&self) -> Result<()> {
        self.write("cgroup.kill", "1")
    }

    /// The processes in the group and below it, as pids of the guest's root
    /// pid namespace.
    pub fn processes(&self) -> Result<Vec<i32>> {
        let mut pids = Vec::new();
        collect_processes(&self.path, &mut pids)?;
        Ok(pids)
    }

    /// The directory of the group that the process is in, if it is this one or
    /// below it.
    pub fn group_of(&self, pid: i32) -> Option<OwnedFd> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
        let of_cgroups = |directory: &&Path| {
            statfs(*directory).is_ok_and(|found| found.filesystem_type() == CGROUP2_SUPER_MAGIC)
        };
        // The kernel tells the path below the hierarchy's root.
        let root = self.path.ancestors().take_while(of_cgroups).last()?;
        let path = root.join(path);
        if !path.starts_with(&self.path) {
            return None;
        }
        Some(File::open(path).ok()?.into())
    }

    /// Freezes or thaws the group and waits until it is so.
    ///
    /// # Errors
    /// [`AgentError::Timeout`] when a process cannot be frozen; it is thawed
    /// again then.
    pub async fn freeze(&self, frozen: bool) -> Result<()> {
        let value = if frozen { "1" } else { "0" };
        self.write("cgroup.freeze", value)?;
        let settled = wait_event(&self.path, "frozen", u64::from(frozen), SETTLE).await;
        if settled.is_err() && frozen {
            self.write("cgroup.freeze", "0")?;
        }
        settled
    }

    /// Kills what is left, waits until the group is empty and removes it.
    ///
    /// # Errors
    /// When a process does not die.
    pub async fn remove(&self) -> Result<()> {
        if !self.path.exists() {
            return Ok(());
        }
        self.kill()?;
        wait_event(&self.path, "populated", 0, SETTLE).await?;
        remove_tree(&self.path).step(|| format!("remove cgroup {}", self.path.display()))
    }
}

/// Waits until a group's cgroup.events has `value` for `key`.
async fn wait_event(group: &Path, key: &str, value: u64, limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_micros(200);
    loop {
        if flat_value(&read(group, "cgroup.events")?, key) == Some(value) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(AgentError::Timeout(format!(
                "cgroup {}: {key} to become {value}",
                group.display()
            )));
        }
        sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

fn make_group(path: &Path) -> Result<PathBuf> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            Err(error).step(|| format!("create cgroup {}", path.display()))
        }
        _ => Ok(path.to_owned()),
    }
}

fn read(directory: &Path, file: &str) -> Result<String> {
    let path = directory.join(file);
    fs::read_to_string(&path).step(|| format!("read {}", path.display()))
}

fn write(directory: &Path, file: &str, value: &str) -> Result<()> {
    let path = directory.join(file);
    // No O_CREAT, O_TRUNC: these files exist or they do not.
    OpenOptions::new()
        .write(true)
        .open(&path)
        .and_then(|mut open| open.write_all(value.as_bytes()))
        .step(|| format!("write {value:?} to {}", path.display()))
}

fn collect_processes(directory: &Path, pids: &mut Vec<i32>) -> Result<()> {
    let text = read(directory, "cgroup.procs")?;
    // 0: a process of a pid namespace outside ours, which a guest has not.
    pids.extend(
        text.lines()
            .filter_map(|line| line.parse::<i32>().ok())
            .filter(|pid| *pid != 0),
    );
    for child in children(directory) {
        // A group may vanish while we look.
        let _ = collect_processes(&child, pids);
    }
    Ok(())
}

fn children(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

fn remove_tree(directory: &Path) -> std::io::Result<()> {
    for child in children(directory) {
        remove_tree(&child)?;
    }
    match fs::remove_dir(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The value of `key` in a file of `key value` lines.
pub fn flat_value(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(' ')?;
        (name == key).then(|| value.trim().parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pod_leaves_memory() {
        assert_eq!(pods_memory(100 << 20), 92 << 20);
        assert_eq!(pods_memory(10 << 20), 5 << 20);
        let meminfo = "MemTotal:         100 kB\nMemFree: 1 kB\n";
        assert_eq!(fixed_memory(meminfo, "quiet"), Some(102_400));
        assert_eq!(
            fixed_memory(meminfo, "memhp_default_state=online_movable"),
            None
        );
        assert_eq!(fixed_memory("", "quiet"), None);
    }

    #[test]
    fn the_pod_leaves_processes() {
        assert_eq!(pods_share(1900), 1644);
        assert_eq!(pods_share(300), 150);
        assert_eq!(pods_share(u64::MAX), u64::MAX - RESERVED_PIDS);
    }

    #[test]
    fn flat_files_are_read_by_whole_keys() {
        let text = "low 0\noom 3\noom_kill 2\n";
        assert_eq!(flat_value(text, "oom"), Some(3));
        assert_eq!(flat_value(text, "oom_kill"), Some(2));
        assert_eq!(flat_value(text, "oo"), None);
    }
}
