// SPDX-License-Identifier: Apache-2.0
//! Real programs, unchanged, of Debian's packages. The root file system is
//! what `tests/programs/build` makes (`make test-programs`); without it these
//! are skipped. The scripts say what they do; what they are to print is beside them.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_agent_protocol::oci;
use common::*;

/// A copy of the programs' root file system that takes no room, and the
/// script.
struct Root(PathBuf);

impl Root {
    fn new(rig: &Rig, script: &str) -> Option<Self> {
        let Some(lower) = std::env::var_os("BULKHEAD_PROGRAMS") else {
            println!("SKIPPED: {script}: needs BULKHEAD_PROGRAMS (make test-programs)");
            return None;
        };
        let base = rig.directory.path().join("programs");
        fs::create_dir(&base).unwrap();
        let run = |args: &[&str]| {
            let done = Command::new("mount").args(args).status().unwrap();
            assert!(done.success(), "mount {args:?}");
        };
        let base = base.to_str().unwrap();
        run(&["-t", "tmpfs", "tmpfs", base]);
        for name in ["upper", "work", "root"] {
            fs::create_dir(Path::new(base).join(name)).unwrap();
        }
        let lower = Path::new(&lower).display();
        let options = format!("lowerdir={lower},upperdir={base}/upper,workdir={base}/work");
        run(&[
            "-t",
            "overlay",
            "overlay",
            "-o",
            &options,
            &format!("{base}/root"),
        ]);
        fs::copy(scripts().join(script), format!("{base}/root/program")).unwrap();
        Some(Self(base.into()))
    }

    fn path(&self) -> PathBuf {
        self.0.join("root")
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        for path in [self.path(), self.0.clone()] {
            let _ = Command::new("umount").arg("-l").arg(path).status();
        }
    }
}

/// Runs a program's script to its end, and compares what it printed (systemd:
/// what it wrote to a file) and its status.
async fn works(name: &str, status: u32, change: impl FnOnce(&mut oci::Spec)) {
    let rig = Rig::start().await;
    let script = format!("{name}.sh");
    let Some(root) = Root::new(&rig, &script) else {
        return;
    };
    let mut spec = spec(&root.path(), &["/program"]);
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    spec.process.mut_or_insert_default().env = vec![path.into()];
    spec.mounts.push(mount("/tmp", "tmpfs", &["mode=1777"]));
    change(&mut spec);
    let outcome = rig.run("c", spec).await;
    let report = fs::read_to_string(root.path().join("report"));
    let printed = report.as_ref().unwrap_or(&outcome.stdout);
    let wanted = fs::read_to_string(scripts().join(format!("{name}.wanted"))).unwrap();
    assert_eq!(*printed, wanted, "{outcome:?}");
    assert_eq!(outcome.status, status, "{outcome:?}");
}

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/programs")
}

/// All capabilities and all devices.
fn privileged(spec: &mut oci::Spec) {
    let names = bulkhead_agent_protocol::CAPABILITIES.map(|name| format!("CAP_{name}"));
    let process = spec.process.mut_or_insert_default();
    process.capabilities = Some(oci::Capabilities {
        bounding: names.to_vec(),
        effective: names.to_vec(),
        permitted: names.to_vec(),
        ..Default::default()
    })
    .into();
    process.no_new_privileges = false;
    let all = oci::DeviceRule {
        allow: true,
        type_: "a".into(),
        access: "rwm".into(),
        ..Default::default()
    };
    let linux = spec.linux.mut_or_insert_default();
    linux.resources.mut_or_insert_default().devices = vec![all];
    linux.masked_paths.clear();
    linux.readonly_paths.clear();
}

#[tokio::test]
async fn redis() {
    works("redis", 0, |_| {}).await;
}

#[tokio::test]
async fn nginx() {
    works("nginx", 0, |_| {}).await;
}

#[tokio::test]
async fn postgresql() {
    works("postgresql", 0, |_| {}).await;
}

#[tokio::test]
async fn java() {
    works("java", 0, |_| {}).await;
}

#[tokio::test]
async fn node() {
    works("node", 0, |_| {}).await;
}

#[tokio::test]
async fn stress_ng() {
    works("stress-ng", 0, |_| {}).await;
}

#[tokio::test]
async fn buildah() {
    works("buildah", 0, privileged).await;
}

#[tokio::test]
async fn systemd() {
    // That is how the kernel ends a first process that powers off (reboot(2)).
    let off = 128 + libc::SIGINT as u32;
    works("systemd", off, |spec| {
        privileged(spec);
        spec.mounts.push(mount("/run", "tmpfs", &["mode=755"]));
        spec.mounts.push(mount("/sys/fs/cgroup", "cgroup", &[]));
    })
    .await;
}
