// SPDX-License-Identifier: Apache-2.0
use super::*;

use std::os::unix::fs::MetadataExt;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

fn entry(path: &str, mode: u32, data: &str, identity: u64) -> MirrorEntry {
    MirrorEntry {
        path: path.into(),
        mode,
        data: data.into(),
        identity,
        modified_ns: 1_000_000_000,
        ..Default::default()
    }
}

const DIRECTORY: u32 = libc::S_IFDIR | 0o755;
const FILE: u32 = libc::S_IFREG | 0o644;
const LINK: u32 = libc::S_IFLNK | 0o777;

/// As kubelet lays a ConfigMap out.
fn config_map(version: &str, keys: &[(&str, &str)]) -> Vec<MirrorEntry> {
    let mut entries = vec![
        entry("", DIRECTORY, "", 1),
        entry(version, DIRECTORY, "", 2),
        entry("..data", LINK, version, version.len() as u64),
    ];
    for (key, value) in keys {
        entries.push(entry(&format!("{version}/{key}"), FILE, value, 9));
        entries.push(entry(key, LINK, &format!("..data/{key}"), 10));
    }
    entries
}

fn named(entries: Vec<MirrorEntry>) -> Wanted {
    Wanted {
        name: "0".into(),
        entries,
        ..Default::default()
    }
}

fn events(inotify: &Inotify) -> Vec<(String, &'static str)> {
    let list = match inotify.read_events() {
        Err(Errno::EAGAIN) => Vec::new(),
        other => other.unwrap(),
    };
    list.into_iter()
        .filter_map(|event| {
            let kind = [
                (AddWatchFlags::IN_CREATE, "create"),
                (AddWatchFlags::IN_MOVED_TO, "to"),
                (AddWatchFlags::IN_DELETE, "delete"),
                (AddWatchFlags::IN_MODIFY, "modify"),
            ]
            .into_iter()
            .find(|(flag, _)| event.mask.contains(*flag))?
            .1;
            let name = event.name.unwrap_or_default();
            Some((name.to_string_lossy().into_owned(), kind))
        })
        .collect()
}

fn watch(path: &Path) -> Inotify {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).unwrap();
    inotify
        .add_watch(path, AddWatchFlags::IN_ALL_EVENTS)
        .unwrap();
    inotify
}

#[test]
fn an_update_looks_as_kubelets() {
    let base = tempfile::tempdir().unwrap();
    let directory = base.path().join("c");
    let first = config_map("..1", &[("a", "old"), ("gone", "x")]);
    let mut mirrors = Mirrors::make(&directory, &[named(first)]).unwrap();
    let root = directory.join("0");
    assert_eq!(fs::read_to_string(root.join("a")).unwrap(), "old");
    let inotify = watch(&root);
    let second = config_map("..2", &[("a", "new"), ("b", "more")]);
    mirrors.update(&named(second.clone())).unwrap();
    let seen = events(&inotify);
    let wanted = [
        ("..2", "create"),
        ("..data_tmp", "create"),
        ("..data", "to"),
        ("b", "create"),
        ("gone", "delete"),
        ("..1", "delete"),
    ];
    assert_eq!(seen, wanted.map(|(name, kind)| (name.to_owned(), kind)));
    assert_eq!(fs::read_to_string(root.join("a")).unwrap(), "new");
    assert_eq!(fs::read_to_string(root.join("b")).unwrap(), "more");
    assert!(!root.join("..1").exists());
    // Nothing has changed: nobody is told.
    mirrors.update(&named(second)).unwrap();
    assert_eq!(events(&inotify), []);
    drop(mirrors);
    assert!(!directory.exists());
}

#[test]
fn a_file_is_written_to_or_replaced_as_on_the_host() {
    let base = tempfile::tempdir().unwrap();
    let directory = base.path().join("c");
    let with = |data: &str, identity: u64, mode: u32| {
        let file = entry("f", mode, data, identity);
        named(vec![entry("", DIRECTORY, "", 1), file])
    };
    let mut mirrors = Mirrors::make(&directory, &[with("long text", 5, FILE)]).unwrap();
    let root = directory.join("0");
    let (path, inotify) = (root.join("f"), watch(&root));
    let before = fs::metadata(&path).unwrap();
    assert_eq!(before.mtime(), 1);
    mirrors.update(&with("text", 5, FILE)).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "text");
    assert_eq!(fs::metadata(&path).unwrap().ino(), before.ino());
    assert_eq!(events(&inotify)[0], ("f".into(), "modify"));
    mirrors.update(&with("else", 6, FILE)).unwrap();
    assert_ne!(fs::metadata(&path).unwrap().ino(), before.ino());
    assert!(events(&inotify).contains(&("f".into(), "to")));
    let private = libc::S_IFREG | 0o600;
    mirrors.update(&with("else", 6, private)).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode(), private);
    // A directory where the file was.
    mirrors.update(&with("", 7, DIRECTORY)).unwrap();
    assert!(path.is_dir());
}

#[test]
fn what_a_container_puts_in_the_way_leads_nowhere() {
    let base = tempfile::tempdir().unwrap();
    let directory = base.path().join("c");
    let with = |data: &str| {
        named(vec![
            entry("", DIRECTORY, "", 1),
            entry("d", DIRECTORY, "", 2),
            entry("d/f", FILE, data, 3),
        ])
    };
    let mut mirrors = Mirrors::make(&directory, &[with("one")]).unwrap();
    let outside = base.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("f"), "precious").unwrap();
    let (inside, link) = (directory.join("0/d"), directory.join("0/d/f"));
    fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink(outside.join("f"), &link).unwrap();
    assert!(mirrors.update(&with("two")).is_err());
    fs::remove_dir_all(&inside).unwrap();
    std::os::unix::fs::symlink(&outside, &inside).unwrap();
    assert!(mirrors.update(&with("three")).is_err());
    assert_eq!(fs::read_to_string(outside.join("f")).unwrap(), "precious");
}

#[test]
fn what_is_no_tree_is_named() {
    let root = || entry("", DIRECTORY, "", 1);
    for bad in [
        vec![entry("", FILE, "", 1)],
        vec![root(), entry("../x", FILE, "", 2)],
        vec![root(), entry("/x", FILE, "", 2)],
        vec![root(), entry("a/./x", FILE, "", 2)],
        vec![root(), entry("d/x", FILE, "", 2)],
        vec![root(), entry("l", LINK, "/", 2), entry("l/x", FILE, "", 2)],
        vec![root(), root()],
        vec![root(), entry("p", libc::S_IFIFO | 0o600, "", 2)],
    ] {
        let error = check(&bad).unwrap_err().to_string();
        assert!(error.starts_with("mirrors.entries: "), "{error}");
    }
}
