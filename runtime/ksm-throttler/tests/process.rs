// SPDX-License-Identifier: Apache-2.0
//! The daemon as a process, against files in place of the kernel's: that it
//! refuses, restores, comes back after SIGKILL and bears a storm. What KSM then
//! does is for the end-to-end tests.

use std::{
    fs,
    io::{Read, Write},
    os::unix::{
        fs::PermissionsExt,
        net::{UnixDatagram, UnixStream},
    },
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use bulkhead_ksm_throttler::controller::SLEEP_MS;
use nix::{
    sys::signal::{kill, Signal},
    unistd::Pid,
};
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(20);

const FILES: [(&str, &str); 8] = [
    ("run", "1"),
    ("pages_to_scan", "123"),
    ("sleep_millisecs", "45"),
    ("pages_shared", "0"),
    ("pages_sharing", "0"),
    ("pages_unshared", "1000"),
    ("pages_volatile", "0"),
    ("full_scans", "7"),
];

/// A tree with all that the daemon looks at.
struct Host {
    dir: TempDir,
}

impl Host {
    fn new() -> Self {
        let host = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        fs::create_dir_all(host.path("ksm")).unwrap();
        fs::create_dir_all(host.path("proc/41")).unwrap();
        for (name, value) in FILES {
            host.put(name, value);
        }
        for (name, text) in [
            ("comm", "ksmd\n"),
            ("cmdline", ""),
            ("schedstat", "1000000 0 0\n"),
        ] {
            fs::write(host.path("proc/41").join(name), text).unwrap();
        }
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn put(&self, name: &str, value: &str) {
        fs::write(self.path("ksm").join(name), format!("{value}\n")).unwrap();
    }

    fn get(&self, name: &str) -> String {
        let text = fs::read_to_string(self.path("ksm").join(name)).unwrap();
        text.trim().to_owned()
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulkhead-ksm-throttler"));
        for (option, file) in [
            ("--sysfs", "ksm"),
            ("--proc", "proc"),
            ("--socket", "run/ksm.sock"),
            ("--metrics-socket", "run/metrics.sock"),
            ("--state-file", "run/state.json"),
            ("--merge-group", "run/merge-group"),
        ] {
            command.arg(option).arg(self.path(file));
        }
        command
    }

    fn start(&self) -> Daemon {
        let child = self.command().stderr(Stdio::piped()).spawn().unwrap();
        let daemon = Daemon { child };
        // The first run, for what was there before.
        until("the first run", || {
            self.path("run/state.json").exists()
                && self.get("sleep_millisecs") == SLEEP_MS.to_string()
                // What a killed one left looks the same, but does not answer.
                && UnixStream::connect(self.path("run/metrics.sock")).is_ok()
        });
        daemon
    }

    fn refusal(&self) -> String {
        let Output { status, stderr, .. } = self.command().output().unwrap();
        let text = String::from_utf8(stderr).unwrap();
        assert_eq!(status.code(), Some(1), "{text}");
        text
    }

    fn is_as_found(&self) {
        for (name, value) in FILES {
            assert_eq!(self.get(name), value, "{name}");
        }
        assert!(!self.path("run/state.json").exists());
    }

    fn metrics(&self) -> String {
        let mut stream = UnixStream::connect(self.path("run/metrics.sock")).unwrap();
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
            .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }

    fn metric(&self, name: &str) -> f64 {
        let mut text = self.metrics();
        // Unlike one of the kernel's, a file of this test is empty for a moment
        // while the daemon writes to it.
        until("metrics", || {
            text = self.metrics();
            text.starts_with("HTTP/1.1 200")
        });
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(&format!("bulkhead_ksm_{name} ")));
        line.unwrap_or_else(|| panic!("no {name} in {text}"))
            .parse()
            .unwrap()
    }
}

struct Daemon {
    child: Child,
}

impl Daemon {
    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Ends it; gives its exit code and what it logged.
    fn end(mut self, signal: Signal) -> (Option<i32>, String) {
        self.signal(signal);
        let mut log = String::new();
        self.child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut log)
            .unwrap();
        (self.child.wait().unwrap().code(), log)
    }

    /// Processor time, in hundredths of a second.
    fn ticks(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let (_, rest) = stat.rsplit_once(')').unwrap();
        let words: Vec<&str> = rest.split_whitespace().collect();
        words[11].parse::<u64>().unwrap() + words[12].parse::<u64>().unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended, as it should.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn until(what: &str, mut check: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !check() {
        assert!(begin.elapsed() < LIMIT, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_kernel_without_ksm_is_refused() {
    let host = Host::new();
    fs::remove_dir_all(host.path("ksm")).unwrap();
    let text = host.refusal();
    let path = host.path("ksm").display().to_string();
    assert!(
        text.contains(&path) && text.contains("CONFIG_KSM"),
        "{text}"
    );
}

#[test]
fn unwritable_settings_are_refused_untouched() {
    let host = Host::new();
    // Root may write to any file, but not to a directory.
    fs::remove_file(host.path("ksm/sleep_millisecs")).unwrap();
    fs::create_dir(host.path("ksm/sleep_millisecs")).unwrap();
    let text = host.refusal();
    let path = host.path("ksm/sleep_millisecs").display().to_string();
    assert!(
        text.contains(&format!("{path} is not writable")) && text.contains("run as root"),
        "{text}"
    );
    assert_eq!(host.get("run"), "1");
    assert!(!host.path("run").exists());
}

#[test]
fn without_ksmd_in_sight_it_refuses() {
    let host = Host::new();
    fs::remove_dir_all(host.path("proc/41")).unwrap();
    let text = host.refusal();
    assert!(text.contains("no process named ksmd"), "{text}");
}

#[test]
fn sigterm_and_sigint_put_everything_back() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let host = Host::new();
        let daemon = host.start();
        until("ksmd to be set to work", || host.get("run") == "1");
        assert_ne!(host.get("pages_to_scan"), "123");
        let (code, log) = daemon.end(signal);
        assert_eq!(code, Some(0), "{log}");
        assert!(log.contains("settings put back"), "{log}");
        host.is_as_found();
        for socket in ["run/ksm.sock", "run/metrics.sock"] {
            assert!(!host.path(socket).exists(), "{socket}");
        }
    }
}

#[test]
fn a_run_without_progress_ends_with_ksmd_standing_still() {
    let host = Host::new();
    let daemon = host.start();
    until("the run's end", || {
        host.get("run") == "0" && host.get("sleep_millisecs") == "45"
    });
    assert_eq!(host.get("pages_to_scan"), "123");
    // KSM ran when it was found, so there is something to put back.
    assert!(host.path("run/state.json").exists());
    // A kick begins another at once.
    let kick = Instant::now();
    UnixDatagram::unbound()
        .unwrap()
        .send_to(b"", host.path("run/ksm.sock"))
        .unwrap();
    until("another run", || host.get("run") == "1");
    assert!(
        kick.elapsed() < Duration::from_secs(2),
        "{:?}",
        kick.elapsed()
    );
    let (code, log) = daemon.end(Signal::SIGTERM);
    assert_eq!(code, Some(0), "{log}");
    host.is_as_found();
}

#[test]
fn what_a_killed_daemon_left_is_put_back_at_the_next_start() {
    let host = Host::new();
    let daemon = host.start();
    let (code, _) = daemon.end(Signal::SIGKILL);
    assert_eq!(code, None);
    assert_eq!(host.get("sleep_millisecs"), SLEEP_MS.to_string());
    assert!(host.path("run/ksm.sock").exists());
    // Replaces the socket, and does not take what it finds now for what was
    // found.
    let daemon = host.start();
    UnixDatagram::unbound()
        .unwrap()
        .send_to(b"", host.path("run/ksm.sock"))
        .unwrap();
    let (code, log) = daemon.end(Signal::SIGTERM);
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("found by a daemon that died"), "{log}");
    host.is_as_found();
}

#[test]
fn a_second_daemon_is_refused() {
    let host = Host::new();
    let daemon = host.start();
    let text = host.refusal();
    assert!(text.contains("another bulkhead-ksm-throttler"), "{text}");
    // The first still hears kicks and answers.
    UnixDatagram::unbound()
        .unwrap()
        .send_to(b"", host.path("run/ksm.sock"))
        .unwrap();
    until("the kick to be counted", || {
        host.metric("kicks_total") > 0.0
    });
    daemon.end(Signal::SIGTERM);
    host.is_as_found();
}

#[test]
fn sockets_are_private() {
    let host = Host::new();
    let _daemon = host.start();
    for socket in ["run/ksm.sock", "run/metrics.sock"] {
        let mode = fs::metadata(host.path(socket))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{socket}");
    }
    let mode = fs::metadata(host.path("run")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
}

#[test]
fn a_storm_of_kicks_costs_little() {
    let host = Host::new();
    let daemon = host.start();
    let sender = UnixDatagram::unbound().unwrap();
    sender.set_nonblocking(true).unwrap();
    sender.connect(host.path("run/ksm.sock")).unwrap();
    let before = daemon.ticks();
    let begin = Instant::now();
    let mut refused = 0;
    for number in 1..=3000 {
        // A full socket refuses at once: whoever kicks never waits.
        refused += u32::from(sender.send(b"kick").is_err());
        let due = Duration::from_millis(number);
        thread::sleep(due.saturating_sub(begin.elapsed()));
    }
    let took = begin.elapsed();
    let used = daemon.ticks() - before;
    // Unoptimised: a twentieth of a processor is far too much already.
    let share = used as f64 / 100.0 / took.as_secs_f64();
    assert!(share < 0.05, "{share} of a processor, {refused} refused");
    assert_eq!(host.metric("runs_total"), 1.0);
    assert!(host.metric("kicks_total") >= 100.0);
    let (code, log) = daemon.end(Signal::SIGTERM);
    assert_eq!(code, Some(0), "{log}");
    // Not a line for each.
    assert!(log.lines().count() < 20, "{log}");
    host.is_as_found();
}
