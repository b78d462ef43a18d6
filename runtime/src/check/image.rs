// SPDX-License-Identifier: Apache-2.0
//! Whether the guest's kernel and image are there, and go with this runtime.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::FileExt,
    path::Path,
};

use super::Verdict;

/// A virtio-pmem window is made of 2 MiB pages.
const IMAGE_UNIT: u64 = 2 << 20;

/// EROFS super block: offset in the image, and its magic.
const EROFS_SUPER_OFFSET: u64 = 1024;
const EROFS_MAGIC: u32 = 0xe0f5_e1e2;

/// XEN_ELFNOTE_PHYS32_ENTRY: the PVH entry point.
const PVH_NOTE: u32 = 18;

/// Offset of a bzImage's magic number, and of the version of its boot protocol.
const BZIMAGE_MAGIC_OFFSET: u64 = 0x202;
const BZIMAGE_MAGIC: &[u8] = b"HdrS";
/// The oldest version that says all that the VMM must know.
const BZIMAGE_VERSION: u16 = 0x020c;

/// An ELF64 kernel with a PVH note, or a bzImage.
pub fn kernel(path: &Path) -> Verdict {
    let remedy = "build it with `make build`, or set hypervisor.kernel in the configuration";
    let protocol = || {
        Ok(match (has_pvh_note(path)?, is_bzimage(path)?) {
            (true, _) => Some("PVH"),
            (_, true) => Some("bzImage"),
            _ => None,
        })
    };
    let found: io::Result<_> = protocol();
    match found {
        Ok(Some(protocol)) => Verdict::Good(format!("{} ({protocol})", path.display())),
        Ok(None) => Verdict::bad(
            format!(
                "{} is neither an ELF kernel with a PVH entry nor a bzImage",
                path.display()
            ),
            "use a vmlinux built with CONFIG_PVH=y, or a bzImage of Linux 3.8 or newer",
        ),
        Err(error) => Verdict::bad(format!("{}: {error}", path.display()), remedy),
    }
}

/// An EROFS image of whole 2 MiB pages.
pub fn image(path: &Path) -> Verdict {
    let remedy = "build it with `make build`, or set hypervisor.image in the configuration";
    let read = || -> io::Result<(u32, u64)> {
        let file = File::open(path)?;
        let mut magic = [0; 4];
        file.read_exact_at(&mut magic, EROFS_SUPER_OFFSET)?;
        Ok((u32::from_le_bytes(magic), file.metadata()?.len()))
    };
    match read() {
        Err(error) => Verdict::bad(format!("{}: {error}", path.display()), remedy),
        Ok((EROFS_MAGIC, size)) if size % IMAGE_UNIT == 0 => {
            Verdict::Good(format!("{} (EROFS)", path.display()))
        }
        Ok((EROFS_MAGIC, size)) => Verdict::bad(
            format!("{} has {size} bytes, not whole 2 MiB pages", path.display()),
            remedy,
        ),
        Ok(_) => Verdict::bad(format!("{} is not an EROFS image", path.display()), remedy),
    }
}

/// Whether it is a bzImage that the VMM boots.
fn is_bzimage(path: &Path) -> io::Result<bool> {
    let mut header = [0; 6];
    if File::open(path)?
        .read_exact_at(&mut header, BZIMAGE_MAGIC_OFFSET)
        .is_err()
    {
        return Ok(false);
    }
    let version = u16::from_le_bytes([header[4], header[5]]);
    Ok(header.starts_with(BZIMAGE_MAGIC) && version >= BZIMAGE_VERSION)
}

/// Looks through the program headers' notes (ELF64, little-endian).
fn has_pvh_note(path: &Path) -> io::Result<bool> {
    let mut file = File::open(path)?;
    let mut header = [0_u8; 64];
    if file.read_exact(&mut header).is_err() || &header[..6] != b"\x7fELF\x02\x01" {
        return Ok(false);
    }
    let word = |bytes: &[u8], at: usize| -> u64 {
        let mut value = [0; 8];
        value.copy_from_slice(&bytes[at..at + 8]);
        u64::from_le_bytes(value)
    };
    let table = word(&header, 32);
    let entry_size = u16::from_le_bytes([header[54], header[55]]);
    let entries = u16::from_le_bytes([header[56], header[57]]);
    if entry_size != 56 {
        return Ok(false);
    }
    const PT_NOTE: u32 = 4;
    for index in 0..u64::from(entries) {
        let mut entry = [0; 56];
        file.seek(SeekFrom::Start(table.saturating_add(index * 56)))?;
        file.read_exact(&mut entry)?;
        if u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]) != PT_NOTE {
            continue;
        }
        // Notes are small; what a broken header claims beyond is not read.
        let size = word(&entry, 32).min(64 * 1024);
        let mut notes = Vec::new();
        file.seek(SeekFrom::Start(word(&entry, 8)))?;
        file.by_ref().take(size).read_to_end(&mut notes)?;
        if contains_note(&notes, b"Xen\0", PVH_NOTE) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn contains_note(mut notes: &[u8], owner: &[u8], kind: u32) -> bool {
    while notes.len() >= 12 {
        let word = |at: usize| {
            u32::from_le_bytes([notes[at], notes[at + 1], notes[at + 2], notes[at + 3]])
        };
        let (name_size, content_size, note_kind) = (word(0) as usize, word(4) as usize, word(8));
        let name_end = 12_usize.saturating_add(name_size);
        if notes.get(12..name_end) == Some(owner) && note_kind == kind {
            return true;
        }
        let next = 12_usize
            .saturating_add(name_size.next_multiple_of(4))
            .saturating_add(content_size.next_multiple_of(4));
        notes = notes.get(next..).unwrap_or_default();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bzimage_is_told_by_its_header() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kernel");
        let mut image = vec![0; 1024];
        image[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
        std::fs::write(&path, &image).unwrap();
        assert!(matches!(kernel(&path), Verdict::Good(text) if text.ends_with("(bzImage)")));
        // Of protocol 2.6.
        image[0x206] = 6;
        std::fs::write(&path, &image).unwrap();
        assert!(!matches!(kernel(&path), Verdict::Good(_)));
    }

    #[test]
    fn notes_are_found_among_others_and_broken_ones_end_the_search() {
        let mut notes = Vec::new();
        for (owner, kind, content) in [
            (&b"GNU\0"[..], 3_u32, &b"12345"[..]),
            (b"Xen\0", 18, b"\0\0\0\x01"),
        ] {
            notes.extend((owner.len() as u32).to_le_bytes());
            notes.extend((content.len() as u32).to_le_bytes());
            notes.extend(kind.to_le_bytes());
            notes.extend(owner);
            notes.extend(content);
            notes.resize(notes.len().next_multiple_of(4), 0);
        }
        assert!(contains_note(&notes, b"Xen\0", 18));
        assert!(!contains_note(&notes, b"Xen\0", 19));
        notes[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(!contains_note(&notes, b"Xen\0", 18));
    }
}
