// SPDX-License-Identifier: Apache-2.0
//! Mount options, propagation, and what may not be mounted over.

mod common;

use std::fs;
use std::os::unix::fs::{symlink, PermissionsExt};
use std::path::Path;

use bulkhead_agent_protocol::oci;
use common::*;
use ttrpc::Code;

/// What a container's mountinfo says of the mounts at and below `place`: path,
/// options, and the optional fields.
async fn mounts_at(
    rig: &Rig,
    place: &str,
    change: impl FnOnce(&mut oci::Spec),
) -> Vec<(String, String, String)> {
    let mut spec = rig.spec("c", &["cat", "/proc/self/mountinfo"]);
    change(&mut spec);
    let printed = rig.run("c", spec).await.success();
    let below = format!("{place}/");
    printed
        .lines()
        .map(|line| {
            let (left, _) = line.split_once(" - ").unwrap();
            let fields: Vec<&str> = left.split(' ').collect();
            (fields[4].into(), fields[5].into(), fields[6..].join(" "))
        })
        .filter(|(path, ..): &(String, String, String)| path == place || path.starts_with(&below))
        .collect()
}

#[tokio::test]
async fn recursive_attributes_reach_what_is_below() {
    let rig = Rig::start().await;
    // A tree of this machine with mounts in it.
    let tree = Path::new("/sys");
    let flags = |options: &'static [&'static str]| {
        let rig = &rig;
        async move {
            mounts_at(rig, "/both", move |spec| {
                spec.mounts.push(bind(tree, "/both", options));
            })
            .await
        }
    };
    let all = flags(&["rbind", "rro", "rnosuid", "rnodev", "rnoexec", "rnoatime"]).await;
    assert!(all.len() > 1, "nothing is mounted below /sys: {all:?}");
    for (path, options, _) in all {
        assert_eq!(options, "ro,nosuid,nodev,noexec,noatime", "{path}");
    }
    // The plain ones are for the top alone.
    let top = flags(&["rbind", "nosymfollow", "strictatime"]).await;
    let marked: Vec<_> = top
        .iter()
        .filter(|(_, options, _)| options.contains("nosymfollow"))
        .map(|(path, ..)| path.as_str())
        .collect();
    assert_eq!(marked, ["/both"], "{top:?}");
    // Taken away again, everywhere.
    for (path, options, _) in flags(&["rbind", "rrw", "rexec", "rdev", "rsuid"]).await {
        assert_eq!(options, "rw,relatime", "{path}");
    }
}

#[tokio::test]
async fn times_of_access() {
    let rig = Rig::start().await;
    for (options, wanted) in [
        (&["noatime"][..], "rw,noatime"),
        (&["strictatime"], "rw"),
        (&["nodiratime", "norelatime"], "rw,nodiratime,relatime"),
        (&["noatime", "atime"], "rw,relatime"),
        (&["rnoatime", "rro"], "ro,noatime"),
    ] {
        let seen = mounts_at(&rig, "/data", |spec| {
            spec.mounts.push(mount("/data", "tmpfs", options));
        })
        .await;
        assert_eq!(seen[0].1, wanted, "{options:?}");
    }
}

#[tokio::test]
async fn propagation_of_a_mount() {
    let rig = Rig::start().await;
    for (options, wanted) in [
        (&["rprivate"][..], ""),
        (&["shared"], "shared:"),
        // One after the other; nobody is its master.
        (&["shared", "slave"], ""),
        (&["slave", "rshared"], "shared:"),
        (&["unbindable"], "unbindable"),
    ] {
        let seen = mounts_at(&rig, "/data", |spec| {
            spec.mounts.push(mount("/data", "tmpfs", options));
        })
        .await;
        let fields = &seen[0].2;
        assert_eq!(
            fields.is_empty(),
            wanted.is_empty(),
            "{options:?}: {fields}"
        );
        assert!(fields.starts_with(wanted), "{options:?}: {fields}");
    }
}

#[tokio::test]
async fn propagation_of_the_root() {
    let rig = Rig::start().await;
    for (kind, wanted) in [
        ("", ""),
        ("private", ""),
        ("rslave", ""),
        ("shared", "shared:"),
        ("unbindable", "unbindable"),
    ] {
        let seen = mounts_at(&rig, "/", |spec| {
            spec.linux.mut_or_insert_default().rootfs_propagation = kind.into();
        })
        .await;
        let root = seen.iter().find(|(path, ..)| path == "/").unwrap();
        assert_eq!(root.2.is_empty(), wanted.is_empty(), "{kind}: {root:?}");
        assert!(root.2.starts_with(wanted), "{kind}: {root:?}");
    }
    let mut spec = rig.spec("c", &["true"]);
    spec.linux.mut_or_insert_default().rootfs_propagation = "sideways".into();
    let (code, text) = status(rig.create("c", spec).await.map(drop));
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.contains("linux.rootfsPropagation"), "{text}");
}

