// SPDX-License-Identifier: Apache-2.0
//! Files in the DAX window, as the kernel tells what is mapped there.

use std::sync::Arc;

use vm_memory::MmapRegion;

use super::*;

const SETUPMAPPING: u32 = 48;
const REMOVEMAPPING: u32 = 49;
/// Flags of the former.
const TO_READ: u64 = 0;
const TO_WRITE: u64 = 1;

const PIECE: u64 = 2 << 20;
/// Four pieces, where a guest may have them.
const SIZE: u64 = 4 * PIECE;
const ADDRESS: u64 = 5 << 30;

fn guest() -> (Guest, Arc<MmapRegion>) {
    let mapping = Window::reserve(SIZE).unwrap();
    let window = Window::new(ADDRESS, Arc::clone(&mapping));
    (Guest::with_window(Some(window)), mapping)
}

fn numbers(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|n| n.to_le_bytes()).collect()
}

impl Guest {
    fn map(&mut self, inode: u64, from: u64, length: u64, flags: u64, to: u64) -> Result<(), i32> {
        let body = numbers(&[u64::MAX, from, length, flags, to]);
        self.call(SETUPMAPPING, inode, &body, 0).map(drop)
    }

    fn unmap(&mut self, inode: u64, at: u64, length: u64) -> Result<(), i32> {
        let body = [&[1, 0, 0, 0][..], &numbers(&[at, length])].concat();
        self.call(REMOVEMAPPING, inode, &body, 0).map(drop)
    }
}

/// What the kernel says of a place in the window: access, and whether it is of a
/// file.
fn there(mapping: &MmapRegion, offset: u64) -> (String, bool) {
    let at = mapping.as_ptr() as u64 + offset;
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let of = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        let access = fields.next()?.to_owned();
        let inside = (number(start)?..number(end)?).contains(&at);
        inside.then(|| (access, fields.nth(3).is_some()))
    };
    maps.lines().find_map(of).unwrap()
}

fn byte(mapping: &MmapRegion, offset: u64) -> u8 {
    let (access, _) = there(mapping, offset);
    assert!(access.starts_with('r'), "{access}");
    // SAFETY: the kernel says that it can be read, and the file has that much.
    unsafe { mapping.as_ptr().add(offset as usize).read_volatile() }
}

#[test]
fn a_guest_has_the_files_themselves() {
    let (mut guest, mapping) = guest();
    let file = guest.inode("file");
    let nothing = ("---p".to_owned(), false);
    assert_eq!(there(&mapping, 0), nothing);
    guest.map(file, 0, PIECE, TO_READ, PIECE).unwrap();
    assert_eq!(there(&mapping, PIECE), ("r--s".to_owned(), true));
    assert_eq!(there(&mapping, 0), nothing);
    assert_eq!(there(&mapping, 2 * PIECE), nothing);
    assert_eq!(byte(&mapping, PIECE + 3), b'3');
    // What the host writes is there at once.
    fs::write(guest.path("file"), b"abcdefghij").unwrap();
    assert_eq!(byte(&mapping, PIECE + 3), b'd');
    // Another piece of it, to be written, and another's place.
    let large = File::options().write(true).open(guest.path("file"));
    large.unwrap().set_len(3 * PIECE).unwrap();
    guest.map(file, 2 * PIECE, PIECE, TO_WRITE, 0).unwrap();
    assert_eq!(there(&mapping, 0), ("rw-s".to_owned(), true));
    // SAFETY: the kernel says that it can be written, and the file has that much.
    unsafe { mapping.as_ptr().write_volatile(b'!') };
    assert_eq!(fs::read(guest.path("file")).unwrap()[2 << 21], b'!');
    assert_eq!(guest.descriptors("file"), 1);
    guest.unmap(file, PIECE, PIECE).unwrap();
    assert_eq!(there(&mapping, PIECE), nothing);
    assert_eq!(byte(&mapping, 0), b'!');
    // A reset takes out what is left.
    guest.driver.restart();
    for piece in 0..4 {
        assert_eq!(there(&mapping, piece * PIECE), nothing);
    }
}

#[test]
fn what_does_not_fit_the_window_is_refused() {
    let (mut guest, mapping) = guest();
    let file = guest.inode("file");
    for (from, length, to) in [
        (0, PIECE, SIZE),
        (0, PIECE, u64::MAX - PIECE + 1),
        (0, SIZE + PIECE, 0),
        (0, u64::MAX, 0),
        (0, 0, 0),
        (0, 4096, 0),
        (0, PIECE, 4096),
        (4096, PIECE, 0),
        (u64::MAX - PIECE + 1, PIECE, 0),
    ] {
        let refused = guest.map(file, from, length, TO_WRITE, to);
        assert_eq!(refused, Err(libc::EINVAL), "{from} {length} {to}");
        if from == 0 {
            assert_eq!(guest.unmap(file, to, length), Err(libc::EINVAL));
        }
    }
    assert_eq!(guest.map(999, 0, PIECE, TO_READ, 0), Err(libc::EBADF));
    // No directory, and nothing outside.
    assert!(guest.map(ROOT, 0, PIECE, TO_READ, 0).is_err());
    // More requests than there are bytes for.
    let many = u32::MAX.to_le_bytes();
    assert!(guest.call(REMOVEMAPPING, file, &many, 0).is_err());
    assert_eq!(there(&mapping, 0), ("---p".to_owned(), false));
    assert!(!guest.driver.broken());
}

#[test]
fn without_a_window_nothing_is_mapped() {
    let mut guest = Guest::new();
    let file = guest.inode("file");
    assert_eq!(guest.map(file, 0, PIECE, TO_READ, 0), Err(libc::EINVAL));
    assert_eq!(guest.unmap(file, 0, PIECE), Err(libc::EINVAL));
}

/// A device for a directory of files, with a window of so many pieces.
fn device(address: u64, pieces: u64) -> Fs {
    let directory = TempDir::new().unwrap();
    let device = Fs::new(&config("shared"), open(directory.as_path())).unwrap();
    let size = pieces * PIECE;
    device.with_window((size > 0).then(|| Window::new(address, Window::reserve(size).unwrap())))
}

#[test]
fn a_snapshots_window_must_lie_where_it_was() {
    let saved = device(ADDRESS, 4).save().unwrap();
    assert_eq!(Fs::window_in(&saved), Some((ADDRESS, SIZE)));
    device(ADDRESS, 4).restore(&saved).unwrap();
    for (address, pieces) in [(ADDRESS, 3), (ADDRESS + SIZE, 4), (0, 0)] {
        let error = device(address, pieces).restore(&saved).unwrap_err();
        assert!(error.to_string().contains("dax_mib"), "{error}");
    }
    // As of those that had none.
    let none = device(0, 0).save().unwrap();
    assert_eq!(none, b"");
    assert_eq!(Fs::window_in(&none), None);
    assert!(device(ADDRESS, 4).restore(&none).is_err());
}
