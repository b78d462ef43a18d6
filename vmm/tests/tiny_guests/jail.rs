// SPDX-License-Identifier: Apache-2.0
//! What a VMM may do once its guest runs.

use std::{
    io::Read,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use bulkhead_vmm_api::{Call, ExitReason, FsCache, FsConfig, VsockConfig};
use vmm_sys_util::tempdir::TempDir;

use crate::{
    guest::Code,
    vmm::{is_root, kvm, Setup, Vmm, LONG},
};

/// The value of a field of a thread's or process's status.
fn status(path: &Path, field: &str) -> String {
    let text = std::fs::read_to_string(path.join("status")).unwrap();
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    value.expect(field).trim().to_owned()
}

/// A VMM with sockets, where there are `files` also a shared directory, and two
/// vCPUs, which run.
fn confined(directory: &TempDir, files: bool) -> (Vmm, PathBuf) {
    start(Vmm::spawn(), directory, files)
}

fn start(mut vmm: Vmm, directory: &TempDir, files: bool) -> (Vmm, PathBuf) {
    let mut setup = Setup::new(Code::new().print("up\n").spin().kernel());
    setup.config.vcpus = 2;
    if files {
        let shared = setup.pass(std::fs::File::open(directory.as_path()).unwrap());
        setup.config.devices.fs.push(FsConfig {
            tag: "shared".into(),
            directory: shared,
            cache: FsCache::Auto,
            dax_mib: 0,
            host_locks: false,
        });
    }
    setup.config.devices.vsock = Some(VsockConfig {
        cid: 3,
        listener: None,
        uds_path: directory.as_path().join("vsock").to_string_lossy().into(),
        ready_port: None,
    });
    let mut serial = setup.serial();
    vmm.configure(&setup).unwrap();
    vmm.call(Call::Boot).unwrap();
    serial.read_exact(&mut [0; 3]).unwrap();
    let process = PathBuf::from(format!("/proc/{}", vmm.child.id()));
    (vmm, process)
}

/// Its threads with their names, but those that KVM makes for itself.
fn threads(process: &Path) -> Vec<(String, PathBuf)> {
    let threads = std::fs::read_dir(process.join("task")).unwrap();
    let mut threads: Vec<_> = threads
        .map(|thread| thread.unwrap().path())
        .map(|thread| (status(&thread, "Name"), thread))
        .filter(|(name, _)| !name.starts_with("kvm-"))
        .collect();
    threads.sort();
    threads
}

#[test]
fn every_thread_has_a_filter_once_the_guest_runs() {
    if !kvm("every_thread_has_a_filter_once_the_guest_runs") {
        return;
    }
    let directory = TempDir::new().unwrap();
    let (_vmm, process) = confined(&directory, true);
    let threads = threads(&process);
    for (name, thread) in &threads {
        // SECCOMP_MODE_FILTER, one each.
        assert_eq!(status(thread, "Seccomp"), "2", "{name}");
        assert_eq!(status(thread, "Seccomp_filters"), "1", "{name}");
        assert_eq!(status(thread, "NoNewPrivs"), "1", "{name}");
    }
    let names: Vec<_> = threads.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["bulkhead-vmm", "fs", "io", "vcpu0", "vcpu1"]);
}

/// Users of VMMs are this and their process's id.
const FIRST_USER: u32 = 0x7000_0000;

/// Inheritable, permitted, effective, ambient.
fn capabilities(thread: &Path) -> [u64; 4] {
    let all = ["CapInh", "CapPrm", "CapEff", "CapAmb"];
    all.map(|set| u64::from_str_radix(&status(thread, set), 16).unwrap())
}

/// Real, effective, saved, and for files: of users, then of groups.
fn users(thread: &Path) -> Vec<u32> {
    let all = [status(thread, "Uid"), status(thread, "Gid")].join("\t");
    all.split_whitespace()
        .map(|id| id.parse().unwrap())
        .collect()
}

