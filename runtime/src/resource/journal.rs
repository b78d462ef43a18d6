// SPDX-License-Identifier: Apache-2.0
//! The resource journal: what a sandbox has taken from the host.
//!
//! Every resource is written down before it is taken and struck out after it
//! is given back, so that whoever finds the sandbox's directory after a crash
//! (`delete` on a dead shim) can give back all of it, and nothing else.
//! Releasing is idempotent: an entry may describe something that was never
//! taken (the crash came first) or is gone already.
//!
//! The file holds one JSON object a line, appended with a single write each;
//! a last line cut off by a crash stands for something not yet taken.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Mutex,
};

use serde::{Deserialize, Serialize};

use super::{
    cgroup, mount,
    network::{self, NamespaceId},
    process,
};

/// Name of the journal in a sandbox's directory.
pub const FILE_NAME: &str = "journal";

/// Something taken from the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Resource {
    /// A directory that is removed with everything in it; what is mounted
    /// below it is unmounted first.
    Directory {
        /// Absolute path.
        path: PathBuf,
    },
    /// A mount.
    Mount {
        /// Absolute path of the mount point; the mount point itself stays.
        target: PathBuf,
    },
    /// A Unix socket's name.
    Socket {
        /// Absolute path.
        path: PathBuf,
    },
    /// A process.
    Process {
        /// Process id.
        pid: u32,
        /// Field 22 of `/proc/<pid>/stat` (clock ticks since boot), which
        /// tells the process from a later one with the same id.
        start_time: u64,
    },
    /// A cgroup v2 directory, with every process in it.
    Cgroup {
        /// Absolute path.
        path: PathBuf,
    },
    /// A cgroup v2 directory that other sandboxes may use as well: removed
    /// only once it is empty.
    CgroupParent {
        /// Absolute path.
        path: PathBuf,
    },
    /// A tap in a network namespace.
    Tap {
        /// Path of the namespace.
        netns: PathBuf,
        /// Which one was there when it was made.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        namespace: Option<NamespaceId>,
        /// Interface name.
        name: String,
    },
    /// The ingress qdisc, with its filters, of a pod's interface.
    TrafficRedirect {
        /// Path of the namespace.
        netns: PathBuf,
        /// Which one was there when it was made.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        namespace: Option<NamespaceId>,
        /// Interface name.
        device: String,
    },
}

impl Resource {
    /// Gives the resource back; success when there is nothing to give back.
    pub fn release(&self) -> io::Result<()> {
        match self {
            Self::Directory { path } => mount::remove_tree(path),
            Self::Mount { target } => mount::unmount(target),
            Self::Socket { path } => match std::fs::remove_file(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                other => other,
            },
            Self::Process { pid, start_time } => process::kill(*pid, *start_time),
            Self::Cgroup { path } => cgroup::remove(path),
            Self::CgroupParent { path } => cgroup::remove_parent(path),
            // One that is gone took all in it along; what has come to its path
            // since is somebody else's.
            Self::Tap {
                netns, namespace, ..
            }
            | Self::TrafficRedirect {
                netns, namespace, ..
            } if namespace.is_some() && NamespaceId::of(netns) != *namespace => Ok(()),
            Self::Tap { netns, name, .. } => network::remove_tap(netns, name),
            Self::TrafficRedirect { netns, device, .. } => network::remove_redirect(netns, device),
        }
    }
}

/// Names an entry within one journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct EntryId(u64);

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Line {
    Take { id: EntryId, what: Resource },
    Gone { id: EntryId },
}

/// An open journal. Shared by reference; each call writes one line.
#[derive(Debug)]
pub struct Journal {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    file: File,
    next: u64,
}

impl Journal {
    /// Starts the journal of a new sandbox in its directory `dir`.
    ///
    /// # Errors
    /// `AlreadyExists` when there is one: the sandbox exists, or its remains
    /// have not been cleaned up.
    pub fn create(dir: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .open(dir.join(FILE_NAME))?;
        Ok(Self {
            state: Mutex::new(State { file, next: 1 }),
        })
    }

    /// Writes down what is about to be taken. Call it before taking it.
    pub fn record(&self, what: Resource) -> io::Result<EntryId> {
        let mut state = self.lock();
        let id = EntryId(state.next);
        state.append(&Line::Take { id, what })?;
        state.next += 1;
        Ok(id)
    }

    /// Strikes an entry out. Call it after giving the resource back.
    pub fn forget(&self, id: EntryId) -> io::Result<()> {
        self.lock().append(&Line::Gone { id })
    }

