// SPDX-License-Identifier: Apache-2.0

use std::{
    fs::File,
    io::Write,
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

use bulkhead_vmm_api::{BlkConfig, Rate, RateLimits};
use vmm_sys_util::tempfile::TempFile;

use super::Blk;
use crate::virtio::device::VirtioDevice;
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
        ..BlkConfig::default()
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
    let metrics = driver.metrics();
    assert_eq!((metrics.requests, metrics.errors), (5, 5));
    assert_eq!((metrics.bytes_to_guest, metrics.bytes_from_guest), (0, 0));
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

/// Status of a request to erase a range.
fn erase(driver: &mut Driver<Blk>, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
    let length = ranges.len() as u32 * 16;
    let data = driver.buffer(length.into());
    let mut at = data;
    for (sector, count, flags) in ranges {
        driver.write(at, &sector.to_le_bytes());
        driver.write(at + 8, &count.to_le_bytes());
        driver.write(at + 12, &flags.to_le_bytes());
        at += 16;
    }
    request(driver, kind, 0, (data, length, READ_ONLY)).0
}

const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

fn sectors(file: &File, from: u64, count: usize) -> Vec<u8> {
    let mut data = vec![0; count * 512];
    file.read_exact_at(&mut data, from * 512).unwrap();
    data
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let (mut driver, file) = disk(false);
    for (kind, flags) in [(DISCARD, 0), (WRITE_ZEROES, 0), (WRITE_ZEROES, 1)] {
        file.write_all_at(&[7; 16 * 512], 0).unwrap();
        assert_eq!(erase(&mut driver, kind, &[(3, 5, flags)]), 0);
        assert_eq!(sectors(&file, 0, 3), [7; 3 * 512]);
        assert_eq!(sectors(&file, 3, 5), [0; 5 * 512]);
        assert_eq!(sectors(&file, 8, 8), [7; 8 * 512]);
        assert_eq!(file.metadata().unwrap().len(), 16 * 512);
    }
    // Several ranges, up to the end.
    assert_eq!(
        erase(&mut driver, DISCARD, &[(8, 1, 0), (15, 1, 0), (0, 0, 0)]),
        0
    );
    assert_eq!(sectors(&file, 8, 2)[..512], [0; 512]);
    assert_eq!(sectors(&file, 8, 2)[512..], [7; 512]);
    assert_eq!(sectors(&file, 15, 1), [0; 512]);
}

#[test]
fn a_wrong_range_leaves_everything_as_it_is() {
    let (mut driver, file) = disk(false);
    file.write_all_at(&[7; 16 * 512], 0).unwrap();
    let many = [(0, 1, 0); 17];
    for (kind, ranges, status) in [
        (DISCARD, &[(0, 1, 0), (15, 2, 0)][..], 1),
        (DISCARD, &[(u64::MAX, 1, 0)], 1),
        (DISCARD, &[(0, u32::MAX, 0)], 1),
        (DISCARD, &[(0, 1, 1)], 2),
        (DISCARD, &[(0, 1, 2)], 2),
        (DISCARD, &[], 1),
        (DISCARD, &many, 1),
        (WRITE_ZEROES, &[(0, 1, 2)], 2),
        (WRITE_ZEROES, &[(0, 1, 0), (1, 1, 0)], 1),
        (WRITE_ZEROES, &[(16, 1, 0)], 1),
    ] {
        if ranges.is_empty() {
            let data = driver.buffer(15);
            assert_eq!(
                request(&mut driver, kind, 0, (data, 15, READ_ONLY)).0,
                status
            );
        } else {
            assert_eq!(
                erase(&mut driver, kind, ranges),
                status,
                "{kind} {ranges:?}"
            );
        }
        assert_eq!(sectors(&file, 0, 16), [7; 16 * 512]);
    }
    let (mut driver, file) = disk(true);
    for kind in [DISCARD, WRITE_ZEROES] {
        assert_eq!(erase(&mut driver, kind, &[(1, 1, 0)]), 1);
    }
    assert_eq!(sectors(&file, 1, 1), [1; 512]);
}

#[test]
fn a_write_that_is_cut_short_is_an_error() {
    let (mut driver, file) = disk(false);
    let data = driver.buffer(1024);
    // The file has become shorter: nothing to read there.
    file.set_len(8 * 512).unwrap();
    let (status, _) = request(&mut driver, 0, 7, (data, 1024, READ_WRITE));
    assert_eq!(status, 1);
}

#[test]
fn every_queue_is_served() {
    let config = BlkConfig {
        queues: Some(4),
        ..BlkConfig::default()
    };
    let file = TempFile::new().unwrap().into_file();
    file.set_len(4 * 512).unwrap();
    let ours = file.try_clone().unwrap();
    let mut driver = Driver::new(Blk::new(&config, file).unwrap());
    let mut space = [0; 4];
    driver.device().read_config(34, &mut space);
    assert_eq!(space[..2], [4, 0]);
    for queue in 0..4 {
        let header = driver.buffer(16);
        let data = driver.buffer(512);
        let status = driver.buffer(1);
        driver.write(header, &1_u32.to_le_bytes());
        driver.write(header + 8, &(queue as u64).to_le_bytes());
        driver.write(data, &[queue as u8 + 1; 512]);
        let chain = [
            (header, 16, READ_ONLY),
            (data, 512, READ_ONLY),
            (status, 1, READ_WRITE),
        ];
        driver.queue(queue, &chain);
        driver.kick(queue);
        assert_eq!(driver.used(queue), [1]);
        assert_eq!(sectors(&ours, queue as u64, 1), [queue as u8 + 1; 512]);
    }
}

#[test]
fn requests_beyond_the_limit_wait_and_are_served() {
    let config = BlkConfig {
        rate: Some(RateLimits {
            operations: Some(Rate {
                per_second: 50,
                burst: 2,
            }),
            bytes: None,
        }),
        ..BlkConfig::default()
    };
    let file = TempFile::new().unwrap().into_file();
    file.set_len(512).unwrap();
    let mut driver = Driver::live(Blk::new(&config, file).unwrap());
    let begin = Instant::now();
    for _ in 0..12 {
        let header = driver.buffer(16);
        let data = driver.buffer(512);
        let status = driver.buffer(1);
        driver.write(header, &[0; 16]);
        let chain = [
            (header, 16, READ_ONLY),
            (data, 512, READ_WRITE),
            (status, 1, READ_WRITE),
        ];
        driver.queue(0, &chain);
    }
    driver.kick(0);
    let mut done = 0;
    while done < 12 {
        assert!(begin.elapsed() < Duration::from_secs(60), "{done} served");
        std::thread::sleep(Duration::from_millis(1));
        done += driver.used(0).len();
    }
    let metrics = driver.metrics();
    assert_eq!((metrics.requests, metrics.errors), (12, 0));
    assert_eq!(metrics.bytes_to_guest, 12 * 512);
    assert!(metrics.throttled >= 5, "{metrics:?}");
    // Two at once, and ten at 50 a second.
    assert!(begin.elapsed() >= Duration::from_millis(199));
}