/// That of all namespaces exactly these are not this process's.
#[track_caller]
fn assert_namespaces(process: &Path, own: &[&str]) {
    for namespace in ["mnt", "net", "ipc", "uts", "user", "pid", "cgroup"] {
        let of = |process: &Path| std::fs::read_link(process.join("ns").join(namespace)).unwrap();
        let differs = of(process) != of(Path::new("/proc/self"));
        assert_eq!(differs, own.contains(&namespace), "{namespace}");
    }
}

#[test]
fn without_files_there_are_no_rights_at_all() {
    const TEST: &str = "without_files_there_are_no_rights_at_all";
    if !kvm(TEST) {
        return;
    }
    if !is_root() {
        println!("SKIPPED: {TEST}: not root");
        return;
    }
    let directory = TempDir::new().unwrap();
    let (mut vmm, process) = confined(&directory, false);
    let own = FIRST_USER + vmm.child.id();
    let threads = threads(&process);
    let names: Vec<_> = threads.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["bulkhead-vmm", "io", "vcpu0", "vcpu1"]);
    for (name, thread) in &threads {
        assert_eq!(capabilities(thread), [0; 4], "{name}");
        assert_eq!(users(thread), [own; 8], "{name}");
        assert_eq!(status(thread, "Groups"), "", "{name}");
        assert_eq!(status(thread, "NoNewPrivs"), "1", "{name}");
    }
    assert_namespaces(&process, &["mnt", "net", "ipc", "uts", "user"]);
    // Nobody is mapped there.
    for map in ["uid_map", "gid_map"] {
        assert_eq!(std::fs::read_to_string(process.join(map)).unwrap(), "");
    }
    vmm.call(Call::Shutdown).unwrap();
    assert_eq!(vmm.end().1, ExitReason::Stopped.code());
}

#[test]
fn the_client_says_who_the_process_becomes() {
    const TEST: &str = "the_client_says_who_the_process_becomes";
    if !kvm(TEST) {
        return;
    }
    if !is_root() {
        println!("SKIPPED: {TEST}: not root");
        return;
    }
    let directory = TempDir::new().unwrap();
    for files in [false, true] {
        for (word, user) in [("4711", 4711), ("kept", 0)] {
            let vmm = Vmm::spawn_as(&["--user", word], &[]);
            let (_vmm, process) = start(vmm, &directory, files);
            for (name, thread) in threads(&process) {
                let user = if name == "fs" { 0 } else { user };
                assert_eq!(users(&thread), [user; 8], "{word} {name}");
                let none = capabilities(&thread) == [0; 4];
                assert_eq!(none, name != "fs", "{word} {name}");
            }
        }
    }
}

