// SPDX-License-Identifier: Apache-2.0
//! What becomes of the process when one of its threads panics: this program
//! starts itself, and in there a thread of each kind, confined as in the VMM,
//! panics. A program of its own since the panic hook ends the process.

use std::{
    io::Read,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    process::{exit, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use bulkhead_vmm::{
    confine::{self, seccomp::Mode, seccomp::Worker, Policy, User},
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
    if let ["panics", fd, worker] = *arguments.iter().map(String::as_str).collect::<Vec<_>>() {
        panics(fd.parse().expect("a number"), worker);
    }
    let kinds = Worker::ALL.map(|worker| format!("{worker:?}"));
    println!("\nrunning {} tests", kinds.len());
    for kind in &kinds {
        ends(kind);
        println!("test a_panic_of_a_thread_ends_the_process::{kind} ... ok");
    }
    let passed = kinds.len();
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

/// A device that does not expect what it gets.
struct Faulty;

impl EventHandler for Faulty {
    fn handle(&mut self, _token: u32, _events: EventSet) {
        panic!("{MESSAGE}");
    }
}

fn panics(fd: i32, kind: &str) -> ! {
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
            let device: Arc<Mutex<dyn EventHandler>> = Arc::new(Mutex::new(Faulty));
            event_loop
                .handle()
                .register(&event, EventSet::IN, Arc::downgrade(&device), 0)
                .expect("watched");
            event.write(1).expect("an event");
            thread::sleep(2 * SOON);
        }
        Worker::Control | Worker::Vcpu => {
            confine::enter(worker);
            panic!("{MESSAGE}");
        }
    }
    drop(server);
    exit(0);
}
