// SPDX-License-Identifier: Apache-2.0
//! The memory file: the guest's memory, regions one after the other, with
//! holes for what was never touched or is zero.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::FileExt,
};

use vm_memory::{GuestMemory, GuestMemoryMmap, GuestMemoryRegion};

const PAGE: usize = 4096;
/// Pages looked at in one go.
const BATCH: usize = 512;
/// Bits of an entry of `/proc/self/pagemap`: in memory, or swapped out.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;

/// Opens what says which pages of this process exist.
///
/// # Errors
/// No /proc.
pub fn open_pagemap() -> io::Result<File> {
    File::open("/proc/self/pagemap")
}

/// Writes all of `memory`; nothing may change it meanwhile. Returns how many
/// bytes are not holes.
///
/// # Errors
/// The file cannot be written.
pub fn write(memory: &GuestMemoryMmap, mut pagemap: &File, file: &File) -> io::Result<u64> {
    file.set_len(0)?;
    let size: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
    file.set_len(size)?;
    let mut base = 0;
    let mut written = 0;
    for region in memory.iter() {
        // What a clone has not touched is its template's, not zero.
        let from_file = region.file_offset().is_some();
        let address = region.as_ptr() as usize;
        let length = region.len() as usize;
        let mut batch = vec![0_u8; BATCH * 8];
        let mut at = 0;
        while at < length {
            let pages = ((length - at) / PAGE).min(BATCH);
            let entries = &mut batch[..pages * 8];
            pagemap.seek(SeekFrom::Start(((address + at) / PAGE * 8) as u64))?;
            pagemap.read_exact(entries)?;
            // SAFETY: the range is a part of this region's mapping, which
            // `memory` keeps; the machine is paused, so nothing writes it.
            let bytes = unsafe {
                std::slice::from_raw_parts(region.as_ptr().add(at).cast_const(), pages * PAGE)
            };
            written += write_runs(file, base + at as u64, bytes, |page| {
                let mut entry = [0; 8];
                entry.copy_from_slice(&entries[page * 8..page * 8 + 8]);
                from_file || u64::from_ne_bytes(entry) & (PRESENT | SWAPPED) != 0
            })?;
            at += pages * PAGE;
        }
        base += length as u64;
    }
    Ok(written)
}

/// Writes the pages of `bytes` that are touched and not zero, neighbours
/// together.
fn write_runs(
    file: &File,
    offset: u64,
    bytes: &[u8],
    touched: impl Fn(usize) -> bool,
) -> io::Result<u64> {
    let mut written = 0;
    let mut start = None;
    let pages = bytes.len() / PAGE;
    for page in 0..=pages {
        let data =
            page < pages && touched(page) && !is_zero(&bytes[page * PAGE..(page + 1) * PAGE]);
        match (data, start) {
            (true, None) => start = Some(page),
            (false, Some(first)) => {
                let run = &bytes[first * PAGE..page * PAGE];
                file.write_all_at(run, offset + (first * PAGE) as u64)?;
                written += run.len() as u64;
                start = None;
            }
            _ => {}
        }
    }
    Ok(written)
}

fn is_zero(page: &[u8]) -> bool {
    // SAFETY: any bytes are a u128.
    let (before, words, after) = unsafe { page.align_to::<u128>() };
    before.iter().chain(after).all(|byte| *byte == 0) && words.iter().all(|word| *word == 0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use bulkhead_vmm_api::Pages;
    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::tempfile::TempFile;

    use super::*;
    use crate::memory;

    #[test]
    fn only_what_was_written_takes_space_and_all_of_it_comes_back() {
        let size = 64 << 20;
        let guest = memory::allocate(size, Pages::Small).unwrap();
        let marks = [
            (0_u64, 1_u8),
            (5 << 20, 2),
            ((5 << 20) + 4096, 3),
            (size - 1, 4),
        ];
        for (at, value) in marks {
            guest.write_obj(value, GuestAddress(at)).unwrap();
        }
        // Touched, and zero.
        guest.write_obj(0_u8, GuestAddress(9 << 20)).unwrap();
        let file = TempFile::new().unwrap();
        let pagemap = open_pagemap().unwrap();
        let written = write(&guest, &pagemap, file.as_file()).unwrap();
        assert_eq!(written, 4 * 4096);
        let found = file.as_file().metadata().unwrap();
        assert_eq!(found.len(), size);
        assert!(found.blocks() * 512 < 1 << 20, "{} blocks", found.blocks());

        let clone = memory::map_snapshot(size, 0, file.as_file()).unwrap();
        for (at, value) in marks {
            assert_eq!(clone.read_obj::<u8>(GuestAddress(at)).unwrap(), value);
        }
        assert_eq!(clone.read_obj::<u8>(GuestAddress(9 << 20)).unwrap(), 0);
        // What a clone writes stays its own.
        clone.write_obj(9_u8, GuestAddress(0)).unwrap();
        let other = memory::map_snapshot(size, 0, file.as_file()).unwrap();
        assert_eq!(other.read_obj::<u8>(GuestAddress(0)).unwrap(), 1);
        // A clone's own snapshot has what it never touched.
        let second = TempFile::new().unwrap();
        assert_eq!(write(&clone, &pagemap, second.as_file()).unwrap(), 4 * 4096);
        let grandchild = memory::map_snapshot(size, 0, second.as_file()).unwrap();
        for (at, value) in [(0, 9)].iter().chain(&marks[1..]) {
            assert_eq!(
                grandchild.read_obj::<u8>(GuestAddress(*at)).unwrap(),
                *value
            );
        }
    }

    #[test]
    fn a_file_of_another_size_is_refused() {
        let file = TempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let error = memory::map_snapshot(1 << 20, 0, file.as_file()).unwrap_err();
        assert!(error.to_string().contains("4096"), "{error}");
    }
}
