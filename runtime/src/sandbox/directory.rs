// SPDX-License-Identifier: Apache-2.0
//! A sandbox's directory on the host: everything it keeps in files.
//!
//! ```text
//! <state_dir>/s/<hash of namespace and id>/   mode 0700
//!   sandbox.json          whose it is
//!   o                     the operator's socket
//!   log, log.old          what the front end has logged
//!   journal               what it has taken from the host
//!   v/s                   connections to the guest
//!   v/s_1024 _1025        connections of the guest: agent, streams
//!   shared/               what the guest's virtio-fs shows
//!   layers/<container>/   its layers while they are mounted (`rootfs`)
//! ```

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    error::{Error, Step},
    operator,
    resource::{journal::Journal, mount},
};

/// Names of at most this length fit into paths; containerd's are shorter.
const NAME_MAX: usize = 128;

/// A sandbox's directory.
#[derive(Debug, Clone)]
pub struct Directory {
    path: PathBuf,
}

/// Name of the file that tells whose a directory is.
const IDENTITY: &str = "sandbox.json";

/// Whose a directory is: `sandbox.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// containerd's namespace, or what stands for it.
    pub namespace: String,
    /// The pod's id.
    pub id: String,
    /// The process that runs the sandbox: the shim, or `bulkhead run`.
    pub pid: u32,
    /// The VMM's process.
    pub vmm_pid: u32,
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// The merge group that the pod asked for.
    pub merge_group: Option<String>,
    /// Whether its memory is mergeable.
    pub mergeable: bool,
    /// When the process that runs it started, in clock ticks since boot; tells
    /// it from a later one of the same id.
    #[serde(default)]
    pub pid_started: u64,
    /// Virtual processors.
    #[serde(default)]
    pub vcpus: u8,
    /// When it was made, in milliseconds since the epoch.
    #[serde(default)]
    pub created_ms: u64,
    /// Where the shim's task service is; none: it is no shim.
    #[serde(default)]
    pub task_socket: Option<PathBuf>,
}

impl Directory {
    /// Of the sandbox `id` in `namespace`. The name is short and of known
    /// length whatever those are: socket paths end at 107 bytes.
    pub fn of(state_dir: &Path, namespace: &str, id: &str) -> Self {
        let digest = Sha256::digest(format!("{namespace}/{id}"));
        let name: String = digest[..8]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        Self {
            path: state_dir.join("s").join(name),
        }
    }

