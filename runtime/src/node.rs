// SPDX-License-Identifier: Apache-2.0
//! All sandboxes of this host, dead ones too. Nobody is waited for beyond a
//! deadline.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use serde::Serialize;

use crate::{
    operator::{client, metrics, metrics::Metrics, State},
    resource::process,
    sandbox::directory::{Directory, Identity},
};

/// How long one sandbox may take to answer. Its metrics may take
/// three seconds of the guest.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Sandboxes that are asked at the same time.
const AT_ONCE: usize = 16;

/// How a sandbox stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Its virtual machine runs.
    Running,
    /// Its virtual machine has ended, and its shim waits to be told to go.
    Ended,
    /// Its shim lives and does not answer.
    Silent,
    /// Its shim lives and serves no operator (`runtime.operator_socket`).
    Unwatched,
    /// Its shim is dead; what it has left is given back by the shim's `delete`.
    Dead,
    /// It was not finished, or is just being made or given back.
    Unfinished,
}

impl Status {
    /// All, in their order.
    pub const ALL: [Self; 6] = [
        Self::Running,
        Self::Ended,
        Self::Silent,
        Self::Unwatched,
        Self::Dead,
        Self::Unfinished,
    ];
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Running => "running",
            Self::Ended => "ended",
            Self::Silent => "silent",
            Self::Unwatched => "unwatched",
            Self::Dead => "dead",
            Self::Unfinished => "unfinished",
        })
    }
}

/// A sandbox.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Found {
    /// containerd's namespace, or what stands for it; empty: not known.
    pub namespace: String,
    /// Its id; of one that is not finished, its directory's name.
    pub id: String,
    /// How it stands.
    pub status: Status,
    /// The process that runs it, or did; 0: not known.
    pub pid: u32,
    /// Its VMM's process, or what was; 0: not known.
    pub vmm_pid: u32,
    /// Virtual processors.
    pub vcpus: u8,
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// When it was made, in milliseconds since the epoch; 0: not known.
    pub created_ms: u64,
    /// Where the shim's task service is.
    pub task_socket: Option<PathBuf>,
    /// Its directory.
    pub directory: PathBuf,
    /// What it says of itself, if it does.
    pub state: Option<State>,
}

impl Found {
    /// Where it is asked.
    pub fn socket(&self) -> PathBuf {
        self.directory.join(crate::operator::SOCKET)
    }

    /// What its front end has logged: the older file, then the newer one.
    pub fn logs(&self) -> [PathBuf; 2] {
        [self.directory.join("log.old"), self.directory.join("log")]
    }

    fn unfinished(directory: PathBuf) -> Self {
        let name = directory.file_name().unwrap_or_default();
        Self {
            namespace: String::new(),
            id: name.to_string_lossy().into_owned(),
            status: Status::Unfinished,
            pid: 0,
            vmm_pid: 0,
            vcpus: 0,
            memory_mib: 0,
            created_ms: 0,
            task_socket: None,
            directory,
            state: None,
        }
    }

    fn of(identity: Identity, directory: PathBuf, patience: Duration) -> Self {
        let mut found = Self {
            namespace: identity.namespace,
            id: identity.id,
            status: Status::Dead,
            pid: identity.pid,
            vmm_pid: identity.vmm_pid,
            vcpus: identity.vcpus,
            memory_mib: identity.memory_mib,
            created_ms: identity.created_ms,
            task_socket: identity.task_socket,
            directory,
            state: None,
        };
        let lives = process::start_time(identity.pid)
            .is_ok_and(|started| started == Some(identity.pid_started));
        if !lives {
            return found;
        }
        let socket = found.socket();
        if !socket.exists() {
            found.status = Status::Unwatched;
            return found;
        }
        let state = client::get(&socket, "/state", patience)
            .ok()
            .and_then(|text| serde_json::from_str::<State>(&text).ok());
        found.status = match &state {
            Some(State { ended: None, .. }) => Status::Running,
            Some(_) => Status::Ended,
            None => Status::Silent,
        };
        found.state = state;
        found
    }
}

/// All sandboxes below a state directory, by namespace and id.
///
/// # Errors
/// The directory is there and cannot be read.
pub fn all(state_dir: &Path, patience: Duration) -> io::Result<Vec<Found>> {
    let mut all = in_parallel(
        Directory::found(state_dir)?,
        |(directory, identity)| match identity {
            Some(identity) => Found::of(identity, directory, patience),
            None => Found::unfinished(directory),
        },
    );
    all.sort_by(|a, b| (&a.namespace, &a.id).cmp(&(&b.namespace, &b.id)));
    Ok(all)
}

