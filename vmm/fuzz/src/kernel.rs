// SPDX-License-Identifier: Apache-2.0
//! Kernel images: any bytes in place of an ELF file or a bzImage.
#![no_main]

use std::io::{Seek, Write};

use bulkhead_vmm::{arch::x86_64::boot, memory};
use bulkhead_vmm_api::Pages;
use libfuzzer_sys::fuzz_target;
use vmm_sys_util::tempfile::TempFile;

const MEMORY: u64 = 32 << 20;

fuzz_target!(|data: &[u8]| {
    let mut file = TempFile::new().expect("a file").into_file();
    file.write_all(data).expect("room");
    file.rewind().expect("a file");
    let _ = boot::extent(&file);
    let memory = memory::allocate(MEMORY, Pages::Small).expect("memory");
    if let Ok(boot::Entry::Linux(entry)) = boot::load(&memory, MEMORY, &file, "quiet", None) {
        assert!(u64::from(entry) < MEMORY, "entered where it was loaded");
    }
});
