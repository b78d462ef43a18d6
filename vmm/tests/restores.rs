// SPDX-License-Identifier: Apache-2.0
//! Machine after machine made of one snapshot in one process: each leaves as
//! many descriptors, threads and mappings as there were before. A process of its
//! own, for others' would be counted, too. `BULKHEAD_RESTORES` says how many.

use std::{
    fs::{self, File},
    os::{fd::OwnedFd, unix::net::UnixDatagram},
    sync::Arc,
    time::{Duration, Instant},
};

use bulkhead_vmm::{
    builder::{Callbacks, Host, Machine},
    config::{Resources, RestoreResources},
    timeline::Stamps,
};
use bulkhead_vmm_api::{
    BalloonConfig, BlkConfig, DeviceConfigs, FdIndex, FsCache, FsConfig, KernelConfig, MemConfig,
    NetConfig, Pages, PmemConfig, RestoreConfig, SnapshotFiles, VmConfig, VsockConfig,
};
use vmm_sys_util::tempfile::TempFile;

const RESTORES: u32 = 300;
/// How long what is left over may take to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a process has of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Held {
    descriptors: usize,
    threads: usize,
    mappings: usize,
}

fn held() -> Held {
    let entries = |path: &str| fs::read_dir(path).unwrap().count();
    Held {
        descriptors: entries("/proc/self/fd"),
        threads: entries("/proc/self/task"),
        mappings: fs::read_to_string("/proc/self/maps")
            .unwrap()
            .lines()
            .count(),
    }
}

fn zeros(length: u64) -> OwnedFd {
    let file = TempFile::new().unwrap().into_file();
    file.set_len(length).unwrap();
    file.into()
}

fn devices(fds: &mut Vec<OwnedFd>) -> DeviceConfigs {
    let mut pass = |fd: OwnedFd| -> FdIndex {
        fds.push(fd);
        fds.len() as u32 - 1
    };
    DeviceConfigs {
        pmem: vec![PmemConfig {
            id: "p".into(),
            file: pass(zeros(2 << 20)),
            read_only: true,
        }],
        fs: vec![FsConfig {
            tag: "f".into(),
            directory: pass(File::open(std::env::temp_dir()).unwrap().into()),
            cache: FsCache::Auto,
            dax_mib: 2,
            host_locks: false,
        }],
        net: vec![NetConfig {
            id: "n".into(),
            // What a tap's packets go to; its ioctls are refused, and there are
            // no offloads.
            tap: pass(UnixDatagram::unbound().unwrap().into()),
            mac: [2, 0, 0, 0, 0, 1],
            ..NetConfig::default()
        }],
        vsock: Some(VsockConfig {
            cid: 3,
            listener: None,
            uds_path: "/nowhere/v".into(),
            ready_port: None,
        }),
        blk: vec![BlkConfig {
            id: "b".into(),
            file: pass(zeros(1 << 20)),
            read_only: false,
            ..BlkConfig::default()
        }],
        balloon: Some(BalloonConfig::default()),
        mem: Some(MemConfig { max_mib: 128 }),
        ..DeviceConfigs::default()
    }
}

fn callbacks() -> Callbacks {
    Callbacks {
        on_end: Arc::new(|reason| panic!("{reason:?}")),
        on_connect: Arc::new(|_| {}),
        on_trap: Arc::new(|| {}),
        on_generation_read: Arc::new(|| {}),
    }
}

/// 2 vCPUs, one of which waits to be started, and one that goes round and round.
fn template(host: &Arc<Host>, kernel: File) -> (File, File) {
    let mut fds = vec![kernel.into()];
    let config = VmConfig {
        vcpus: 2,
        memory_mib: 32,
        pages: Pages::Small,
        merge_group: None,
        kernel: KernelConfig {
            image: 0,
            cmdline: String::new(),
            initrd: None,
        },
        serial: None,
        devices: devices(&mut fds),
    };
    let resources = Resources::new(config, fds).unwrap();
    let stamps = Stamps::new();
    let mut machine = Machine::build(Arc::clone(host), resources, &callbacks(), stamps).unwrap();
    machine.start().unwrap();
    machine.set_memory(2).unwrap();
    assert!(machine.pause());
    let files = (
        TempFile::new().unwrap().into_file(),
        TempFile::new().unwrap().into_file(),
    );
    machine.snapshot(&files.0, &files.1).unwrap();
    files
}

