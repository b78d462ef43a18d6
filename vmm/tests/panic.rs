// SPDX-License-Identifier: Apache-2.0
//! What becomes of the process when one of its threads panics: this program
//! starts itself, and in there a thread of each kind, confined as in the VMM,
//! panics, or aborts. A program of its own since the panic hook ends the process.
//! Without any of the rules for it, the kernel ends it before that.

use std::{
    io::Read,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::process::ExitStatusExt,
    },
    process::{exit, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use bulkhead_vmm::{
    confine::{
        self,
        rules::allowed,
        seccomp::{Mode, Worker, LEFT_OUT},
        Policy, User,
    },
    control::{self, Server},
    event::{EventHandler, EventLoop},
    timeline::Stamps,
};
use bulkhead_vmm_api::{Channel, Event, ExitReason, FromVmm};
use nix::fcntl::{fcntl, FcntlArg, FdFlag};
use vmm_sys_util::{epoll::EventSet, eventfd::EventFd};

/// How long the end may take.
const SOON: Duration = Duration::from_secs(20);

const MESSAGE: &str = "a device is at fault";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    if let [how @ ("panics" | "aborts"), fd, worker] = arguments[..] {
        panics(fd.parse().expect("a number"), worker, how == "aborts");
    }
    let kinds = Worker::ALL.map(|worker| format!("{worker:?}"));
    println!("\nrunning {} tests", kinds.len() + 1);
    for kind in &kinds {
        ends(kind);
        println!("test a_panic_of_a_thread_ends_the_process::{kind} ... ok");
    }
    println!(
        "test what_ends_a_process_is_needed_for_that ... {}",
        needed()
    );
    let passed = kinds.len() + 1;
    println!(
        "\ntest result: ok. {passed} passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n"
    );
}

/// A process in which such a thread panics ends at once and says why, though
/// another thread, as a vCPU, never does.
fn ends(kind: &str) {
    let (ours, theirs) = Channel::pair().expect("a pair of sockets");
    fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty())).expect("inherited");
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .args(["panics", &theirs.as_raw_fd().to_string(), kind])
        .stderr(Stdio::piped())
        .spawn()
        .expect("this program runs");
    drop(theirs);
    let deadline = Instant::now() + SOON;
    let status = loop {
        match child.try_wait().expect("a child") {
            Some(status) => break status,
            None if Instant::now() > deadline => {
                let _ = child.kill();
                panic!("{kind}: the process goes on after the panic");
            }
            None => thread::sleep(Duration::from_millis(5)),
        }
    };
    let mut said = String::new();
    let mut stderr = child.stderr.take().expect("it is a pipe");
    stderr.read_to_string(&mut said).expect("text");
    // By itself: a forbidden system call would have killed it.
    let code = ExitReason::VmmError.code();
    assert_eq!(status.code(), Some(code), "{kind}: {status}: {said}");
    assert!(said.contains(MESSAGE), "{kind}: {said}");
    let (event, _) = ours.receive::<FromVmm>().expect("an event");
    assert_eq!(event, FromVmm::Event(Event::Ended(ExitReason::VmmError)));
}

/// Calls that a panic, or an end by `abort`, takes of any thread. Tests of what
/// else the rules allow leave them out: `src/confine/tests.rs` and
/// `tests/tiny_guests/rules.rs`.
const LAST: [(&str, &[i64]); 2] = [
    (
        "panics",
        &[libc::SYS_write, libc::SYS_sendmsg, libc::SYS_exit_group],
    ),
    (
        "aborts",
        &[libc::SYS_rt_sigprocmask, libc::SYS_getpid, libc::SYS_tgkill],
    ),
];

/// How the process ends without that rule: with the signal of a forbidden call.
fn is_missed(how: &str, worker: Worker, number: usize) -> bool {
    let (_ours, theirs) = Channel::pair().expect("a pair of sockets");
    fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty())).expect("inherited");
    let number = format!("{worker:?} {number}");
    let status = Command::new(std::env::current_exe().expect("this program"))
        .args([how, &theirs.as_raw_fd().to_string(), &format!("{worker:?}")])
        .env(LEFT_OUT, &number)
        .stderr(Stdio::null())
        .status()
        .expect("this program runs");
    match status.signal() {
        Some(libc::SIGSYS) => true,
        Some(libc::SIGABRT) if how == "aborts" => false,
        signal => {
            assert_eq!(signal, None, "{how} {number}");
            false
        }
    }
}

/// What all kinds of threads are allowed for their end, they need.
fn needed() -> &'static str {
    if !cfg!(debug_assertions) {
        return "ok (SKIPPED: the filters of a release know no rules to leave out)";
    }
    let mut unneeded = Vec::new();
    for worker in Worker::ALL {
        for (how, calls) in LAST {
            for (number, rule) in allowed(worker).enumerate() {
                if calls.contains(&rule.call) && !is_missed(how, worker, number) {
                    unneeded.push((worker, how, rule));
                }
            }
        }
    }
    assert!(unneeded.is_empty(), "allowed without need: {unneeded:#?}");
    "ok"
}

/// A device that does not expect what it gets.
struct Faulty {
    aborts: bool,
}

impl EventHandler for Faulty {
    fn handle(&mut self, _token: u32, _events: EventSet) {
        end(self.aborts);
    }
}

/// The end of a thread.
fn end(aborts: bool) -> ! {
    match aborts {
        true => std::process::abort(),
        false => panic!("{MESSAGE}"),
    }
}

fn panics(fd: i32, kind: &str, aborts: bool) -> ! {
    // SAFETY: inherited for this, and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    control::end_on_panic();
    confine::set_policy(Policy {
        seccomp: Mode::Kill,
        jail: false,
        keep_network: false,
        user: User::Kept,
    });
    let server = Server::new(Channel::from_fd(socket), Stamps::new()).expect("a server");
    let _vcpu = thread::spawn(|| loop {
        thread::sleep(SOON);
    });
    let worker = Worker::ALL
        .into_iter()
        .find(|worker| format!("{worker:?}") == kind)
        .expect("a kind");
    match worker {
        Worker::Devices | Worker::Files => {
            let event_loop = EventLoop::spawn("io", worker).expect("a loop");
            let event = EventFd::new(0).expect("an eventfd");
            let device: Arc<Mutex<dyn EventHandler>> = Arc::new(Mutex::new(Faulty { aborts }));
            event_loop
                .handle()
                .register(&event, EventSet::IN, Arc::downgrade(&device), 0)
                .expect("watched");
            event.write(1).expect("an event");
            thread::sleep(2 * SOON);
        }
        Worker::Control | Worker::Vcpu => {
            confine::enter(worker);
            end(aborts);
        }
    }
    drop(server);
    exit(0);
}
