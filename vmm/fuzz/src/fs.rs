// SPDX-License-Identifier: Apache-2.0
//! A guest's file requests: each begins with a header that can be read, and goes
//! on as the input says. All happens in a directory of a process that is root
//! only of a user namespace, where there are no devices to be made and opened.
#![no_main]

mod guest;

use std::{
    fs::{self, File},
    sync::Once,
};

use bulkhead_vmm::virtio::fs::{Fs, Window};
use bulkhead_vmm_api::{FsCache, FsConfig};
use libfuzzer_sys::fuzz_target;
use vmm_sys_util::tempdir::TempDir;

/// FUSE_INIT.
const INIT: u8 = 26;
/// Bytes of the DAX window.
const WINDOW: u64 = 8 << 20;
/// Bytes that a file, and so what is written to the host's disk, can have.
const FILE_SIZE: u64 = 1 << 20;

/// Makes sure that the worst that can happen is a full temporary directory.
fn confine() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let ids = fs::read_to_string("/proc/self/uid_map").expect("ids");
        let all = ids.split_whitespace().last() == Some("4294967295");
        assert!(
            !all,
            "run this as: unshare --user --map-root-user {:?}",
            std::env::args().next()
        );
        let limit = libc::rlimit {
            rlim_cur: FILE_SIZE,
            rlim_max: FILE_SIZE,
        };
        // SAFETY: the structure outlives the call; ignoring a signal runs nothing.
        let failed = unsafe {
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit)
        };
        assert_eq!(failed, 0, "the size of files cannot be limited");
    });
}

fn header(opcode: u8, inode: u8, length: usize) -> Vec<u8> {
    let mut header = Vec::new();
    header.extend_from_slice(&(length as u32 + 40).to_le_bytes());
    header.extend_from_slice(&u32::from(opcode).to_le_bytes());
    header.extend_from_slice(&7_u64.to_le_bytes());
    header.extend_from_slice(&u64::from(inode).to_le_bytes());
    // User, group, process, padding.
    header.extend_from_slice(&[0; 16]);
    header
}

fuzz_target!(|data: &[u8]| {
    confine();
    let directory = TempDir::new().expect("a directory");
    fs::create_dir(directory.as_path().join("d")).expect("a directory");
    fs::write(directory.as_path().join("d/f"), b"0123456789").expect("a file");
    std::os::unix::fs::symlink("d/f", directory.as_path().join("l")).expect("a link");
    let config = FsConfig {
        tag: "shared".into(),
        directory: 0,
        cache: FsCache::Auto,
        dax_mib: 0,
        host_locks: true,
    };
    let opened = File::open(directory.as_path()).expect("a directory");
    let device = Fs::new(&config, opened.into()).expect("a device");
    let window = Window::reserve(WINDOW).expect("a window");
    let mut device = device.with_window(Some(Window::new(1 << 32, window)));
    let mut guest = guest::Guest::new(&mut device);

    let mut body = Vec::new();
    for word in [7, 38, 1 << 17, u32::MAX, u32::MAX] {
        body.extend_from_slice(&u32::to_le_bytes(word));
    }
    body.resize(64, 0);
    guest.send(1, &[header(INIT, 0, 64), body].concat(), 256);
    let mut rest = data;
    // Opcode, inode, queue and room, length.
    while let [opcode, inode, place, length, tail @ ..] = rest {
        let length = usize::from(*length).min(tail.len());
        let (body, next) = tail.split_at(length);
        let request = [header(*opcode, *inode, length), body.to_vec()].concat();
        guest.send(usize::from(place & 1), &request, u32::from(place >> 1) * 64);
        rest = next;
    }
});
