// SPDX-License-Identifier: Apache-2.0
//! What the guest knows of the directory, and how much that can be.

use std::collections::BTreeSet;

use super::*;

/// As many files, by names that are numbers.
fn fill(guest: &Guest, count: u32) {
    for number in 0..count {
        fs::write(guest.path(&number.to_string()), b"").unwrap();
    }
}

#[test]
fn a_number_is_never_used_twice() {
    let mut guest = Guest::new();
    let first = guest.inode("file");
    guest.forget(first, 1);
    let second = guest.inode("file");
    assert_ne!(first, second);
    assert_eq!(guest.call(GETATTR, first, &[0; 16], 104), Err(libc::EBADF));
    // Told of twice, and forgotten once, and then more often than it was told.
    assert_eq!(guest.inode("file"), second);
    guest.forget(second, 1);
    assert!(guest.call(GETATTR, second, &[0; 16], 104).is_ok());
    guest.forget(second, 9);
    assert_eq!(guest.call(GETATTR, second, &[0; 16], 104), Err(libc::EBADF));
}

#[test]
fn a_guest_knows_only_so_many_files() {
    let mut guest = Guest::new();
    fill(&guest, 600);
    let mut known = Vec::new();
    let refused = (0..600).find_map(|number| {
        let name = number.to_string();
        match guest.lookup(ROOT, name.as_bytes()) {
            Ok(entry) => {
                known.push(long(&entry, 0));
                None
            }
            Err(error) => Some(error),
        }
    });
    assert_eq!(refused, Some(libc::ENFILE));
    // With the root.
    assert_eq!(known.len(), 511);
    // Nor can one be opened, nor a new one be left open.
    let flags = [0; 8];
    let open = guest.call(OPEN, known[0], &flags, 16);
    assert_eq!(open, Err(libc::ENFILE));
    let before = guest.descriptors("");
    let handle = guest.call(OPENDIR, ROOT, &flags, 16);
    assert_eq!(handle, Err(libc::ENFILE));
    // What it knows can be told again, and where one goes another can come.
    assert_eq!(guest.inode("0"), known[0]);
    guest.forget(known[0], 2);
    assert_eq!(guest.descriptors(""), before - 1);
    assert!(guest.lookup(ROOT, b"599").is_ok());
}

/// Names and, of the listing with attributes, inodes.
fn names(listing: &[u8], prefix: usize) -> (Vec<String>, u64) {
    let (mut names, mut at, mut offset) = (Vec::new(), 0, 0);
    while at < listing.len() {
        let entry = at + prefix;
        let length = word(listing, entry + 16) as usize;
        offset = long(listing, entry + 8);
        names.push(String::from_utf8(listing[entry + 24..][..length].to_vec()).unwrap());
        at = entry + (24 + length).next_multiple_of(8);
    }
    (names, offset)
}

#[test]
fn a_large_directory_is_told_in_parts() {
    let mut guest = Guest::new();
    // More than is read at once, in parts that hold few.
    fill(&guest, 2_000);
    for (opcode, prefix, most) in [(READDIR, 0, 2_000), (READDIRPLUS, ENTRY, 100)] {
        let handle = guest.open(OPENDIR, ROOT, libc::O_DIRECTORY);
        let (mut seen, mut offset) = (BTreeSet::new(), 0_u64);
        while seen.len() < most {
            let mut body = handle.to_le_bytes().to_vec();
            body.extend_from_slice(&offset.to_le_bytes());
            body.extend_from_slice(&4096_u32.to_le_bytes());
            body.resize(40, 0);
            let listing = guest.call(opcode, ROOT, &body, 4096).unwrap();
            let (part, next) = names(&listing, prefix);
            if part.is_empty() {
                break;
            }
            assert!(part.len() > 10);
            for name in part {
                assert!(seen.insert(name.clone()), "{name} twice");
            }
            offset = next;
        }
        assert!(seen.len() >= most, "{}", seen.len());
    }
}

#[test]
fn an_owner_is_set_before_the_mode() {
    if !is_root() {
        println!("SKIPPED: an_owner_is_set_before_the_mode: not root");
        return;
    }
    const MODE_AND_OWNERS: u32 = 1 | 2 | 4;
    let mut guest = Guest::new();
    let inode = guest.inode("file");
    let mut body = MODE_AND_OWNERS.to_le_bytes().to_vec();
    body.resize(68, 0);
    for word in [0o106_755_u32, 0, 1234, 1235, 0] {
        body.extend_from_slice(&word.to_le_bytes());
    }
    guest.call(SETATTR, inode, &body, 104).unwrap();
    let found = fs::metadata(guest.path("file")).unwrap();
    assert_eq!(found.mode() & 0o7777, 0o6755);
    assert_eq!((found.uid(), found.gid()), (1234, 1235));
}

#[test]
fn a_file_is_made_or_found() {
    let mut guest = Guest::new();
    let mut create = |name: &[u8], flags: i32| {
        let mut body = Vec::new();
        for word in [flags as u32, 0o100_600, 0, 0] {
            body.extend_from_slice(&word.to_le_bytes());
        }
        body.extend_from_slice(&[name, b"\0"].concat());
        guest.call(CREATE, ROOT, &body, ENTRY + 16)
    };
    let found = create(b"file", libc::O_CREAT | libc::O_RDWR).unwrap();
    assert_eq!(long(&found, 48), 10);
    let exclusive = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR;
    assert_eq!(create(b"file", exclusive), Err(libc::EEXIST));
    let made = create(b"new", exclusive).unwrap();
    assert_eq!(long(&made, 48), 0);
    for name in [&b".."[..], b"", b"a/b"] {
        assert_eq!(create(name, exclusive), Err(libc::EINVAL));
    }
}
