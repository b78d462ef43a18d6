// SPDX-License-Identifier: Apache-2.0
//! The KVM host in a box, tested in one.

use std::fs;
use std::path::Path;
use std::process::{self, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_tests::boxed::{BoxError, Command, Event, KvmBox, Options};
use bulkhead_tests::listing;

/// The box that all tests share. It goes with this process.
fn shared() -> &'static KvmBox {
    static BOX: OnceLock<KvmBox> = OnceLock::new();
    BOX.get_or_init(|| {
        let options = Options {
            memory_mib: 2048,
            hot: vec!["/usr/bin/sha256sum".into()],
            tmpfs: vec!["/mnt/memory".into()],
            ..Options::default()
        };
        match KvmBox::start(options) {
            Ok(machine) => machine,
            Err(error) => panic!("{error}"),
        }
    })
}

fn sh(script: &str) -> Command {
    Command::new(["sh", "-c", script]).timeout(Duration::from_secs(120))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().to_owned()
}

/// What the script prints in the shared box.
fn says(script: &str) -> String {
    let output = shared().run(&sh(script)).unwrap();
    assert!(output.exit.success(), "{script}: {output:?}");
    text(&output.stdout)
}

/// Waits until no process in the box matches; the pattern must not match
/// itself.
fn gone(pattern: &str) {
    says(&format!(
        "pgrep . >/dev/null || exit 9; for i in 1 2 3 4 5 6 7 8; do pgrep -f '{pattern}' || exit 0; sleep 1; done; exit 1"
    ));
}

#[test]
fn exit_code_and_streams_come_apart() {
    let output = shared()
        .run(&sh("echo out; echo err >&2; exit 42"))
        .unwrap();
    assert_eq!(output.exit.code, 42);
    assert_eq!(output.exit.signal, 0);
    assert_eq!(text(&output.stdout), "out");
    assert_eq!(text(&output.stderr), "err");
    let output = shared().run(&sh("kill -9 $$")).unwrap();
    assert_eq!((output.exit.code, output.exit.signal), (137, 9));
}

#[test]
fn the_last_output_is_not_lost() {
    // What is left behind holds the output open; it does not hold up the end.
    let begin = Instant::now();
    let output = shared()
        .run(&sh("sleep 600 & seq 20000; echo last"))
        .unwrap();
    assert!(begin.elapsed() < Duration::from_secs(60));
    let lines = text(&output.stdout);
    assert_eq!(lines.lines().count(), 20001);
    assert!(lines.ends_with("last"));
}

#[test]
fn input_environment_and_directory_are_passed() {
    let command = sh("cat; echo $GREETING; pwd")
        .env("GREETING", "good day")
        .cwd("/usr/share")
        .stdin("from outside\n");
    let output = shared().run(&command).unwrap();
    assert_eq!(text(&output.stdout), "from outside\ngood day\n/usr/share");
}

#[test]
fn large_output_and_input_arrive_whole() {
    // 32 MiB through the box and back, by a program from the hot image.
    let data: Vec<u8> = (0..8u32 << 20).flat_map(|n| n.to_le_bytes()).collect();
    let output = shared()
        .run(
            &sh("tee /dev/fd/3 3>&1 >/mnt/memory/copy; sha256sum </mnt/memory/copy >&2")
                .stdin(data.clone()),
        )
        .unwrap();
    assert!(output.exit.success(), "{}", text(&output.stderr));
    assert!(output.stdout == data, "{} bytes", output.stdout.len());
    let digest = {
        use sha2::{Digest, Sha256};
        Sha256::digest(&data)
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect::<String>()
    };
    assert!(text(&output.stderr).starts_with(&digest));
    says("rm /mnt/memory/copy");
}

#[test]
fn a_reader_that_stalls_does_not_hold_up_others() {
    let stalled = shared().spawn(&sh("head -c 20000000 /dev/zero")).unwrap();
    assert_eq!(says("echo quick"), "quick");
    drop(stalled);
}

#[test]
fn a_time_limit_kills_all_that_was_started() {
    let command = Command::new(["sh", "-c", "echo begun; setsid sleep 4321 & sleep 4321"])
        .timeout(Duration::from_secs(2));
    let output = shared().run(&command).unwrap();
    assert!(output.exit.timed_out);
    assert_eq!(output.exit.status(), 124);
    assert_eq!(text(&output.stdout), "begun");
    gone("sleep 432[1]");
}

