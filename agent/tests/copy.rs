// SPDX-License-Identifier: Apache-2.0
//! Files that are copied out of a container, and into it.

mod common;

use std::fs;
use std::os::unix::fs::{symlink, MetadataExt, PermissionsExt};
use std::path::Path;

use bulkhead_agent_protocol::agent;
use common::*;
use tokio::io::AsyncWriteExt;
use ttrpc::Code;

/// A container that stays, and its root file system.
async fn staying(rig: &Rig) -> std::path::PathBuf {
    let spec = rig.spec("c", &["sleep", "1000"]);
    let root = std::path::PathBuf::from(&spec.root.path);
    rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    root
}

async fn copy(
    rig: &Rig,
    id: &str,
    path: &str,
    arriving: Option<agent::ArrivingFile>,
) -> ttrpc::Result<Streams> {
    let (stdio, pending) = rig.streams(false);
    let request = agent::CopyFileRequest {
        container_id: "c".into(),
        exec_id: id.into(),
        path: path.into(),
        arriving: arriving.into(),
        stdio: Some(stdio).into(),
        ..Default::default()
    };
    let reply = rig.client.copy_file(rig.context(), &request).await?;
    Ok(pending.arrive(reply.pid).await)
}

/// Permissions, owner and contents of a file of the container.
async fn out(rig: &Rig, id: &str, path: &str) -> Result<(u32, u32, Vec<u8>), String> {
    let Streams { stdout, stderr, .. } = copy(rig, id, path, None).await.unwrap();
    let (bytes, said, exit) = tokio::join!(read_all(stdout), read_all(stderr), rig.wait("c", id));
    if exit.unwrap().exit_status != 0 {
        return Err(String::from_utf8(said).unwrap());
    }
    let (header, contents) = bytes.split_at(24);
    let number = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
    let size = u64::from_le_bytes(header[..8].try_into().unwrap());
    assert_eq!(size, contents.len() as u64);
    Ok((number(8), number(12), contents.to_vec()))
}

/// Exit status and what was said.
async fn into(
    rig: &Rig,
    id: &str,
    path: &str,
    file: agent::ArrivingFile,
    contents: &[u8],
) -> (u32, String) {
    let streams = copy(rig, id, path, Some(file)).await.unwrap();
    let mut stdin = streams.stdin.unwrap();
    // It may have ended already.
    let _ = stdin.write_all(contents).await;
    drop(stdin);
    let (said, exit) = tokio::join!(read_all(streams.stderr), rig.wait("c", id));
    let status = exit.unwrap().exit_status;
    (status, String::from_utf8(said).unwrap())
}

fn file(name: &str, size: usize) -> agent::ArrivingFile {
    agent::ArrivingFile {
        name: name.into(),
        size: size as u64,
        mode: 0o640,
        uid: 7,
        gid: 8,
        modified_ns: 1_500_000_000_000_000_000,
        ..Default::default()
    }
}

#[tokio::test]
async fn a_file_there_and_back() {
    let rig = Rig::start().await;
    let root = staying(&rig).await;
    let contents: Vec<u8> = (0..3_000_000u32).flat_map(|n| n.to_le_bytes()).collect();
    let done = into(&rig, "in", "/tmp/new", file("x", contents.len()), &contents).await;
    assert_eq!(done, (0, String::new()));
    let made = fs::metadata(root.join("tmp/new")).unwrap();
    assert_eq!(made.mode() & 0o7777, 0o640);
    assert_eq!(
        (made.uid(), made.gid(), made.mtime()),
        (7, 8, 1_500_000_000)
    );
    let (mode, uid, back) = out(&rig, "out", "/tmp/new").await.unwrap();
    assert_eq!((mode, uid), (0o640, 7));
    assert!(back == contents);
    // Into a directory it has its own name; what is there is replaced.
    for text in ["one", "another"] {
        let id = format!("to-{text}");
        let done = into(&rig, &id, "/tmp/", file("x", text.len()), text.as_bytes()).await;
        assert_eq!(done, (0, String::new()));
        assert_eq!(fs::read_to_string(root.join("tmp/x")).unwrap(), text);
    }
    assert_eq!(out(&rig, "empty", "/proc/version").await.unwrap().2, b"");
}