    /// Makes it.
    ///
    /// # Errors
    /// There is one: the sandbox exists, or what it left behind does.
    pub fn create(&self) -> Result<(), Error> {
        let parent = self.path.parent().unwrap_or(&self.path);
        let mut builder = DirBuilder::new();
        builder.mode(0o700);
        builder
            .recursive(true)
            .create(parent)
            .step(|| format!("create {} (runtime.state_dir)", parent.display()))?;
        match builder.recursive(false).create(&self.path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(Error::AlreadyExists(format!(
                    "sandbox directory {}",
                    self.path.display()
                )));
            }
            Err(error) => {
                return Err(error).step(|| format!("create {}", self.path.display()));
            }
        }
        // Containers' users look things up in it through the guest.
        let shared = self.shared();
        DirBuilder::new()
            .mode(0o755)
            .create(&shared)
            .step(|| format!("create {}", shared.display()))?;
        // By itself: the VMM sees it in its jail, where it is a user of its own.
        // Nobody else comes through the directory above.
        let sockets = self.sockets();
        DirBuilder::new()
            .mode(0o711)
            .create(&sockets)
            .step(|| format!("create {}", sockets.display()))
    }

    /// Tells people whose it is.
    pub fn identify(&self, identity: &Identity) -> io::Result<()> {
        fs::write(self.path.join(IDENTITY), serde_json::to_vec(identity)?)
    }

    /// All sandboxes below a state directory that tell whose they are, by
    /// namespace and id. One that is just being made, or given back, may be
    /// missing.
    ///
    /// # Errors
    /// The directory is there and cannot be read.
    pub fn all(state_dir: &Path) -> io::Result<Vec<Identity>> {
        let found = Self::found(state_dir)?;
        let mut all: Vec<Identity> = found.into_iter().filter_map(|(_, whose)| whose).collect();
        all.sort_by(|a, b| (&a.namespace, &a.id).cmp(&(&b.namespace, &b.id)));
        Ok(all)
    }

    /// All directories of sandboxes below a state directory, and whose they
    /// are, where they tell.
    ///
    /// # Errors
    /// The directory is there and cannot be read.
    pub fn found(state_dir: &Path) -> io::Result<Vec<(PathBuf, Option<Identity>)>> {
        let entries = match fs::read_dir(state_dir.join("s")) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut all = Vec::new();
        for entry in entries {
            let directory = entry?.path();
            let identity = fs::read(directory.join(IDENTITY))
                .and_then(|text| Ok(serde_json::from_slice::<Identity>(&text)?));
            if let Err(error) = &identity {
                tracing::debug!(path = %directory.display(), %error, "it does not tell whose it is");
            }
            all.push((directory, identity.ok()));
        }
        Ok(all)
    }

    /// Gives everything back that the journal names, and removes the
    /// directory. Nothing to do when there is none.
    pub fn release(&self) -> Result<(), Error> {
        Journal::release_all(&self.path)
            .step(|| format!("clean up after {}", self.path.display()))?;
        mount::remove_tree(&self.path).step(|| format!("remove {}", self.path.display()))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the front end's log is kept.
    pub fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    /// Where an operator asks.
    pub fn operator(&self) -> PathBuf {
        self.path.join(operator::SOCKET)
    }

    /// What the guest's virtio-fs shows.
    pub fn shared(&self) -> PathBuf {
        self.path.join("shared")
    }

    /// Where a container's layers are mounted for a moment.
    pub fn layers(&self, container: &str) -> PathBuf {
        self.path.join("layers").join(container)
    }

    fn sockets(&self) -> PathBuf {
        self.path.join("v")
    }

    /// Where the host connects to the guest, and the prefix of where the
    /// guest connects to the host.
    pub fn vsock(&self) -> PathBuf {
        self.sockets().join("s")
    }

    /// Where the guest's connections to `port` arrive.
    pub fn vsock_port(&self, port: u32) -> PathBuf {
        self.sockets().join(format!("s_{port}"))
    }
}

/// Whether an id can be a file's name: letters, digits, `_`, `.` and `-`,
/// beginning with a letter or digit.
///
/// # Errors
/// [`Error::Invalid`] with what it is the id of.
pub fn check_name(what: &str, name: &str) -> Result<(), Error> {
    let good = name.len() <= NAME_MAX
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    if good {
        Ok(())
    } else {
        Err(Error::Invalid(format!(
            "{what} {name:?}: letters, digits, '_', '.' and '-' make an id, at most {NAME_MAX}"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_leave_their_directory() {
        assert!(check_name("id", "web-1.a_b").is_ok());
        for bad in ["", ".", "..", "a/b", "-a", "a b", "a\0", &"x".repeat(129)] {
            assert!(check_name("id", bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn sandboxes_are_listed_by_name() {
        let scratch = tempfile::tempdir().unwrap();
        assert_eq!(Directory::all(scratch.path()).unwrap(), []);
        let mut made = Vec::new();
        for id in ["a", "b"] {
            let directory = Directory::of(scratch.path(), "k8s.io", id);
            directory.create().unwrap();
            let identity = Identity {
                namespace: "k8s.io".into(),
                id: id.into(),
                pid: 1,
                vmm_pid: 2,
                memory_mib: 256,
                ..Identity::default()
            };
            directory.identify(&identity).unwrap();
            made.push(identity);
        }
        let unfinished = Directory::of(scratch.path(), "k8s.io", "c");
        unfinished.create().unwrap();
        assert_eq!(Directory::all(scratch.path()).unwrap(), made);
    }

    #[test]
    fn a_second_sandbox_of_the_same_name_is_refused() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = Directory::of(scratch.path(), "k8s.io", "x");
        assert!(
            directory.vsock_port(1025).as_os_str().len() < scratch.path().as_os_str().len() + 40
        );
        directory.create().unwrap();
        assert!(matches!(directory.create(), Err(Error::AlreadyExists(_))));
        directory.release().unwrap();
        directory.release().unwrap();
        assert!(!directory.path().exists());
    }
}