fn restore(host: &Arc<Host>, (state, memory): &(File, File)) {
    let mut fds: Vec<OwnedFd> = vec![
        state.try_clone().unwrap().into(),
        memory.try_clone().unwrap().into(),
    ];
    let config = RestoreConfig {
        snapshot: SnapshotFiles {
            state: 0,
            memory: 1,
        },
        serial: None,
        devices: devices(&mut fds),
    };
    let resources = RestoreResources::new(config, fds).unwrap();
    let stamps = Stamps::new();
    let mut machine = Machine::restore(Arc::clone(host), resources, &callbacks(), stamps).unwrap();
    machine.resume().unwrap();
    // What came is taken away again, too.
    machine.set_memory(0).unwrap();
    assert_eq!(machine.memory().unwrap().slots, 0);
}

#[test]
fn machines_leave_nothing() {
    if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
        println!("SKIPPED: machines_leave_nothing: /dev/kvm: {error}");
        return;
    }
    let count = match std::env::var("BULKHEAD_RESTORES") {
        Ok(text) => text.parse().expect("BULKHEAD_RESTORES is a number"),
        Err(_) => RESTORES,
    };
    let host = Arc::new(Host::open().unwrap());
    let files = template(&host, guest::spinning());
    // What is made once and stays.
    for _ in 0..5 {
        restore(&host, &files);
    }
    let before = held();
    let begin = Instant::now();
    for _ in 0..count {
        restore(&host, &files);
    }
    let took = begin.elapsed();
    // A vCPU that does not leave its guest at once, on a machine with much to
    // do, is not waited for when its machine is dropped.
    let deadline = Instant::now() + PATIENCE;
    while held() != before && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
    }
    let after = held();
    println!("{count} restores in {took:.1?}: {before:?} before, {after:?} after");
    assert_eq!(after, before);
}

/// The one kernel that is needed here.
mod guest {
    use std::{
        fs::File,
        io::{Seek, Write},
    };

    use vmm_sys_util::tempfile::TempFile;

    /// 1: jmp 1b, as an ELF file with a PVH note.
    pub fn spinning() -> File {
        const ENTRY: u64 = 0x10_0000;
        let code = [0xeb_u8, 0xfe];
        let mut bytes = Vec::new();
        bytes.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        bytes.extend_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]);
        for field in [ENTRY, 64, 0] {
            bytes.extend_from_slice(&u64::to_le_bytes(field));
        }
        bytes.extend_from_slice(&[0; 4]);
        for field in [64_u16, 56, 2, 0, 0, 0] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        let note_at = 64 + 2 * 56;
        let sizes = [(1_u32, note_at + 20, ENTRY, 2), (4, note_at, 0, 20)];
        for (kind, at, address, size) in sizes {
            bytes.extend_from_slice(&kind.to_le_bytes());
            bytes.extend_from_slice(&7_u32.to_le_bytes());
            for field in [at, address, address, size, size, 4] {
                bytes.extend_from_slice(&u64::to_le_bytes(field));
            }
        }
        for field in [4_u32, 4, 18] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        bytes.extend_from_slice(b"Xen\0");
        bytes.extend_from_slice(&(ENTRY as u32).to_le_bytes());
        bytes.extend_from_slice(&code);
        let mut file = TempFile::new().unwrap().into_file();
        file.write_all(&bytes).unwrap();
        file.rewind().unwrap();
        file
    }
}
