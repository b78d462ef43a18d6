// SPDX-License-Identifier: Apache-2.0
//! Snapshots that released versions wrote, kept in the tree: they must stay
//! readable. `BULKHEAD_GOLDEN=write` writes those of the version that there is;
//! a change of what is saved comes with a directory of its own (`v2`), and the
//! older ones stay.

use std::{
    fs::{self, File},
    io::Read,
    os::{
        fd::OwnedFd,
        unix::{fs::FileExt, net::UnixStream},
    },
    path::{Path, PathBuf},
};

use bulkhead_vmm::snapshot::state;
use bulkhead_vmm_api::{
    BalloonConfig, BlkConfig, Call, DeviceConfigs, DeviceKind, Failure, FailureKind, MemConfig,
    MemoryTarget, NetConfig, PmemConfig, VmState, VsockConfig,
};
use vmm_sys_util::tempfile::TempFile;

use crate::{
    guest::{contents, zeros, Code},
    vmm::{assert_failure, kvm, Setup, Snapshot, Vmm, LONG},
};

/// What the guest prints for ever.
const LETTER: u8 = b'g';
/// Zeros that end a run of bytes in the kept memory.
const GAP: usize = 32;

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// Every kind of device but a shared directory, which must not be one of this
/// machine's.
fn devices(pass: &mut dyn FnMut(OwnedFd) -> u32) -> DeviceConfigs {
    DeviceConfigs {
        pmem: vec![PmemConfig {
            id: "image".into(),
            file: pass(zeros(2 << 20).into()),
            read_only: true,
        }],
        vsock: Some(VsockConfig {
            cid: 3,
            listener: None,
            uds_path: "/nowhere/v".into(),
            ready_port: None,
        }),
        net: vec![NetConfig {
            id: "net".into(),
            tap: pass(File::open("/dev/null").unwrap().into()),
            mac: [2, 0, 0, 0, 0, 1],
            mtu: Some(1500),
            ..NetConfig::default()
        }],
        blk: vec![BlkConfig {
            id: "disk".into(),
            file: pass(zeros(1 << 20).into()),
            read_only: false,
            queues: Some(2),
            ..BlkConfig::default()
        }],
        balloon: Some(BalloonConfig::default()),
        mem: Some(MemConfig { max_mib: 256 }),
        ..DeviceConfigs::default()
    }
}

fn write(to: &Path) {
    let mut setup = Setup::new(Code::new().print_for_ever(LETTER).kernel());
    setup.config.kernel.cmdline = "golden".into();
    setup.config.devices = devices(&mut |fd| {
        setup.fds.push(fd);
        setup.fds.len() as u32 - 1
    });
    let mut serial = setup.serial();
    let mut vmm = Vmm::run(&setup);
    serial.read_exact(&mut [0; 3]).unwrap();
    vmm.call(Call::Memory(MemoryTarget { mib: 4 })).unwrap();
    let snapshot = vmm.snapshot().unwrap();
    let mut bytes = Vec::new();
    read_all(snapshot.state.as_file(), &mut bytes);
    fs::create_dir_all(to).unwrap();
    fs::write(to.join("state"), bytes).unwrap();
    bytes = Vec::new();
    read_all(snapshot.memory.as_file(), &mut bytes);
    fs::write(to.join("memory"), as_text(&bytes)).unwrap();
}

fn read_all(file: &File, bytes: &mut Vec<u8>) {
    bytes.resize(file.metadata().unwrap().len() as usize, 0);
    file.read_exact_at(bytes, 0).unwrap();
}

/// The size, and each run of bytes with its offset.
fn as_text(bytes: &[u8]) -> String {
    let mut text = format!("{:x}\n", bytes.len());
    let mut at = 0;
    while let Some(start) = bytes[at..].iter().position(|byte| *byte != 0) {
        let start = at + start;
        let run = &bytes[start..];
        let end = run
            .windows(GAP)
            .position(|window| window.iter().all(|byte| *byte == 0))
            .unwrap_or(run.len());
        text.push_str(&format!("{start:x} "));
        run[..end]
            .iter()
            .for_each(|byte| text.push_str(&format!("{byte:02x}")));
        text.push('\n');
        at = start + end;
    }
    text
}

fn from_text(text: &str, file: &File) {
    let number = |digits: &str| u64::from_str_radix(digits, 16).unwrap();
    let mut lines = text.lines();
    file.set_len(number(lines.next().unwrap())).unwrap();
    for line in lines {
        let (offset, digits) = line.split_once(' ').unwrap();
        let bytes = (0..digits.len() / 2).map(|at| number(&digits[at * 2..at * 2 + 2]) as u8);
        let bytes: Vec<u8> = bytes.collect();
        file.write_all_at(&bytes, number(offset)).unwrap();
    }
}