#[test]
fn a_dropped_command_is_killed() {
    let mut session = shared().spawn(&sh("echo up; exec sleep 5432")).unwrap();
    assert_eq!(
        session.next_event().unwrap(),
        Event::Stdout(b"up\n".to_vec())
    );
    drop(session);
    gone("sleep 543[2]");
}

#[test]
fn a_terminal_is_one_and_has_its_size() {
    let script = "tty; stty size; read line; stty size; echo \"got $line\"";
    let mut session = shared().spawn(&sh(script).tty(31, 97)).unwrap();
    let mut seen = String::new();
    let mut resized = false;
    loop {
        match session.next_event().unwrap() {
            Event::Stdout(data) => seen.push_str(&String::from_utf8_lossy(&data)),
            Event::Stderr(_) => panic!("a terminal has one output"),
            Event::Exit(exit) => {
                assert!(exit.success(), "{seen}");
                break;
            }
        }
        if !resized && seen.contains("31 97") {
            resized = true;
            session.input().resize(50, 132).unwrap();
            session.input().write(b"words\n").unwrap();
        }
    }
    assert!(seen.contains("/dev/pts/"), "{seen}");
    assert!(seen.contains("50 132"), "{seen}");
    assert!(seen.contains("got words"), "{seen}");
}

#[test]
fn signals_arrive() {
    let mut session = shared()
        .spawn(&sh(
            "trap 'echo caught; exit 5' TERM; echo ready; while :; do sleep 0.1; done",
        ))
        .unwrap();
    assert_eq!(
        session.next_event().unwrap(),
        Event::Stdout(b"ready\n".to_vec())
    );
    session.input().signal(15).unwrap();
    let mut said = Vec::new();
    let exit = loop {
        match session.next_event().unwrap() {
            Event::Exit(exit) => break exit,
            Event::Stdout(data) | Event::Stderr(data) => said.extend(data),
        }
    };
    assert_eq!(exit.code, 5);
    assert!(text(&said).contains("caught"));
}

