// SPDX-License-Identifier: Apache-2.0

use std::os::unix::net::UnixListener;

use bulkhead_runtime::resource::journal::{Journal, Resource};
use sha2::{Digest, Sha256};

use super::*;

const NAMESPACE: &str = "shim-delete-test";

struct Remains {
    root: tempfile::TempDir,
}

impl Remains {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("bundle")).unwrap();
        Self { root }
    }

    fn bundle(&self) -> PathBuf {
        self.root.path().join("bundle")
    }

    fn state_dir(&self) -> PathBuf {
        self.root.path().join("state")
    }

    fn socket(&self) -> PathBuf {
        self.root.path().join("s/socket")
    }

    fn flags(&self) -> Flags {
        Flags {
            namespace: NAMESPACE.into(),
            id: "container".into(),
            address: "/nobody".into(),
            bundle: self.bundle(),
            ..Default::default()
        }
    }

    /// As a shim leaves it that is killed.
    fn of_a_killed_shim(group: &str) -> (Self, PathBuf) {
        let remains = Self::new();
        let digest = Sha256::digest(format!("{NAMESPACE}/{group}"));
        let name: String = digest[..8].iter().map(|b| format!("{b:02x}")).collect();
        let sandbox = remains.state_dir().join("s").join(name);
        fs::create_dir_all(sandbox.join("shared/container")).unwrap();
        let journal = Journal::create(&sandbox).unwrap();
        let path = sandbox.join("shared/container");
        journal.record(Resource::Directory { path }).unwrap();
        fs::create_dir(remains.root.path().join("s")).unwrap();
        drop(UnixListener::bind(remains.socket()).unwrap());
        let address = socket::address(&remains.socket());
        fs::write(remains.bundle().join("address"), address).unwrap();
        Record {
            group: group.into(),
            state_dir: remains.state_dir(),
            pid: 4242,
        }
        .write(&remains.bundle())
        .unwrap();
        (remains, sandbox)
    }

    fn sockets(&self) -> usize {
        fs::read_dir(self.root.path().join("s")).unwrap().count()
    }
}

#[test]
fn what_a_killed_shim_has_left_goes_any_number_of_times() {
    let (remains, sandbox) = Remains::of_a_killed_shim("container");
    for _ in 0..2 {
        assert_eq!(clean(&remains.flags(), &remains.bundle()).unwrap(), 4242);
        assert!(!sandbox.exists());
        assert_eq!(remains.sockets(), 0);
    }
}

#[test]
fn a_broken_bundle_does_not_matter() {
    let (remains, sandbox) = Remains::of_a_killed_shim("pod");
    fs::write(remains.bundle().join("config.json"), "{ \"annot").unwrap();
    clean(&remains.flags(), &remains.bundle()).unwrap();
    assert!(!sandbox.exists());
    assert_eq!(remains.sockets(), 0);
}

#[test]
fn several_at_once() {
    let (remains, sandbox) = Remains::of_a_killed_shim("pod");
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| clean(&remains.flags(), &remains.bundle()).unwrap());
        }
    });
    assert!(!sandbox.exists());
    assert_eq!(remains.sockets(), 0);
}

#[test]
fn a_process_that_is_no_shim_is_left_alone() {
    let remains = Remains::new();
    let mut other = std::process::Command::new("sleep")
        .arg("1000")
        .spawn()
        .unwrap();
    let pid = other.id().to_string();
    fs::write(remains.bundle().join("shim.pid"), pid).unwrap();
    kill_shim(&remains.bundle(), NAMESPACE, "container");
    assert!(other.try_wait().unwrap().is_none());
    other.kill().unwrap();
    other.wait().unwrap();
}