/// One of the kept ones, in files of its own.
fn kept(directory: &Path) -> Snapshot {
    let state = fs::read(directory.join("state")).unwrap();
    let snapshot = Snapshot {
        state: TempFile::new().unwrap(),
        memory: TempFile::new().unwrap(),
    };
    snapshot.state.as_file().write_all_at(&state, 0).unwrap();
    let memory = fs::read_to_string(directory.join("memory")).unwrap();
    from_text(&memory, snapshot.memory.as_file());
    snapshot
}

fn versions() -> Vec<PathBuf> {
    let entries = fs::read_dir(directory()).unwrap();
    let mut found: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    found.sort();
    assert!(!found.is_empty());
    found
}

fn restore(snapshot: &Snapshot) -> (Result<Vmm, Failure>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(LONG)).unwrap();
    let restored = Vmm::restore(snapshot, |config, fds| {
        fds.push(theirs.into());
        config.serial = Some(2);
        config.devices = devices(&mut |fd| {
            fds.push(fd);
            fds.len() as u32 - 1
        });
    });
    (restored, ours)
}

#[test]
fn kept_snapshots_are_restored() {
    if !kvm("kept_snapshots_are_restored") {
        return;
    }
    if std::env::var("BULKHEAD_GOLDEN").is_ok_and(|value| value == "write") {
        write(&directory().join("v2"));
    }
    for directory in versions() {
        let (restored, mut serial) = restore(&kept(&directory));
        let mut vmm = match restored {
            Ok(vmm) => vmm,
            // Another processor than the one that it is of: which is said.
            Err(failure) => {
                assert_eq!(failure.kind, FailureKind::BadResource, "{failure:?}");
                let reasons = ["TSC frequency", "CPUID", "MSRs", "extended state"];
                let named = reasons
                    .iter()
                    .any(|reason| failure.message.contains(reason));
                assert!(named, "{failure:?}");
                println!(
                    "SKIPPED: kept_snapshots_are_restored: {}: {}",
                    directory.display(),
                    failure.message
                );
                continue;
            }
        };
        let status = vmm.status();
        assert_eq!(status.state, VmState::Paused);
        let kinds: Vec<_> = status.devices.iter().map(|device| device.kind).collect();
        use DeviceKind::{Balloon, Blk, Mem, Net, Pmem, Rng, Vsock};
        assert_eq!(kinds, [Pmem, Vsock, Net, Blk, Rng, Balloon, Mem]);
        let memory = status.memory.unwrap();
        assert_eq!((memory.target_mib, memory.mapped_mib), (4, 128));
        vmm.call(Call::Resume).unwrap();
        let mut printed = [0; 3];
        serial.read_exact(&mut printed).unwrap();
        assert_eq!(printed, [LETTER; 3], "{}", directory.display());
    }
}

/// Needs no processor at all.
#[test]
fn kept_snapshots_are_read_and_written_alike() {
    for directory in versions() {
        let bytes = fs::read(directory.join("state")).unwrap();
        let read = state::read(&contents(&bytes)).unwrap();
        assert_eq!(read.functions.len(), 7);
        let mut written = read.to_file();
        // Another build's, perhaps.
        written.build = String::from_utf8_lossy(&bytes[40..64])
            .trim_end_matches('\0')
            .into();
        assert!(written.encode() == bytes, "{}", directory.display());
    }
}

#[test]
fn damaged_ones_are_refused() {
    for directory in versions() {
        let bytes = fs::read(directory.join("state")).unwrap();
        let refused = |bytes: &[u8]| state::read(&contents(bytes)).is_err();
        for length in (0..bytes.len()).step_by(61).chain([bytes.len() - 1]) {
            assert!(refused(&bytes[..length]), "{length} bytes");
        }
        assert!(refused(&[&bytes[..], &[0]].concat()));
        // But for the build's version (40 to 64), which says nothing.
        for at in (0..40).chain((64..bytes.len()).step_by(61)) {
            for bit in [1, 0x80] {
                let mut changed = bytes.clone();
                changed[at] ^= bit;
                let memory = (24..32).contains(&at);
                // Another size of memory may be one; its file is not then.
                assert!(memory || refused(&changed), "byte {at}");
            }
        }
    }
    if !kvm("damaged_ones_are_refused") {
        return;
    }
    let snapshot = kept(&versions()[0]);
    let file = snapshot.state.as_file();
    file.write_all_at(&[0xff; 64], 1000).unwrap();
    let restored = restore(&snapshot).0.map(drop);
    assert_failure(
        restored,
        FailureKind::BadResource,
        "state file: its checksum",
    );
    let snapshot = kept(&versions()[0]);
    let memory = snapshot.memory.as_file();
    memory
        .set_len(memory.metadata().unwrap().len() / 2)
        .unwrap();
    let restored = restore(&snapshot).0.map(drop);
    assert_failure(restored, FailureKind::BadResource, "memory file of");
}