#[test]
fn a_command_that_does_not_exist_is_an_error() {
    match shared().run(&Command::new(["no-such-program"])) {
        Err(BoxError::Spawn(why)) => assert!(why.contains("no-such-program"), "{why}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn many_commands_run_at_once() {
    let begin = Instant::now();
    thread::scope(|scope| {
        for n in 0..8 {
            scope.spawn(move || assert_eq!(says(&format!("sleep 3; echo {n}")), n.to_string()));
        }
    });
    assert!(
        begin.elapsed() < Duration::from_secs(20),
        "one after another"
    );
}

#[test]
fn what_is_written_does_not_reach_this_machine() {
    let name = format!("/usr/share/bulkhead-box-test-{}", process::id());
    assert_eq!(says(&format!("echo x >{name}; cat {name}")), "x");
    assert!(!Path::new(&name).exists());
    let file = "/etc/hostname-of-no-machine";
    says(&format!(
        "touch {file}; mkdir -p /etc/new/dir; rm /etc/passwd"
    ));
    assert!(!Path::new(file).exists());
    assert!(Path::new("/etc/passwd").exists());
    says("ln -s /run /etc/passwd; rm /etc/passwd; cp /etc/group /etc/passwd");
    for dir in ["/run", "/tmp", "/var/lib/containerd", "/mnt/memory"] {
        assert_eq!(says(&format!("stat -f -c %T {dir}")), "tmpfs", "{dir}");
    }
}

#[test]
fn files_of_this_machine_are_visible_as_they_are() {
    let mine = fs::read("/etc/os-release").unwrap();
    let output = shared()
        .run(&Command::new(["cat", "/etc/os-release"]))
        .unwrap();
    assert_eq!(output.stdout, mine);
    let stat = "stat -L -c '%s %u %g %a' /usr/bin/sha256sum /etc/shadow";
    let here = process::Command::new("sh")
        .args(["-c", stat])
        .output()
        .unwrap();
    assert_eq!(says(stat), text(&here.stdout));
}

#[test]
fn kvm_works_in_it() {
    assert_ne!(says("grep -c svm /proc/cpuinfo"), "0");
    let exe = env!("CARGO_BIN_EXE_bulkhead-box");
    assert_eq!(says(&format!("{exe} kvm")), "KVM API 12, a VM can be made");
}

#[test]
fn it_is_a_host_for_containers() {
    assert_eq!(says("stat -f -c %T /sys/fs/cgroup"), "cgroup2fs");
    let controllers = says("cat /sys/fs/cgroup/cgroup.subtree_control");
    for name in ["cpu", "memory", "pids", "cpuset", "io"] {
        assert!(controllers.split(' ').any(|c| c == name), "{controllers}");
    }
    says("test -c /dev/net/tun && test -c /dev/fuse && test -c /dev/vhost-net && test -w /dev/shm");
    says("ip link add br-test type bridge && ip link add v0 type veth peer name v1 && ip link del v0 && ip link del br-test");
    says("ip tuntap add tap-test mode tap && tc qdisc add dev tap-test ingress && ip link del tap-test");
    says("ip netns add box-test && ip netns exec box-test ip link && ip netns del box-test");
    assert!(says("ip addr show lo").contains("127.0.0.1"));
}

/// Serialises the tests that boot boxes of their own, for memory's sake.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn qemu_dies_with_an_owner_that_is_killed() {
    let _alone = alone();
    let mut owner = process::Command::new(env!("CARGO_BIN_EXE_bulkhead-box"))
        .args([
            "run",
            "--memory",
            "1024",
            "--",
            "sh",
            "-c",
            "echo up; sleep 600",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0; 3];
    std::io::Read::read_exact(&mut owner.stdout.take().unwrap(), &mut first).unwrap();
    let qemu = listing::by_program("qemu-system-x86_64")
        .into_iter()
        .find(|p| listing::parent_of(p.pid) == Some(owner.id()))
        .expect("the box has a QEMU");
    owner.kill().unwrap();
    owner.wait().unwrap();
    let begin = Instant::now();
    while listing::process(qemu.pid).is_some_and(|p| p.start == qemu.start && !p.zombie) {
        assert!(begin.elapsed() < Duration::from_secs(5), "QEMU lives on");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_box_that_dies_says_so_with_its_console() {
    let _alone = alone();
    let machine = KvmBox::start(Options {
        memory_mib: 1024,
        ..Options::default()
    })
    .unwrap();
    let error = machine
        .run(&sh(
            "echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger; sleep 60",
        ))
        .unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, BoxError::Gone(_)), "{text}");
    assert!(text.contains("sysrq triggered crash"), "{text}");
}

#[test]
fn a_boot_that_fails_says_so_with_its_console() {
    let _alone = alone();
    let options = Options {
        memory_mib: 1024,
        kernel_params: "rdinit=/nonexistent root=/dev/nowhere".into(),
        ..Options::default()
    };
    let error = KvmBox::start(options).map(|_| ()).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, BoxError::Boot { .. }), "{text}");
    assert!(text.contains("Kernel panic"), "{text}");
}

#[test]
fn a_box_stays_up_between_commands_until_it_is_sent_down() {
    let _alone = alone();
    let name = format!("test-{}", process::id());
    let tool = |args: &[&str]| {
        let output = process::Command::new(env!("CARGO_BIN_EXE_bulkhead-box"))
            .arg(args[0])
            .args(["--name", &name])
            .args(&args[1..])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        (
            output.status.code(),
            text(&output.stdout),
            text(&output.stderr),
        )
    };
    assert_eq!(tool(&["status"]).0, Some(1));
    let up = tool(&["up", "--memory", "1024"]);
    assert_eq!(up.0, Some(0), "{up:?}");
    assert_eq!(tool(&["status"]).0, Some(0));
    assert_eq!(tool(&["up", "--memory", "1024"]).0, Some(125));
    assert_eq!(
        tool(&["exec", "--", "sh", "-c", "echo $$ >/tmp/it; exit 3"]).0,
        Some(3)
    );
    let (code, out, err) = tool(&["exec", "--", "sh", "-c", "cat /tmp/it; echo e >&2"]);
    assert_eq!((code, err.as_str()), (Some(0), "e"));
    assert!(out.parse::<u32>().is_ok(), "{out}");
    let (code, _, err) = tool(&["exec", "--timeout", "1", "--", "sleep", "100"]);
    assert_eq!(code, Some(124));
    assert!(err.contains("time limit"), "{err}");
    assert_eq!(tool(&["down"]).0, Some(0));
    assert_eq!(tool(&["exec", "--", "true"]).0, Some(125));
}
