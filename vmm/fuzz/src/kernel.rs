// SPDX-License-Identifier: Apache-2.0
//! Kernel images: any bytes in place of an ELF file or a bzImage, with any
//! command line, and a ramdisk or none. Behind the image, from the end: a byte
//! that says which ramdisk, the length of the command line, and the line.
#![no_main]

use std::{
    fs::File,
    io::{Seek, Write},
};

use bulkhead_vmm::{
    arch::x86_64::{boot, image::Image, layout},
    memory,
};
use bulkhead_vmm_api::Pages;
use libfuzzer_sys::fuzz_target;
use vmm_sys_util::tempfile::TempFile;

const MEMORY: u64 = 32 << 20;
/// Sizes of ramdisks; none.
const RAMDISKS: [Option<u64>; 8] = [
    None,
    Some(0),
    Some(1),
    Some(4097),
    Some(1 << 20),
    Some(MEMORY - (1 << 20) - 8192),
    Some(MEMORY),
    Some(u64::MAX >> 1),
];

fn file(bytes: &[u8]) -> File {
    let mut file = TempFile::new_in("/dev/shm".as_ref())
        .expect("a file")
        .into_file();
    file.write_all(bytes).expect("room");
    file.rewind().expect("a file");
    file
}

fuzz_target!(|data: &[u8]| {
    let [rest @ .., length, ramdisk] = data else {
        return;
    };
    let (image, line) = rest.split_at(rest.len().saturating_sub((*length).into()));
    let line = String::from_utf8_lossy(line);
    // Some that are too long.
    let line = match ramdisk & 8 {
        0 => line.into_owned(),
        _ => line.repeat(16),
    };
    let kernel = file(image);
    let mut ramdisk = RAMDISKS[usize::from(ramdisk % 8)].map(|size| {
        let file = file(&[]);
        file.set_len(size).expect("a sparse file");
        file
    });
    let mut kernel = Image::new(&kernel);
    let _ = boot::dense(MEMORY, &mut kernel, ramdisk.as_ref());
    let memory = memory::allocate(MEMORY, Pages::Small).expect("memory");
    let loaded = boot::load(&memory, MEMORY, &mut kernel, &line, ramdisk.as_mut());
    let Ok(entry) = loaded else { return };
    if let boot::Entry::Linux(entry) = entry {
        assert!(u64::from(entry) < MEMORY, "entered where it was loaded");
    }
    assert!(line.len() < layout::CMDLINE_SIZE, "a line without end");
    assert!(!line.contains(['\0', '\n']), "a line of several");
    if let Some(ramdisk) = ramdisk {
        let size = ramdisk.metadata().expect("a file").len();
        assert!(size < MEMORY, "a ramdisk larger than memory");
    }
});
