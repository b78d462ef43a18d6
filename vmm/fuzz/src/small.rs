// SPDX-License-Identifier: Apache-2.0
//! A guest's requests of the devices that know little: entropy, the balloon and
//! persistent memory.
#![no_main]

mod guest;

use std::path::Path;

use bulkhead_vmm::virtio::{balloon::Balloon, pmem::Pmem, rng::Rng};
use bulkhead_vmm_api::BalloonConfig;
use libfuzzer_sys::fuzz_target;
use vmm_sys_util::tempfile::TempFile;

fuzz_target!(|data: &[u8]| {
    let Some((first, rest)) = data.split_first() else {
        return;
    };
    match first % 4 {
        0 => guest::drive(&mut Rng::new(), rest),
        1 | 2 => {
            let config = BalloonConfig {
                deflate_on_oom: first & 4 != 0,
                free_page_reporting: first & 8 != 0,
            };
            let mut device = Balloon::new(&config);
            device.set_target(u32::from(first >> 4));
            guest::drive(&mut device, rest);
            let status = device.status();
            assert_eq!(status.target_mib, u32::from(first >> 4));
        }
        _ => {
            // Where nothing waits for a disk.
            let file = TempFile::new_in(Path::new("/dev/shm")).expect("a file");
            let flush = (first & 4 != 0).then(|| file.into_file());
            guest::drive(&mut Pmem::new("p", 1 << 32, 2 << 20, flush), rest);
        }
    }
});
