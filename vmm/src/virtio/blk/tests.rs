// SPDX-License-Identifier: Apache-2.0

use std::{fs::File, io::Write, os::unix::fs::FileExt};

use bulkhead_vmm_api::BlkConfig;
use vmm_sys_util::tempfile::TempFile;

use super::Blk;
use crate::virtio::testing::{Driver, READ_ONLY, READ_WRITE};

fn disk(read_only: bool) -> (Driver<Blk>, File) {
    let mut file = TempFile::new().unwrap().into_file();
    for sector in 0..16_u8 {
        file.write_all(&[sector; 512]).unwrap();
    }
    let config = BlkConfig {
        id: "disk0".into(),
        file: 0,
        read_only,
    };
    let ours = file.try_clone().unwrap();
    (Driver::new(Blk::new(&config, file).unwrap()), ours)
}

/// Status and the bytes written to the guest, less the status.
fn request(driver: &mut Driver<Blk>, kind: u32, sector: u64, data: (u64, u32, u16)) -> (u8, u32) {
    let header = driver.buffer(16);
    let status = driver.buffer(1);
    driver.write(header, &kind.to_le_bytes());
    driver.write(header + 8, &sector.to_le_bytes());
    driver.queue(0, &[(header, 16, READ_ONLY), data, (status, 1, READ_WRITE)]);
    driver.kick(0);
    let used = driver.used(0);
    (driver.read(status, 1)[0], used[0] - 1)
}

#[test]
fn sectors_are_read_and_written() {
    let (mut driver, file) = disk(false);
    let data = driver.buffer(1024);
    assert_eq!(
        request(&mut driver, 0, 3, (data, 1024, READ_WRITE)),
        (0, 1024)
    );
    assert_eq!(driver.read(data, 1024)[..512], [3; 512]);
    assert_eq!(driver.read(data, 1024)[512..], [4; 512]);
    driver.write(data, &[0xaa; 1024]);
    assert_eq!(request(&mut driver, 1, 7, (data, 1024, READ_ONLY)), (0, 0));
    let mut back = [0; 1024];
    file.read_exact_at(&mut back, 7 * 512).unwrap();
    assert_eq!(back, [0xaa; 1024]);
}

#[test]
fn what_is_out_of_range_or_unknown_is_refused() {
    let (mut driver, file) = disk(true);
    let data = driver.buffer(1024);
    for (kind, sector, length, flags) in [
        (0, 15, 1024, READ_WRITE),
        (0, u64::MAX, 512, READ_WRITE),
        (0, 0, 100, READ_WRITE),
        (1, 0, 512, READ_ONLY),
    ] {
        assert_eq!(
            request(&mut driver, kind, sector, (data, length, flags)).0,
            1
        );
    }
    assert_eq!(request(&mut driver, 77, 0, (data, 512, READ_WRITE)).0, 2);
    let mut first = [9; 512];
    file.read_exact_at(&mut first, 0).unwrap();
    assert_eq!(first, [0; 512]);
}

#[test]
fn the_serial_number_is_the_id() {
    let (mut driver, _file) = disk(true);
    let data = driver.buffer(20);
    assert_eq!(request(&mut driver, 8, 0, (data, 20, READ_WRITE)), (0, 20));
    assert_eq!(
        driver.read(data, 20),
        *b"disk0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
    );
}

#[test]
fn a_request_without_status_stops_the_device() {
    let (mut driver, _file) = disk(false);
    let header = driver.buffer(16);
    driver.queue(0, &[(header, 16, READ_ONLY)]);
    driver.kick(0);
    assert!(driver.broken());
}