    /// Takes a resource: writes it down, runs `take`, and strikes it out
    /// again when that fails.
    pub fn take<T, E: From<io::Error>>(
        &self,
        what: Resource,
        take: impl FnOnce() -> Result<T, E>,
    ) -> Result<(T, EntryId), E> {
        let id = self.record(what)?;
        match take() {
            Ok(taken) => Ok((taken, id)),
            Err(error) => {
                // The entry stays if this fails: releasing nothing is fine.
                let _ = self.forget(id);
                Err(error)
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("no holder of the journal's lock panics")
    }

    /// What a journal says is still taken, in the order it was taken. An
    /// absent journal holds nothing.
    pub fn entries(dir: &Path) -> io::Result<Vec<Resource>> {
        let text = match std::fs::read_to_string(dir.join(FILE_NAME)) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        Ok(replay(&text))
    }

    /// Gives everything back that the journal in `dir` names, newest first.
    /// One that fails does not keep the others; the first error is returned
    /// and its entry, like the journal, stays for another try.
    pub fn release_all(dir: &Path) -> io::Result<()> {
        let mut first_error = None;
        for resource in Self::entries(dir)?.iter().rev() {
            if let Err(error) = resource.release() {
                tracing::warn!(?resource, %error, "resource not released");
                first_error.get_or_insert(io::Error::new(
                    error.kind(),
                    format!("releasing {resource:?}: {error}"),
                ));
            }
        }
        first_error.map_or(Ok(()), Err)
    }
}

impl State {
    fn append(&mut self, line: &Line) -> io::Result<()> {
        let mut bytes = serde_json::to_vec(line)?;
        bytes.push(b'\n');
        self.file.write_all(&bytes)
    }
}

fn replay(text: &str) -> Vec<Resource> {
    let mut live: Vec<(EntryId, Resource)> = Vec::new();
    for line in text.lines() {
        match serde_json::from_str(line) {
            Ok(Line::Take { id, what }) => live.push((id, what)),
            Ok(Line::Gone { id }) => live.retain(|(entry, _)| *entry != id),
            Err(error) => tracing::warn!(line, %error, "journal line not understood"),
        }
    }
    live.into_iter().map(|(_, what)| what).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let dir =
            std::env::temp_dir().join(format!("bulkhead-journal-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn entries_are_what_was_taken_and_not_given_back() {
        let dir = scratch("entries");
        let journal = Journal::create(&dir).unwrap();
        let a = Resource::Socket {
            path: dir.join("a"),
        };
        let b = Resource::Mount {
            target: dir.join("b"),
        };
        let first = journal.record(a).unwrap();
        journal.record(b.clone()).unwrap();
        journal.forget(first).unwrap();
        assert_eq!(Journal::entries(&dir).unwrap(), vec![b]);
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_line_cut_off_by_a_crash_is_passed_over() {
        let kept = r#"{"take":{"id":1,"what":{"socket":{"path":"/x"}}}}"#;
        let text = format!("{kept}\n{{\"take\":{{\"id\":2,\"wh");
        assert_eq!(replay(&text), vec![Resource::Socket { path: "/x".into() }]);
    }

    #[test]
    fn a_failed_take_leaves_no_entry() {
        let dir = scratch("failed");
        let journal = Journal::create(&dir).unwrap();
        let what = Resource::Socket {
            path: dir.join("s"),
        };
        let result: io::Result<((), EntryId)> =
            journal.take(what, || Err(io::Error::other("refused")));
        assert!(result.is_err());
        assert!(Journal::entries(&dir).unwrap().is_empty());
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn release_all_gives_back_newest_first_and_twice() {
        let dir = scratch("release");
        let journal = Journal::create(&dir).unwrap();
        let tree = dir.join("tree");
        journal
            .record(Resource::Directory { path: tree.clone() })
            .unwrap();
        std::fs::create_dir_all(tree.join("below")).unwrap();
        let socket = tree.join("socket");
        journal
            .record(Resource::Socket {
                path: socket.clone(),
            })
            .unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        let start_time = process::start_time(child.id()).unwrap().unwrap();
        journal
            .record(Resource::Process {
                pid: child.id(),
                start_time,
            })
            .unwrap();
        Journal::release_all(&dir).unwrap();
        assert!(!tree.exists());
        assert!(!child.wait().unwrap().success());
        Journal::release_all(&dir).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_second_journal_is_refused() {
        let dir = scratch("second");
        let _journal = Journal::create(&dir).unwrap();
        assert_eq!(
            Journal::create(&dir).unwrap_err().kind(),
            io::ErrorKind::AlreadyExists
        );
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