#[tokio::test]
async fn the_mode_of_a_tmpfs() {
    let rig = Rig::start().await;
    let mut spec = rig.spec(
        "c",
        &[
            "stat", "-c", "%a", "/own", "/given", "/fresh", "/copied", "/both",
        ],
    );
    let root = rig.rootfs("c");
    for name in ["own", "given", "copied", "both"] {
        fs::create_dir(root.join(name)).unwrap();
        let mode = fs::Permissions::from_mode(0o2750);
        fs::set_permissions(root.join(name), mode).unwrap();
    }
    spec.mounts.extend([
        mount("/own", "tmpfs", &[]),
        mount("/given", "tmpfs", &["mode=711"]),
        mount("/fresh", "tmpfs", &[]),
        mount("/copied", "tmpfs", &["tmpcopyup"]),
        mount("/both", "tmpfs", &["tmpcopyup", "mode=700"]),
    ]);
    let printed = rig.run("c", spec).await.success();
    assert_eq!(printed, "2750\n711\n1777\n2750\n700\n");
}

#[tokio::test]
async fn links_are_not_followed_where_asked() {
    let rig = Rig::start().await;
    let data = rig.directory.path().join("data");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("file"), "content\n").unwrap();
    symlink("file", data.join("link")).unwrap();
    let script = "cat /data/file; cat /data/link 2>/dev/null || echo refused";
    let mut spec = rig.spec("c", &["sh", "-c", script]);
    spec.mounts
        .push(bind(&data, "/data", &["bind", "nosymfollow"]));
    assert_eq!(rig.run("c", spec).await.success(), "content\nrefused\n");
}

#[tokio::test]
async fn proc_is_not_mounted_over() {
    let rig = Rig::start().await;
    let data = rig.directory.path().join("data");
    fs::create_dir(&data).unwrap();
    let root = rig.rootfs("c");
    // Where the image's links lead counts, not only what the specification says.
    symlink("/proc/self", root.join("inside")).unwrap();
    symlink("/proc", root.join("whole")).unwrap();
    symlink("/", root.join("top")).unwrap();
    for (mount, why) in [
        (bind(&data, "/inside/attr", &["bind"]), "/proc"),
        (mount("/inside/attr", "tmpfs", &[]), "/proc"),
        (mount("/proc/acpi", "tmpfs", &[]), "/proc"),
        (bind(&data, "/whole", &["bind"]), "only a proc"),
        (bind(&data, "/proc", &["bind"]), "only a proc"),
        (mount("/whole", "proc", &[]), "symbolic link"),
        (bind(&data, "/top", &["bind"]), "root directory"),
    ] {
        let place = mount.destination.clone();
        let mut spec = rig.spec("c", &["true"]);
        spec.mounts.push(mount);
        let (code, text) = status(rig.create("c", spec).await.map(drop));
        assert_eq!(code, Code::INVALID_ARGUMENT, "{place}: {text}");
        assert!(text.contains(&place) && text.contains(why), "{text}");
    }
    // As lxcfs does, and a proc file system is one wherever it comes from.
    let uptime = data.join("uptime");
    fs::write(&uptime, "1.00 1.00\n").unwrap();
    let mut spec = rig.spec("c", &["cat", "/proc/uptime"]);
    spec.mounts
        .push(bind(&uptime, "/proc/uptime", &["bind", "ro"]));
    assert_eq!(rig.run("c", spec).await.success(), "1.00 1.00\n");
}

#[tokio::test]
async fn devices_replace_what_the_image_has_there() {
    let rig = Rig::start().await;
    let root = rig.rootfs("c");
    let outside = rig.directory.path().join("outside");
    fs::write(&outside, "").unwrap();
    fs::set_permissions(&outside, fs::Permissions::from_mode(0o600)).unwrap();
    symlink(&outside, root.join("dev/null")).unwrap();
    fs::write(root.join("dev/zero"), "a file").unwrap();
    let mut spec = rig.spec("c", &["stat", "-c", "%t:%T %a", "/dev/null", "/dev/zero"]);
    // The image's own /dev.
    spec.mounts.retain(|mount| mount.destination != "/dev");
    assert_eq!(rig.run("c", spec).await.success(), "1:3 666\n1:5 666\n");
    let mode = fs::metadata(&outside).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "a file outside was changed");
}
