// SPDX-License-Identifier: Apache-2.0
//! Copies of the host's directories, as those who watch them see it.

mod common;

use std::path::Path;

use bulkhead_agent_protocol::agent;
use common::*;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::time::timeout;
use ttrpc::Code;

/// As kubelet lays out a volume with one key.
fn volume(version: &str, value: &str) -> agent::Mirror {
    let entry = |path: String, mode: u32, data: &str, identity| agent::MirrorEntry {
        path,
        mode,
        data: data.into(),
        identity,
        uid: 1000,
        ..Default::default()
    };
    let (file, link) = (libc::S_IFREG | 0o640, libc::S_IFLNK | 0o777);
    agent::Mirror {
        name: "3".into(),
        entries: vec![
            entry(String::new(), libc::S_IFDIR | 0o755, "", 1),
            entry(version.into(), libc::S_IFDIR | 0o755, "", 2),
            entry(format!("{version}/key"), file, value, 3),
            entry("..data".into(), link, version, 4),
            entry("key".into(), link, "..data/key", 5),
        ],
        ..Default::default()
    }
}

/// Prints the events in a directory (inotify(7)): mask and name. perl of this
/// machine, for busybox has no such program everywhere.
const WATCH: &str = r#"
    $| = 1;
    $path = "/config";
    $fd = syscall(294, 0);
    syscall(254, $fd, $path, 0x3c0) > 0 or die "watch: $!";
    open(F, "<&=", $fd);
    print "watching
";
    while (sysread(F, $b, 4096)) {
        while (length $b) {
            ($wd, $mask, $cookie, $length) = unpack("iIII", $b);
            ($name) = unpack("Z*", substr($b, 16, $length));
            printf("%x %s
", $mask & 0xfff, $name);
            $b = substr($b, 16 + $length);
        }
    }
"#;

#[tokio::test]
async fn a_watcher_in_a_container_sees_the_hosts_changes() {
    let rig = Rig::start().await;
    let script = "cat /config/key; stat -L -c ' %a %u' /config/key; lib=/lib/x86_64-linux-gnu; \
        exec /host$lib/ld-linux-x86-64.so.2 --library-path /host$lib:/host/usr$lib \
        /host/usr/bin/perl -e \"$1\"";
    let mut spec = rig.spec("c", &["sh", "-c", script, "sh", WATCH]);
    spec.mounts
        .push(bind(Path::new("/"), "/host", &["rbind", "ro"]));
    let source = rig.directory.path().join("mirrors/c/3");
    spec.mounts.push(bind(&source, "/config", &["rbind", "ro"]));
    let streams = rig
        .create_with("c", spec, vec![volume("..1", "old")])
        .await
        .unwrap();
    rig.start_container("c").await.unwrap();
    // What goes wrong is said in its place.
    let output = streams.stdout.unwrap().chain(streams.stderr.unwrap());
    let mut lines = BufReader::new(output).lines();
    let mut line = async || {
        let line = timeout(PATIENCE, lines.next_line()).await;
        line.expect("a line in time").unwrap().expect("a line")
    };
    assert_eq!(line().await, "old 640 1000");
    assert_eq!(line().await, "watching");
    let request = |mirror| agent::UpdateMirrorRequest {
        container_id: "c".into(),
        mirror: Some(mirror).into(),
        ..Default::default()
    };
    let update = request(volume("..2", "new"));
    rig.client
        .update_mirror(rig.context(), &update)
        .await
        .unwrap();
    // Made, moved from and to, removed; as kubelet does it.
    for wanted in [
        "100 ..2",
        "100 ..data_tmp",
        "40 ..data_tmp",
        "80 ..data",
        "200 ..1",
    ] {
        assert_eq!(line().await, wanted);
    }
    let read = rig.exec("c", "e", process(&["cat", "/config/key"])).await;
    let outcome = rig.outcome("c", "e", read.unwrap()).await;
    assert_eq!(outcome.stdout, "new");

    let mut other = volume("..3", "x");
    other.name = "4".into();
    let update = request(other);
    let refused = rig.client.update_mirror(rig.context(), &update).await;
    assert_eq!(status(refused.map(drop)).0, Code::NOT_FOUND);
    rig.signal("c", "", 9, true).await.unwrap();
    rig.wait("c", "").await.unwrap();
    rig.delete("c").await.unwrap();
    assert!(!source.exists());
}

#[tokio::test]
async fn a_container_that_is_not_made_leaves_no_copy() {
    let rig = Rig::start().await;
    let mut bad = volume("..1", "x");
    bad.entries[2].path = "../../key".into();
    let spec = rig.spec("c", &["true"]);
    let refused = rig.create_with("c", spec, vec![bad]).await;
    let (code, text) = status(refused.map(drop));
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.contains("mirrors.entries"), "{text}");
    assert!(!rig.directory.path().join("mirrors/c").exists());
}
