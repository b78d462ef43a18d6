// SPDX-License-Identifier: Apache-2.0

use std::{
    fs::File,
    io::{self, Write},
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

use bulkhead_vmm_api::{BlkConfig, BlkEngine, Rate, RateLimits};
use vmm_sys_util::tempfile::TempFile;

use super::{ring::Ring, Blk};
use crate::virtio::device::VirtioDevice;
use crate::virtio::testing::{Driver, READ_ONLY, READ_WRITE};

/// What this host has.
fn engines() -> Vec<BlkEngine> {
    let mut engines = vec![BlkEngine::Sync];
    match Ring::new(TempFile::new().unwrap().as_file()) {
        Ok(_) => engines.push(BlkEngine::IoUring),
        Err(error) => println!("SKIPPED: io_uring: {error}"),
    }
    engines
}

/// A driver of a disk, with its file.
struct Tester {
    driver: Driver<Blk>,
    file: File,
    engine: BlkEngine,
}

impl Tester {
    fn new(engine: BlkEngine, config: BlkConfig, file: File) -> Self {
        let ours = file.try_clone().unwrap();
        let config = BlkConfig {
            engine: Some(engine),
            ..config
        };
        let blk = Blk::new(&config, file).unwrap();
        assert_eq!(blk.ring.is_some(), engine == BlkEngine::IoUring);
        Self {
            driver: match engine {
                BlkEngine::Sync => Driver::new(blk),
                BlkEngine::IoUring => Driver::live(blk),
            },
            file: ours,
            engine,
        }
    }

    /// Queues a request, with the status' address.
    fn queue(&mut self, queue: usize, kind: u32, sector: u64, data: (u64, u32, u16)) -> u64 {
        let header = self.driver.buffer(16);
        let status = self.driver.buffer(1);
        self.driver.write(header, &kind.to_le_bytes());
        self.driver.write(header + 8, &sector.to_le_bytes());
        self.driver.write(status, &[0xee]);
        let chain = [(header, 16, READ_ONLY), data, (status, 1, READ_WRITE)];
        self.driver.queue(queue, &chain);
        status
    }

    /// Notifies the device, and waits until so many requests are served, or the
    /// device has given up; their lengths.
    fn kick(&mut self, queue: usize, count: usize) -> Vec<u32> {
        match self.engine {
            BlkEngine::Sync => self.driver.kick(queue),
            BlkEngine::IoUring => self.driver.notify(queue),
        }
        self.wait(queue, count)
    }

    fn wait(&mut self, queue: usize, count: usize) -> Vec<u32> {
        let begin = Instant::now();
        let mut used = Vec::new();
        loop {
            used.extend(self.driver.used(queue));
            if used.len() >= count || self.driver.broken() {
                return used;
            }
            assert!(begin.elapsed() < Duration::from_secs(60), "{used:?} served");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Status and the bytes written to the guest, less the status.
    fn request(&mut self, kind: u32, sector: u64, data: (u64, u32, u16)) -> (u8, u32) {
        let status = self.queue(0, kind, sector, data);
        let used = self.kick(0, 1);
        (self.driver.read(status, 1)[0], used[0] - 1)
    }
}

/// Sixteen sectors, each of its number.
fn numbered(engine: BlkEngine, read_only: bool) -> Tester {
    let mut file = TempFile::new().unwrap().into_file();
    for sector in 0..16_u8 {
        file.write_all(&[sector; 512]).unwrap();
    }
    let config = BlkConfig {
        id: "disk0".into(),
        read_only,
        ..BlkConfig::default()
    };
    Tester::new(engine, config, file)
}

#[test]
fn sectors_are_read_and_written() {
    for engine in engines() {
        let mut disk = numbered(engine, false);
        let data = disk.driver.buffer(1024);
        assert_eq!(disk.request(0, 3, (data, 1024, READ_WRITE)), (0, 1024));
        assert_eq!(disk.driver.read(data, 1024)[..512], [3; 512]);
        assert_eq!(disk.driver.read(data, 1024)[512..], [4; 512]);
        disk.driver.write(data, &[0xaa; 1024]);
        assert_eq!(disk.request(1, 7, (data, 1024, READ_ONLY)), (0, 0));
        let mut back = [0; 1024];
        disk.file.read_exact_at(&mut back, 7 * 512).unwrap();
        assert_eq!(back, [0xaa; 1024]);
    }
}

#[test]
fn what_is_out_of_range_or_unknown_is_refused() {
    for engine in engines() {
        let mut disk = numbered(engine, true);
        let data = disk.driver.buffer(1024);
        for (kind, sector, length, flags) in [
            (0, 15, 1024, READ_WRITE),
            (0, u64::MAX, 512, READ_WRITE),
            // In bytes it is more than a number holds.
            (0, u64::MAX / 256, 512, READ_WRITE),
            (0, 0, 100, READ_WRITE),
            (1, 0, 512, READ_ONLY),
        ] {
            assert_eq!(disk.request(kind, sector, (data, length, flags)).0, 1);
        }
        assert_eq!(disk.request(77, 0, (data, 512, READ_WRITE)).0, 2);
        let metrics = disk.driver.metrics();
        assert_eq!((metrics.requests, metrics.errors), (6, 6));
        assert_eq!((metrics.bytes_to_guest, metrics.bytes_from_guest), (0, 0));
        let mut first = [9; 512];
        disk.file.read_exact_at(&mut first, 0).unwrap();
        assert_eq!(first, [0; 512]);
    }
}

#[test]
fn the_serial_number_is_the_id() {
    for engine in engines() {
        let mut disk = numbered(engine, true);
        let data = disk.driver.buffer(20);
        assert_eq!(disk.request(8, 0, (data, 20, READ_WRITE)), (0, 20));
        assert_eq!(
            disk.driver.read(data, 20),
            *b"disk0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
        );
    }
}

#[test]
fn a_request_without_status_stops_the_device() {
    for engine in engines() {
        let mut disk = numbered(engine, false);
        let header = disk.driver.buffer(16);
        disk.driver.queue(0, &[(header, 16, READ_ONLY)]);
        assert!(disk.kick(0, 1).is_empty());
        assert!(disk.driver.broken());
    }
}

/// Status of a request to erase a range.
fn erase(disk: &mut Tester, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
    let length = ranges.len() as u32 * 16;
    let data = disk.driver.buffer(length.into());
    let mut at = data;
    for (sector, count, flags) in ranges {
        disk.driver.write(at, &sector.to_le_bytes());
        disk.driver.write(at + 8, &count.to_le_bytes());
        disk.driver.write(at + 12, &flags.to_le_bytes());
        at += 16;
    }
    disk.request(kind, 0, (data, length, READ_ONLY)).0
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
    for engine in engines() {
        let mut disk = numbered(engine, false);
        for (kind, flags) in [(DISCARD, 0), (WRITE_ZEROES, 0), (WRITE_ZEROES, 1)] {
            disk.file.write_all_at(&[7; 16 * 512], 0).unwrap();
            assert_eq!(erase(&mut disk, kind, &[(3, 5, flags)]), 0);
            assert_eq!(sectors(&disk.file, 0, 3), [7; 3 * 512]);
            assert_eq!(sectors(&disk.file, 3, 5), [0; 5 * 512]);
            assert_eq!(sectors(&disk.file, 8, 8), [7; 8 * 512]);
            assert_eq!(disk.file.metadata().unwrap().len(), 16 * 512);
        }
        // Several ranges, up to the end.
        assert_eq!(
            erase(&mut disk, DISCARD, &[(8, 1, 0), (15, 1, 0), (0, 0, 0)]),
            0
        );
        assert_eq!(sectors(&disk.file, 8, 2)[..512], [0; 512]);
        assert_eq!(sectors(&disk.file, 8, 2)[512..], [7; 512]);
        assert_eq!(sectors(&disk.file, 15, 1), [0; 512]);
    }
}

#[test]
fn a_wrong_range_leaves_everything_as_it_is() {
    for engine in engines() {
        let mut disk = numbered(engine, false);
        disk.file.write_all_at(&[7; 16 * 512], 0).unwrap();
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
                let data = disk.driver.buffer(15);
                assert_eq!(disk.request(kind, 0, (data, 15, READ_ONLY)).0, status);
            } else {
                assert_eq!(erase(&mut disk, kind, ranges), status, "{kind} {ranges:?}");
            }
            assert_eq!(sectors(&disk.file, 0, 16), [7; 16 * 512]);
        }
        let mut disk = numbered(engine, true);
        for kind in [DISCARD, WRITE_ZEROES] {
            assert_eq!(erase(&mut disk, kind, &[(1, 1, 0)]), 1);
        }
        assert_eq!(sectors(&disk.file, 1, 1), [1; 512]);
    }
}

#[test]
fn a_write_that_is_cut_short_is_an_error() {
    for engine in engines() {
        let mut disk = numbered(engine, false);
        let data = disk.driver.buffer(1024);
        // The file has become shorter: nothing to read there.
        disk.file.set_len(8 * 512).unwrap();
        let (status, _) = disk.request(0, 7, (data, 1024, READ_WRITE));
        assert_eq!(status, 1);
    }
}

fn sized(sectors: u64) -> File {
    let file = TempFile::new().unwrap().into_file();
    file.set_len(sectors * 512).unwrap();
    file
}

#[test]
fn every_queue_is_served() {
    for engine in engines() {
        let config = BlkConfig {
            queues: Some(4),
            ..BlkConfig::default()
        };
        let mut disk = Tester::new(engine, config, sized(4));
        let mut space = [0; 4];
        disk.driver.device().read_config(34, &mut space);
        assert_eq!(space[..2], [4, 0]);
        for queue in 0..4 {
            let data = disk.driver.buffer(512);
            disk.driver.write(data, &[queue as u8 + 1; 512]);
            disk.queue(queue, 1, queue as u64, (data, 512, READ_ONLY));
            assert_eq!(disk.kick(queue, 1), [1]);
            let stored = sectors(&disk.file, queue as u64, 1);
            assert_eq!(stored, [queue as u8 + 1; 512]);
        }
    }
}

#[test]
fn requests_beyond_the_limit_wait_and_are_served() {
    for engine in engines() {
        let config = BlkConfig {
            engine: Some(engine),
            rate: Some(RateLimits {
                operations: Some(Rate {
                    per_second: 50,
                    burst: 2,
                }),
                bytes: None,
            }),
            ..BlkConfig::default()
        };
        let file = sized(1);
        let mut disk = Tester {
            driver: Driver::live(Blk::new(&config, file.try_clone().unwrap()).unwrap()),
            file,
            engine,
        };
        let begin = Instant::now();
        for _ in 0..12 {
            let data = disk.driver.buffer(512);
            disk.queue(0, 0, 0, (data, 512, READ_WRITE));
        }
        disk.driver.notify(0);
        assert_eq!(disk.wait(0, 12), [513; 12]);
        let metrics = disk.driver.metrics();
        assert_eq!((metrics.requests, metrics.errors), (12, 0));
        assert_eq!(metrics.bytes_to_guest, 12 * 512);
        assert!(metrics.throttled >= 5, "{metrics:?}");
        // Two at once, and ten at 50 a second.
        assert!(begin.elapsed() >= Duration::from_millis(199));
    }
}

const FLUSH: u32 = 4;

#[test]
fn what_was_written_is_flushed() {
    for engine in engines() {
        for read_only in [false, true] {
            let mut disk = numbered(engine, read_only);
            let status = disk.driver.buffer(1);
            let header = disk.driver.buffer(16);
            disk.driver.write(header, &FLUSH.to_le_bytes());
            let chain = [(header, 16, READ_ONLY), (status, 1, READ_WRITE)];
            disk.driver.queue(0, &chain);
            disk.driver.write(status, &[9]);
            assert_eq!(disk.kick(0, 1), [1]);
            assert_eq!(disk.driver.read(status, 1), [0]);
        }
    }
}

/// Queues as many writes of a page as fit a queue, and tells the device.
fn many_writes(disk: &mut Tester) -> Vec<u64> {
    let writes = (0..20_u64).map(|number| {
        let data = disk.driver.buffer(4096);
        disk.driver.write(data, &[number as u8 + 1; 4096]);
        disk.queue(0, 1, number * 8, (data, 4096, READ_ONLY))
    });
    let statuses = writes.collect();
    disk.driver.notify(0);
    statuses
}

fn with_ring() -> Option<Tester> {
    let engine = engines()
        .pop()
        .filter(|found| *found == BlkEngine::IoUring)?;
    Some(Tester::new(engine, BlkConfig::default(), sized(20 * 8)))
}

#[test]
fn nothing_is_on_its_way_once_the_device_is_saved_or_reset() {
    for _ in 0..20 {
        let Some(mut disk) = with_ring() else { return };
        let statuses = many_writes(&mut disk);
        // Whatever has been taken by now.
        let (_, taken, given_back) = {
            let mut device = disk.driver.device();
            device.save().unwrap();
            let saved = device.queues().unwrap().positions().next();
            saved.unwrap()
        };
        assert_eq!(taken, given_back);
        for status in &statuses[..usize::from(taken)] {
            assert_eq!(disk.driver.read(*status, 1), [0]);
        }
        for number in 0..u64::from(taken) {
            assert_eq!(sectors(&disk.file, number * 8, 8), [number as u8 + 1; 4096]);
        }
        disk.wait(0, 20);
        // And those that nobody waits for any more.
        many_writes(&mut disk);
        disk.driver.restart();
        assert!(!disk.driver.device().ring.as_ref().unwrap().is_busy());
        let data = disk.driver.buffer(512);
        disk.queue(0, 0, 0, (data, 512, READ_WRITE));
        assert_eq!(disk.kick(0, 1), [513]);
        assert_eq!(disk.driver.read(data, 512), [1; 512]);
    }
}

#[test]
fn a_ring_that_is_full_goes_on_when_there_is_room() {
    let Some(mut disk) = with_ring() else { return };
    let file = disk.file.try_clone().unwrap();
    let ring = Ring::sized(&file, 4);
    let blk = Blk::with(&BlkConfig::default(), file, Some(ring)).unwrap();
    disk.driver = Driver::live(blk);
    let mut served = 0;
    for round in 0..40 {
        let statuses = many_writes(&mut disk);
        served += disk.wait(0, 20).len();
        assert!(!disk.driver.broken());
        for status in statuses {
            assert_eq!(disk.driver.read(status, 1), [0], "round {round}");
        }
        disk.driver.restart();
        disk.driver.forget_buffers();
    }
    assert_eq!(served, 800);
    assert_eq!(disk.driver.metrics().bytes_from_guest, 800 * 4096);
}

#[test]
fn a_host_without_io_uring_serves_all_the_same() {
    let config = BlkConfig {
        engine: Some(BlkEngine::IoUring),
        ..BlkConfig::default()
    };
    let refused = Err(io::Error::from_raw_os_error(libc::EPERM));
    let blk = Blk::with(&config, sized(8), Some(refused)).unwrap();
    let mut driver = Driver::new(blk);
    let (header, data) = (driver.buffer(16), driver.buffer(512));
    let status = driver.buffer(1);
    let chain = [
        (header, 16, READ_ONLY),
        (data, 512, READ_WRITE),
        (status, 1, READ_WRITE),
    ];
    driver.queue(0, &chain);
    driver.kick(0);
    assert_eq!(driver.used(0), [513]);
}

#[test]
fn a_ring_can_do_nothing_but_what_it_is_for() {
    if engines().len() < 2 {
        return;
    }
    let file = sized(1);
    let mut ring = Ring::new(&file).unwrap();
    assert_eq!(ring.try_other(), Some(-libc::EACCES));
}
