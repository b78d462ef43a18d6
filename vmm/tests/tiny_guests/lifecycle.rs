// SPDX-License-Identifier: Apache-2.0
//! How a VM begins, runs and ends.

use std::{
    io::{BufRead, BufReader, Read},
    os::{fd::AsRawFd, unix::net::UnixListener},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use bulkhead_vmm_api::{
    BlkConfig, Call, Channel, Event, ExitReason, FromVmm, FsCache, FsConfig, Outcome, PmemConfig,
    Request, VmState, VsockConfig,
};
use vmm_sys_util::tempdir::TempDir;

use crate::{
    guest::{contents, zeros, Code, KEYBOARD, PANIC, RESET, SLEEP},
    vmm::{keep, kvm, limit, text, Setup, Vmm, LONG, VMM},
};

#[test]
fn a_vm_is_configured_booted_asked_and_stopped() {
    if !kvm("a_vm_is_configured_booted_asked_and_stopped") {
        return;
    }
    let mut setup = Setup::new(Code::new().print("up\n").halt().kernel());
    let mut serial = setup.serial();
    let mut vmm = Vmm::spawn();
    let status = vmm.status();
    assert_eq!(status.state, VmState::Unconfigured);
    assert!(status.timeline.vmm_start.is_some());
    assert_eq!(status.timeline.configured, None);
    vmm.configure(&setup).unwrap();
    let status = vmm.status();
    assert_eq!(status.state, VmState::Configured);
    assert_eq!(status.timeline.kernel_entry, None);
    vmm.call(Call::Boot).unwrap();
    let mut up = [0; 3];
    serial.read_exact(&mut up).unwrap();
    assert_eq!(&up, b"up\n");
    let status = vmm.status();
    assert_eq!(status.state, VmState::Running);
    assert_eq!(status.exits.pio, 3);
    let timeline = status.timeline;
    let stamps = [
        timeline.vmm_start,
        timeline.configured,
        timeline.jailed,
        timeline.memory_mapped,
        timeline.assembled,
        timeline.kernel_entry,
    ];
    assert!(stamps.iter().all(Option::is_some) && stamps.is_sorted());
    assert_eq!((timeline.guest_ready, timeline.restored), (None, None));
    vmm.call(Call::Shutdown).unwrap();
    assert_eq!(vmm.end(), (vec![Event::Ended(ExitReason::Stopped)], 0));
}

/// Runs a guest until it ends by itself.
fn ends(test: &str, code: Code, events: &[Event], exit_code: i32) {
    if !kvm(test) {
        return;
    }
    let mut vmm = Vmm::run(&Setup::new(code.kernel()));
    assert_eq!(vmm.end(), (events.to_vec(), exit_code));
}

#[test]
fn a_guest_powers_itself_off() {
    let events = [Event::Ended(ExitReason::PowerOff)];
    let code = Code::new().power_off();
    ends("a_guest_powers_itself_off", code, &events, 0);
}

#[test]
fn other_sleep_states_do_not_end_it() {
    // S3 first, and a soft off that is not enabled.
    let code = Code::new()
        .out(SLEEP, (3 << 2) | (1 << 5))
        .out(SLEEP, 5 << 2)
        .out(RESET, 0x42)
        .halt();
    let events = [Event::Ended(ExitReason::Reset)];
    ends("other_sleep_states_do_not_end_it", code, &events, 10);
}

#[test]
fn a_guest_resets_itself_by_its_keyboard() {
    let code = Code::new().out(KEYBOARD, 0x20).out(KEYBOARD, 0xfe).halt();
    let events = [Event::Ended(ExitReason::Reset)];
    ends("a_guest_resets_itself_by_its_keyboard", code, &events, 10);
}

#[test]
fn a_panic_is_told_before_the_end() {
    let code = Code::new().out(PANIC, 1).halt();
    let events = [Event::GuestPanicked, Event::Ended(ExitReason::Panic)];
    ends("a_panic_is_told_before_the_end", code, &events, 11);
}

#[test]
fn a_triple_fault_ends_it() {
    let events = [Event::Ended(ExitReason::TripleFault)];
    let code = Code::new().triple_fault();
    ends("a_triple_fault_ends_it", code, &events, 12);
}

#[test]
fn a_guest_finds_what_the_boot_protocol_promises() {
    if !kvm("a_guest_finds_what_the_boot_protocol_promises") {
        return;
    }
    let code = Code::new()
        .check_start_info("start info, ")
        .print_command_line()
        .print_ramdisk()
        .power_off();
    let mut setup = Setup::new(code.kernel());
    setup.config.kernel.cmdline = "quiet init=/x,".into();
    let ramdisk = setup.pass(contents(b"ramdisk\nno newline"));
    setup.config.kernel.initrd = Some(ramdisk);
    let serial = setup.serial();
    let mut vmm = Vmm::run(&setup);
    drop(setup);
    assert_eq!(vmm.end().1, 0);
    // The last line comes, too.
    let expected = "start info, quiet init=/x,ramdisk\nno newline";
    assert_eq!(text(serial), expected);
}

#[test]
fn devices_are_on_the_bus_in_their_order() {
    if !kvm("devices_are_on_the_bus_in_their_order") {
        return;
    }
    let code = (1..=5).fold(Code::new(), Code::print_device).power_off();
    let mut setup = Setup::new(code.kernel());
    let directory = TempDir::new().unwrap();
    let listener = UnixListener::bind(directory.as_path().join("vsock")).unwrap();
    let file = setup.pass(zeros(2 << 20));
    setup.config.devices.pmem.push(PmemConfig {
        id: "image".into(),
        file,
        read_only: true,
    });
    let shared = setup.pass(std::fs::File::open(directory.as_path()).unwrap());
    setup.config.devices.fs.push(FsConfig {
        tag: "shared".into(),
        directory: shared,
        cache: FsCache::Auto,
        dax_mib: 0,
        host_locks: false,
    });
    let listener = setup.pass(listener);
    setup.config.devices.vsock = Some(VsockConfig {
        cid: 3,
        listener: Some(listener),
        uds_path: "/nowhere".into(),
        ready_port: None,
    });
    let file = setup.pass(zeros(512));
    setup.config.devices.blk.push(BlkConfig {
        id: "disk".into(),
        file,
        read_only: false,
        ..BlkConfig::default()
    });
    setup.config.devices.rng = true;
    let mut serial = setup.serial();
    let mut vmm = Vmm::run(&setup);
    drop(setup);
    assert_eq!(vmm.end().1, 0);
    let mut ids = Vec::new();
    serial.read_to_end(&mut ids).unwrap();
    // Persistent memory, file system, sockets, disk, entropy.
    assert_eq!(ids, [27, 26, 19, 2, 4].map(|id| 0x40 + id));
}

#[test]
fn several_processors_run_and_stop() {
    if !kvm("several_processors_run_and_stop") {
        return;
    }
    let mut setup = Setup::new(Code::new().spin().kernel());
    setup.config.vcpus = 4;
    let mut vmm = Vmm::run(&setup);
    vmm.call(Call::Shutdown).unwrap();
    assert_eq!(vmm.end(), (vec![Event::Ended(ExitReason::Stopped)], 0));
}

#[test]
fn the_end_of_the_connection_ends_the_vmm() {
    let mut vmm = Vmm::spawn();
    vmm.hang_up();
    assert_eq!(vmm.exit_code(), ExitReason::ClientGone.code());
    if !kvm("the_end_of_the_connection_ends_the_vmm") {
        return;
    }
    for code in [Code::new().halt(), Code::new().spin()] {
        let mut vmm = Vmm::run(&Setup::new(code.kernel()));
        vmm.hang_up();
        assert_eq!(vmm.exit_code(), ExitReason::ClientGone.code());
    }
}

/// A client that is killed takes its VMM along, whatever the guest does.
#[test]
fn a_killed_client_leaves_no_vmm() {
    if !kvm("a_killed_client_leaves_no_vmm") {
        return;
    }
    let (ours, theirs) = Channel::pair().unwrap();
    limit(&ours);
    // The client is a program that starts the VMM and has the connection's
    // other end, as this test has for the moment.
    let mut command = Command::new("sh");
    command
        .args([
            "-c",
            r#""$0" --control-fd 4 3>&- 2>/dev/null & echo $!; exec 4>&-; exec sleep 1000"#,
            VMM,
        ])
        .stdout(Stdio::piped());
    keep(
        &mut command,
        &[(ours.as_raw_fd(), 3), (theirs.as_raw_fd(), 4)],
    );
    let mut client = command.spawn().unwrap();
    drop(theirs);
    let mut line = String::new();
    BufReader::new(client.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let process = PathBuf::from("/proc").join(line.trim());
    let setup = Setup::new(Code::new().spin().kernel());
    let kernel = std::os::fd::AsFd::as_fd(&setup.fds[0]);
    let configure = Call::Configure(Box::new(setup.config.clone()));
    for (id, call, fds) in [(1, configure, &[kernel][..]), (2, Call::Boot, &[])] {
        ours.send(&Request { id, call }, fds).unwrap();
        match ours.receive::<FromVmm>().unwrap().0 {
            FromVmm::Reply(reply) => assert_eq!(reply.outcome, Outcome::Done),
            other @ FromVmm::Event(_) => panic!("{other:?}"),
        }
    }
    drop(ours);
    std::thread::sleep(Duration::from_millis(200));
    assert!(is_alive(&process));
    client.kill().unwrap();
    client.wait().unwrap();
    let deadline = Instant::now() + LONG;
    while is_alive(&process) {
        assert!(Instant::now() < deadline, "the VMM outlives its client");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a process runs: one that ended may wait for its new parent.
fn is_alive(process: &Path) -> bool {
    std::fs::read_to_string(process.join("stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or("").starts_with(" Z"))
}
