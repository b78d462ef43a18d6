// SPDX-License-Identifier: Apache-2.0
//! Reaping. Whatever loses its parent below the shim becomes its child, and
//! is reaped here. Children that somebody waits for are left to them.

use std::{collections::BTreeSet, fs, io};

use rustix::process::{waitpid, Pid, WaitOptions};
use tokio::signal::unix::{signal, SignalKind};

/// Makes the shim the parent of everything below it that loses its own.
///
/// # Errors
/// Those of the system.
pub fn adopt_orphans() -> io::Result<()> {
    Ok(rustix::process::set_child_subreaper(Some(
        rustix::process::getpid(),
    ))?)
}

/// Reaps for ever. `known` tells which children somebody waits for; none: one
/// is just being made, so nothing can be said.
///
/// # Errors
/// When signals cannot be watched.
pub async fn run(known: impl Fn() -> Option<BTreeSet<u32>>) -> io::Result<()> {
    let mut ended = signal(SignalKind::child())?;
    while ended.recv().await.is_some() {
        if let Some(known) = known() {
            reap(&known);
        }
    }
    Ok(())
}

fn reap(known: &BTreeSet<u32>) {
    for pid in children().unwrap_or_default() {
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
        if let (false, Some(raw)) = (known.contains(&pid), raw) {
            // Of one that runs, or that is gone, there is nothing to tell.
            if let Ok(Some(_)) = waitpid(Some(raw), WaitOptions::NOHANG) {
                tracing::debug!(pid, "orphan reaped");
            }
        }
    }
}

/// Children of all threads: an orphan goes to any of them.
fn children() -> io::Result<BTreeSet<u32>> {
    let mut children = BTreeSet::new();
    for thread in fs::read_dir("/proc/self/task")? {
        let list = thread?.path().join("children");
        // A thread may just have ended.
        let text = fs::read_to_string(list).unwrap_or_default();
        children.extend(
            text.split_whitespace()
                .filter_map(|pid| pid.parse::<u32>().ok()),
        );
    }
    Ok(children)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn unknown_children_are_reaped_and_known_ones_left() {
        let spawn = || Command::new("true").spawn().unwrap();
        let (mut ours, other) = (spawn(), spawn());
        // Zombies are listed as well.
        let state = |pid: u32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit(')').next().and_then(|rest| rest.chars().nth(1))
        };
        while state(ours.id()) != Some('Z') || state(other.id()) != Some('Z') {
            std::thread::yield_now();
        }
        assert!(children().unwrap().contains(&other.id()));
        // Other tests have children, too.
        let mut known = children().unwrap();
        known.remove(&other.id());
        reap(&known);
        assert_eq!(state(other.id()), None);
        assert_eq!(state(ours.id()), Some('Z'));
        assert!(ours.wait().unwrap().success());
    }
}
