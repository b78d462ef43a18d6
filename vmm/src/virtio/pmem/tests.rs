// SPDX-License-Identifier: Apache-2.0

use super::Pmem;
use crate::virtio::{
    device::VirtioDevice,
    testing::{Driver, READ_ONLY, READ_WRITE},
};

#[test]
fn flush_is_answered_and_nonsense_is_an_error() {
    let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
    let mut driver = Driver::new(Pmem::new("image", 0x1_0000_0000, 2 << 20, Some(file)));
    for (request, answer) in [(0_u32, 0_u32), (9, 1)] {
        let ask = driver.buffer(4);
        let reply = driver.buffer(4);
        driver.write(ask, &request.to_le_bytes());
        driver.queue(0, &[(ask, 4, READ_ONLY), (reply, 4, READ_WRITE)]);
        driver.kick(0);
        assert_eq!(driver.used(0), [4]);
        assert_eq!(driver.read(reply, 4), answer.to_le_bytes());
    }
    let ask = driver.buffer(4);
    driver.queue(0, &[(ask, 4, READ_ONLY)]);
    driver.kick(0);
    assert!(driver.broken());
}

#[test]
fn the_window_is_told() {
    let pmem = Pmem::new("image", 0x1_4000_0000, 4 << 20, None);
    let mut data = [0; 24];
    pmem.read_config(0, &mut data);
    assert_eq!(data[..8], 0x1_4000_0000_u64.to_le_bytes());
    assert_eq!(data[8..16], (4_u64 << 20).to_le_bytes());
    assert_eq!(data[16..], [0; 8]);
}
