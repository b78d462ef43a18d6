// SPDX-License-Identifier: Apache-2.0
//! What there is on a host that a container could leave behind, for
//! comparison before and after.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// A process of user space.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// When it was started, in clock ticks since boot: with the number, who it
    /// is.
    pub start: u64,
    /// Its command line, or its name in brackets.
    pub command: String,
    /// Whether it has ended and nobody has asked how.
    pub zombie: bool,
}

/// The flag of the kernel's own threads in `/proc/PID/stat` (`PF_KTHREAD`).
const KERNEL_THREAD: u32 = 0x0020_0000;

/// All processes but the kernel's own threads.
pub fn processes() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(process)
        .collect()
}

/// One process; `None` when it has gone or is a thread of the kernel.
pub fn process(pid: u32) -> Option<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in parentheses and may hold anything, also parentheses.
    let (name, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let flags: u32 = fields.get(6)?.parse().ok()?;
    if flags & KERNEL_THREAD != 0 {
        return None;
    }
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut command = String::from_utf8_lossy(&command).replace('\0', " ");
    if command.trim().is_empty() {
        command = format!("[{}]", name.split_once('(').map_or("", |(_, n)| n));
    }
    Some(Process {
        pid,
        start: fields.get(19)?.parse().ok()?,
        command: command.trim().to_owned(),
        zombie: fields.first() == Some(&"Z"),
    })
}

/// The parent of a process.
pub fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(1)?.parse().ok()
}

/// Where something is mounted.
pub fn mounts() -> Vec<String> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    text.lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|path| path.replace("\\040", " "))
        .collect()
}

/// Everything a container can leave behind, one line each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing(BTreeSet<String>);

impl Listing {
    /// Looks at processes, mounts, network interfaces and namespaces, cgroups,
    /// listening Unix sockets, and at everything below `dirs`.
    pub fn take(dirs: &[PathBuf]) -> Self {
        let mut all = BTreeSet::new();
        for p in processes() {
            let zombie = if p.zombie { " (zombie)" } else { "" };
            all.insert(format!("process {} {}{zombie}", p.pid, p.command));
        }
        all.extend(mounts().into_iter().map(|m| format!("mount {m}")));
        for dir in ["/sys/class/net", "/run/netns", "/var/run/netns"] {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                all.insert(format!("network {}", entry.path().display()));
            }
        }
        walk(Path::new("/sys/fs/cgroup"), true, &mut |path| {
            all.insert(format!("cgroup {}", path.display()));
        });
        let unix = fs::read_to_string("/proc/net/unix").unwrap_or_default();
        for path in unix.lines().filter_map(|l| l.split_whitespace().nth(7)) {
            all.insert(format!("socket {path}"));
        }
        for dir in dirs {
            walk(dir, false, &mut |path| {
                all.insert(format!("file {}", path.display()));
            });
        }
        Self(all)
    }

    /// What is in this listing and was not in `before`, and the reverse, with
    /// `+` and `-`.
    pub fn changes_since(&self, before: &Self) -> Vec<String> {
        let new = self.0.difference(&before.0).map(|l| format!("+ {l}"));
        let gone = before.0.difference(&self.0).map(|l| format!("- {l}"));
        new.chain(gone).collect()
    }

    /// What is new since `before` and stays for `limit`: things that are about
    /// to go get the time to do so.
    pub fn left_since(before: &Self, dirs: &[PathBuf], limit: Duration) -> Vec<String> {
        let begin = Instant::now();
        loop {
            let now = Self::take(dirs);
            let new: Vec<String> = now.0.difference(&before.0).cloned().collect();
            if new.is_empty() || begin.elapsed() > limit {
                return new;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Calls `found` for everything below `dir`, or only for directories.
fn walk(dir: &Path, only_dirs: bool, found: &mut impl FnMut(&Path)) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(kind) = entry.file_type() else {
            continue;
        };
        let path = entry.path();
        if kind.is_dir() || !only_dirs {
            found(&path);
        }
        if kind.is_dir() {
            walk(&path, only_dirs, found);
        }
    }
}

/// Whether there is a network interface of this name.
pub fn interface(name: &str) -> bool {
    Path::new("/sys/class/net").join(name).exists()
}

/// Traffic-control filters and queueing disciplines, which no directory shows.
pub fn traffic_control() -> String {
    let output = Command::new("tc").args(["qdisc", "show"]).output();
    output.map_or(String::new(), |o| {
        String::from_utf8_lossy(&o.stdout).into_owned()
    })
}

/// The processes whose program file has this name.
pub fn by_program(name: &str) -> Vec<Process> {
    processes()
        .into_iter()
        .filter(|p| {
            fs::read_link(format!("/proc/{}/exe", p.pid)).is_ok_and(|exe| {
                let bytes = exe.as_os_str().as_bytes();
                let bytes = bytes.strip_suffix(b" (deleted)").unwrap_or(bytes);
                bytes.rsplit(|b| *b == b'/').next() == Some(name.as_bytes())
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::process::Stdio;

    use super::*;

    #[test]
    fn a_new_process_shows_and_its_end_too() {
        let before = Listing::take(&[]);
        let mut child = Command::new("cat")
            .arg("-u")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // A process that has just been started may not have its command line
        // yet: one that answers has.
        child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
        let mut answer = [0];
        child
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut answer)
            .unwrap();
        let changes = Listing::take(&[]).changes_since(&before);
        let new = format!("+ process {} cat -u", child.id());
        assert!(changes.contains(&new), "{changes:?}");
        assert_eq!(parent_of(child.id()), Some(std::process::id()));
        assert!(by_program("cat").iter().any(|p| p.pid == child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(process(child.id()).is_none());
    }

    #[test]
    fn a_new_file_shows() {
        let dir = std::env::temp_dir().join(format!("bulkhead-listing-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let before = Listing::take(std::slice::from_ref(&dir));
        fs::create_dir(dir.join("sub")).unwrap();
        fs::write(dir.join("sub/file"), "").unwrap();
        let changes = Listing::take(std::slice::from_ref(&dir)).changes_since(&before);
        let file = format!("+ file {}", dir.join("sub/file").display());
        assert!(changes.contains(&file), "{changes:?}");
        fs::remove_dir_all(dir).unwrap();
    }
}