#[tokio::test]
async fn links_stay_in_the_container() {
    let rig = Rig::start().await;
    let root = staying(&rig).await;
    let outside = rig.directory.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), "the machine's").unwrap();
    symlink(&outside, root.join("away")).unwrap();
    symlink("../../../../../../../../etc", root.join("up")).unwrap();
    symlink(outside.join("secret"), root.join("link")).unwrap();
    fs::write(root.join("etc/own"), "its own").unwrap();
    assert_eq!(out(&rig, "a", "/up/own").await.unwrap().2, b"its own");
    for (id, path) in [
        ("b", "/away/secret"),
        ("c", "/link"),
        ("d", "/../../away/secret"),
    ] {
        let said = out(&rig, id, path).await.unwrap_err();
        assert!(said.contains("No such file"), "{path}: {said}");
    }
    let done = into(&rig, "e", "/away/new", file("x", 1), b"x").await;
    assert!(done.0 == 1 && done.1.contains("No such file"), "{done:?}");
    // A link is replaced, not followed.
    let done = into(&rig, "f", "/link", file("x", 3), b"new").await;
    assert_eq!(done, (0, String::new()));
    assert_eq!(fs::read_to_string(root.join("link")).unwrap(), "new");
    let secret = fs::read_to_string(outside.join("secret")).unwrap();
    assert_eq!(secret, "the machine's");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
}

#[tokio::test]
async fn what_is_no_file_is_said() {
    let rig = Rig::start().await;
    let root = staying(&rig).await;
    nix::unistd::mkfifo(&root.join("fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
    for (id, path, words) in [
        ("a", "/tmp", "is a directory"),
        // Nobody writes to it, and nobody waits for that.
        ("b", "/fifo", "no regular file"),
        ("c", "/dev/null", "no regular file"),
        ("d", "/nothing", "No such file"),
    ] {
        let said = out(&rig, id, path).await.unwrap_err();
        assert!(said.contains(words), "{path}: {said}");
    }
    fs::create_dir(root.join("tmp/x")).unwrap();
    let entries = || fs::read_dir(root.join("tmp")).unwrap().count();
    let before = entries();
    for (id, path, size, words) in [
        ("e", "/tmp", 1, "is a directory"),
        ("f", "/no/where", 1, "No such file"),
        ("g", "/tmp/none/", 1, "No such file"),
        ("h", "/sys/kernel/x", 1, "create a file beside"),
        // Less came than was said.
        ("i", "/tmp/short", 5, "1 of 5 bytes"),
    ] {
        let (status, said) = into(&rig, id, path, file("x", size), b"x").await;
        assert!(
            status == 1 && said.contains(words),
            "{path}: {status} {said}"
        );
    }
    // Nothing half done is left.
    assert_eq!(entries(), before);
    // More than was said is not taken.
    let done = into(&rig, "j", "/tmp/exact", file("x", 2), b"12345").await;
    assert_eq!(done.0, 0, "{done:?}");
    assert_eq!(fs::read_to_string(root.join("tmp/exact")).unwrap(), "12");
    let wrong = copy(&rig, "k", "relative", None).await.map(drop);
    assert_eq!(status(wrong).0, Code::INVALID_ARGUMENT);
}

#[tokio::test]
async fn a_container_that_uses_user_ids_of_its_own_gets_them() {
    let rig = Rig::start().await;
    let mut spec = rig.spec("c", &["sleep", "1000"]);
    let root = std::path::PathBuf::from(&spec.root.path);
    for directory in [rig.directory.path(), &root] {
        fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let ids = bulkhead_agent_protocol::oci::IdMapping {
        container_id: 0,
        host_id: 200_000,
        size: 1000,
        ..Default::default()
    };
    let linux = spec.linux.mut_or_insert_default();
    linux
        .namespaces
        .push(bulkhead_agent_protocol::oci::Namespace {
            type_: "user".into(),
            ..Default::default()
        });
    linux.uid_mappings.push(ids.clone());
    linux.gid_mappings.push(ids);
    own(&root, 200_000);
    rig.create("c", spec).await.unwrap();
    rig.start_container("c").await.unwrap();
    let done = into(&rig, "in", "/tmp/new", file("x", 4), b"mine").await;
    assert_eq!(done, (0, String::new()));
    assert_eq!(fs::metadata(root.join("tmp/new")).unwrap().uid(), 200_007);
    assert_eq!(
        out(&rig, "out", "/tmp/new").await.unwrap(),
        (0o640, 7, b"mine".to_vec())
    );
}

/// Gives a directory and what is in it to a user.
fn own(path: &Path, uid: u32) {
    std::os::unix::fs::lchown(path, Some(uid), Some(uid)).unwrap();
    if path.is_dir() && !path.is_symlink() {
        for entry in fs::read_dir(path).unwrap() {
            own(&entry.unwrap().path(), uid);
        }
    }
}