/// In a namespace of processes that its client makes, and dies with the client
/// as it was told to, whoever it has become meanwhile.
#[test]
fn a_namespace_of_processes_is_the_clients_to_make() {
    const TEST: &str = "a_namespace_of_processes_is_the_clients_to_make";
    if !kvm(TEST) {
        return;
    }
    if !is_root() {
        println!("SKIPPED: {TEST}: not root");
        return;
    }
    let directory = TempDir::new().unwrap();
    for files in [false, true] {
        let shared = &directory;
        // Its own thread's children are born there, and that thread dies.
        let process = std::thread::scope(|scope| {
            let started = scope.spawn(move || {
                // SAFETY: takes no pointers.
                assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWPID) }, 0);
                let vmm = Vmm::spawn_changed(|command| {
                    // SAFETY: the closure makes one system call.
                    unsafe {
                        command.pre_exec(|| {
                            match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                                0 => Ok(()),
                                _ => Err(std::io::Error::last_os_error()),
                            }
                        })
                    };
                });
                let (vmm, process) = start(vmm, shared, files);
                let ids = status(&process, "NSpid");
                assert_eq!(ids, format!("{}\t1", vmm.child.id()));
                assert_eq!(users(&process), [FIRST_USER + vmm.child.id(); 8]);
                // Nobody hangs up.
                std::mem::forget(vmm);
                process
            });
            started.join().unwrap()
        });
        let deadline = Instant::now() + LONG;
        while !status(&process, "State").starts_with('Z') {
            assert!(Instant::now() < deadline, "the VMM outlives its client");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn the_process_is_in_jail_once_the_guest_runs() {
    const TEST: &str = "the_process_is_in_jail_once_the_guest_runs";
    if !kvm(TEST) {
        return;
    }
    if !is_root() {
        println!("SKIPPED: {TEST}: not root");
        return;
    }
    let directory = TempDir::new().unwrap();
    std::fs::write(directory.as_path().join("file"), "content").unwrap();
    let (vmm, process) = confined(&directory, true);
    let own = FIRST_USER + vmm.child.id();
    for (name, thread) in threads(&process) {
        if name == "fs" {
            // What files take, and neither CAP_SYS_ADMIN nor CAP_NET_ADMIN.
            assert_eq!(capabilities(&thread), [0, 0x8800_00df, 0x8800_00df, 0]);
            assert_eq!(users(&thread), [0; 8]);
        } else {
            assert_eq!(capabilities(&thread), [0; 4], "{name}");
            assert_eq!(users(&thread), [own; 8], "{name}");
            assert_eq!(status(&thread, "Groups"), "", "{name}");
        }
    }
    assert_namespaces(&process, &["mnt", "net", "ipc", "uts"]);
    let root = process.join("root");
    let list = |path: &Path| {
        let mut names: Vec<_> = std::fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort_unstable();
        names
    };
    assert_eq!(list(&root), ["proc", "shared0", "vsock"]);
    assert_eq!(list(&root.join("proc/self")), ["fd", "mountinfo"]);
    assert_eq!(list(&root.join("shared0")), ["file"]);
    // Nothing else is mounted, and the root can be written by nobody.
    let mounts = std::fs::read_to_string(process.join("mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 5, "{mounts}");
    let error = std::fs::write(root.join("new"), "").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS), "{error}");
    assert_eq!(
        std::fs::read_link(process.join("cwd")).unwrap(),
        Path::new("/")
    );
}

/// Soft and hard, as the kernel tells them.
fn limit(process: &Path, name: &str) -> [String; 2] {
    let limits = std::fs::read_to_string(process.join("limits")).unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix(name));
    let mut numbers = line.expect(name).split_whitespace();
    [(); 2].map(|()| numbers.next().unwrap().to_owned())
}

#[test]
fn the_process_can_take_little_of_the_host() {
    const TEST: &str = "the_process_can_take_little_of_the_host";
    if !kvm(TEST) {
        return;
    }
    if !is_root() {
        println!("SKIPPED: {TEST}: not root");
        return;
    }
    let directory = TempDir::new().unwrap();
    let ours = Path::new("/proc/self");
    let many = limit(ours, "Max open files")[1].clone();
    assert!(many.parse::<u64>().is_ok_and(|many| many > 4096), "{many}");
    for (user, files) in [
        ("own", false),
        ("own", true),
        ("4711", false),
        ("kept", false),
    ] {
        let vmm = Vmm::spawn_as(&["--user", user], &[]);
        let (_vmm, process) = start(vmm, &directory, files);
        let is = |name: &str, wanted: &str| {
            assert_eq!(limit(&process, name), [wanted; 2], "{name}: {user} {files}");
        };
        is("Max core file size", "0");
        is("Max locked memory", "8388608");
        is("Max msgqueue size", "0");
        // Each file that a guest knows takes a descriptor.
        is("Max open files", if files { &many } else { "4096" });
        // Nobody else is that user; others have processes of their own.
        match user {
            "own" => is("Max processes", "1024"),
            _ => assert_eq!(
                limit(&process, "Max processes"),
                limit(ours, "Max processes")
            ),
        }
    }
}
