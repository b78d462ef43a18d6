// SPDX-License-Identifier: Apache-2.0
//! Builds images around a program that is at hand, and looks into them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use sha2::{Digest, Sha256};

const BUILDER: &str = env!("CARGO_BIN_EXE_bulkhead-rootfs-builder");

fn scratch(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("bulkhead-rootfs-{name}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).unwrap();
    dir
}

/// A static program, as the agent is.
fn program() -> Option<&'static Path> {
    let busybox = Path::new("/bin/busybox");
    busybox.exists().then_some(busybox)
}

fn build(out: &Path, program: &Path) -> std::process::Output {
    Command::new(BUILDER)
        .arg("--agent")
        .arg(program)
        .arg("--out")
        .arg(out)
        .output()
        .unwrap()
}

fn digest(path: &Path) -> Vec<u8> {
    Sha256::digest(fs::read(path).unwrap()).to_vec()
}

#[test]
fn the_same_inputs_give_the_same_bytes() {
    let Some(program) = program() else {
        println!("SKIPPED: the_same_inputs_give_the_same_bytes: needs busybox-static");
        return;
    };
    let (a, b) = (scratch("a"), scratch("b"));
    for out in [&a, &b] {
        let output = build(out, program);
        assert!(output.status.success(), "{output:?}");
    }
    for name in ["rootfs.erofs", "rootfs.cpio"] {
        assert_eq!(digest(&a.join(name)), digest(&b.join(name)), "{name}");
    }
    let size = fs::metadata(a.join("rootfs.erofs")).unwrap().len();
    assert_eq!(size % (2 << 20), 0);
    let names: Vec<_> = fs::read_dir(&a)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names.len(), 2, "{names:?}");
    fs::remove_dir_all(a).unwrap();
    fs::remove_dir_all(b).unwrap();
}

#[test]
fn the_image_and_the_initrd_hold_the_agent_as_init() {
    let Some(program) = program() else {
        println!("SKIPPED: the_image_and_the_initrd_hold_the_agent_as_init: needs busybox-static");
        return;
    };
    let out = scratch("contents");
    assert!(build(&out, program).status.success());
    let listing = Command::new("cpio")
        .args(["-t", "--quiet", "-F"])
        .arg(out.join("rootfs.cpio"))
        .output();
    match listing {
        Ok(listing) => {
            let names = String::from_utf8(listing.stdout).unwrap();
            for name in ["sbin/init", "dev/console", "etc/passwd", "proc"] {
                assert!(names.lines().any(|line| line == name), "{name} in {names}");
            }
        }
        Err(_) => println!("SKIPPED: the_initrd_is_read_back: needs cpio"),
    }
    let dump = Command::new("dump.erofs")
        .args(["--path=/sbin/init"])
        .arg(out.join("rootfs.erofs"))
        .output()
        .unwrap();
    let text = String::from_utf8(dump.stdout).unwrap();
    let size = fs::metadata(program).unwrap().len();
    assert!(text.contains(&size.to_string()), "{text}");
    fs::remove_dir_all(out).unwrap();
}

#[test]
fn a_dynamically_linked_agent_is_refused() {
    let out = scratch("dynamic");
    let output = build(&out, Path::new(BUILDER));
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("statically linked"), "{text}");
    fs::remove_dir_all(out).unwrap();
}