/// Metrics of all sandboxes of a node, and of the node.
///
/// # Errors
/// As [`all`].
pub fn metrics(state_dir: &Path, patience: Duration) -> io::Result<String> {
    let found = all(state_dir, patience)?;
    let mut metrics = Metrics::default();
    for status in Status::ALL {
        let count = found.iter().filter(|found| found.status == status).count();
        let name = status.to_string();
        metrics.add(&metrics::NODE_SANDBOXES, &[("status", &name)], count as f64);
    }
    let asked = found.into_iter().filter(|found| found.state.is_some());
    let answers = in_parallel(asked.collect(), |found| {
        client::get(&found.socket(), "/metrics", patience).ok()
    });
    let unread = answers.iter().filter(|answer| answer.is_none()).count();
    metrics.add(&metrics::NODE_UNREAD, &[], unread as f64);
    for answer in answers.into_iter().flatten() {
        metrics.merge(&answer);
    }
    Ok(metrics.to_string())
}

/// Does it for all, some at a time, in their order.
fn in_parallel<T: Send, R: Send>(items: Vec<T>, work: impl Fn(T) -> R + Sync) -> Vec<R> {
    let mut done = Vec::with_capacity(items.len());
    let mut items = items.into_iter();
    loop {
        let some: Vec<T> = items.by_ref().take(AT_ONCE).collect();
        if some.is_empty() {
            return done;
        }
        let work = &work;
        thread::scope(|scope| {
            let running: Vec<_> = some
                .into_iter()
                .map(|item| scope.spawn(move || work(item)))
                .collect();
            for one in running {
                match one.join() {
                    Ok(result) => done.push(result),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::unix::net::UnixListener,
        process::Command,
    };

    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    fn made(state_dir: &Path, id: &str, pid: u32) -> Directory {
        let directory = Directory::of(state_dir, "default", id);
        directory.create().unwrap();
        let identity = Identity {
            namespace: "default".into(),
            id: id.into(),
            pid,
            pid_started: process::start_time(pid).unwrap().unwrap_or(1),
            ..Identity::default()
        };
        directory.identify(&identity).unwrap();
        directory
    }

    fn status(state_dir: &Path, patience: Duration) -> Vec<(String, Status)> {
        let all = all(state_dir, patience).unwrap();
        all.into_iter().map(|f| (f.id, f.status)).collect()
    }

    #[test]
    fn dead_and_silent_sandboxes_are_listed_and_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        assert!(status(dir.path(), SOON).is_empty());
        let mut child = Command::new("true").spawn().unwrap();
        made(dir.path(), "dead", child.id());
        child.wait().unwrap();
        made(dir.path(), "unwatched", std::process::id());
        let silent = made(dir.path(), "silent", std::process::id());
        let _listener = UnixListener::bind(silent.operator()).unwrap();
        // The id of a process that was there before this one.
        let reused = made(dir.path(), "reused", std::process::id());
        let identity = Identity {
            namespace: "default".into(),
            id: "reused".into(),
            pid: std::process::id(),
            pid_started: 1,
            ..Identity::default()
        };
        reused.identify(&identity).unwrap();
        assert_eq!(
            status(dir.path(), Duration::from_millis(50)),
            [
                ("dead".into(), Status::Dead),
                ("reused".into(), Status::Dead),
                ("silent".into(), Status::Silent),
                ("unwatched".into(), Status::Unwatched),
            ]
        );
        let text = metrics(dir.path(), Duration::from_millis(50)).unwrap();
        assert!(
            text.contains("bulkhead_node_sandboxes{status=\"dead\"} 2\n"),
            "{text}"
        );
    }

    #[test]
    fn a_sandbox_without_a_name_is_unfinished() {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::of(dir.path(), "default", "x");
        directory.create().unwrap();
        let found = all(dir.path(), SOON).unwrap();
        assert_eq!(found[0].status, Status::Unfinished);
        assert!(directory.path().ends_with(&found[0].id));
    }

    #[test]
    fn a_sandbox_that_answers_is_as_it_says() {
        let dir = tempfile::tempdir().unwrap();
        let directory = made(dir.path(), "x", std::process::id());
        let listener = UnixListener::bind(directory.operator()).unwrap();
        let state = State {
            namespace: "default".into(),
            sandbox: "x".into(),
            pid: 1,
            vmm_pid: 2,
            vcpus: 1,
            memory_mib: 64,
            ended: Some("power cut".into()),
            start: crate::operator::Start::default(),
            containers: Vec::new(),
        };
        let body = serde_json::to_string(&state).unwrap();
        let server = thread::spawn(move || {
            let (mut client, _) = listener.accept().unwrap();
            // All of the question: what is not read breaks the connection.
            let mut question = Vec::new();
            while !question.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                client.read_exact(&mut byte).unwrap();
                question.extend(byte);
            }
            write!(client, "HTTP/1.1 200 OK\r\n\r\n{body}").unwrap();
        });
        let found = all(dir.path(), SOON).unwrap().remove(0);
        server.join().unwrap();
        assert_eq!(found.status, Status::Ended);
        assert_eq!(found.state, Some(state));
    }
}
