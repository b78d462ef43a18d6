// SPDX-License-Identifier: Apache-2.0
//! A guest's requests of a disk: any descriptors, rings and data.
#![no_main]

mod guest;

use bulkhead_vmm::virtio::blk::Blk;
use bulkhead_vmm_api::BlkConfig;
use libfuzzer_sys::fuzz_target;
use vmm_sys_util::tempfile::TempFile;

const SIZE: u64 = 64 << 10;

fuzz_target!(|data: &[u8]| {
    let Some((first, rest)) = data.split_first() else {
        return;
    };
    let file = TempFile::new().expect("a file").into_file();
    file.set_len(SIZE).expect("its size");
    let ours = file.try_clone().expect("a descriptor");
    let config = BlkConfig {
        id: "fuzz".into(),
        read_only: first & 1 != 0,
        queues: Some(2),
        ..BlkConfig::default()
    };
    let mut device = Blk::new(&config, file).expect("a disk");
    guest::drive(&mut device, rest);
    let now = ours.metadata().expect("metadata");
    assert_eq!(now.len(), SIZE, "the guest changed the disk's size");
});
