// SPDX-License-Identifier: Apache-2.0
//! `bulkhead-vmm`: one VM, driven over an inherited control socket.
//!
//! The C library calls `main` itself, without Rust's preparations. They would
//! cost 40 system calls and some pages at each start, on this thread and every
//! other, for a message where a stack overflows: the guard pages, and the signal
//! that ends the process there, are the C library's.
#![no_main]

use std::{
    ffi::{c_char, c_int, CStr},
    os::fd::OwnedFd,
    process::exit,
};

use bulkhead_vmm::{
    confine::{self, seccomp::Mode, Policy, User},
    control::{self, Server},
    probe,
    timeline::{Moment, Stamps},
};
use bulkhead_vmm_api::{Channel, ExitReason};

const USAGE: &str = "\
usage: bulkhead-vmm [options] --control-fd N
           serve the control socket N (SEQPACKET)
       bulkhead-vmm --probe
           say how fast KVM runs a guest's kernel mode
       bulkhead-vmm --version

options, for finding faults:
  --seccomp kill|log|off   what comes of a forbidden system call: the process is
                           killed (the default); it happens, and the kernel's log
                           tells; nothing is forbidden
  --jail on|off            whether the process gives up capabilities and goes to
                           namespaces and a root directory of its own (default on)

options for clients:
  --network own|kept       an empty network namespace of its own (the default), or
                           the present one, which the client has made for it
  --user own|kept|N        whom the process becomes in jail, once it has opened what
                           it needs: 1879048192 plus its process id (the default);
                           nobody else; user and group N. Sockets that the guest
                           connects to, and their directory, must be open to that
                           user. Shared directories are still served by the present
                           one. A namespace of processes is for the client to make,
                           which starts this one (CLONE_NEWPID)
";

/// What the C library calls.
#[no_mangle]
extern "C" fn main(count: c_int, arguments: *const *const c_char) -> c_int {
    let words = (1..usize::try_from(count).unwrap_or(0)).map(|index| {
        // SAFETY: there are so many, each a string that stays until the
        // process's end.
        let word = unsafe { CStr::from_ptr(*arguments.add(index)) };
        word.to_str().unwrap_or("?")
    });
    start(&words.collect::<Vec<_>>());
    0
}

fn start(words: &[&str]) {
    let stamps = Stamps::new();
    stamps.set(Moment::VmmStart);
    look_at_standard_streams();
    let mut words = words;
    let mut policy = Policy {
        seccomp: Mode::Kill,
        jail: true,
        keep_network: false,
        user: User::Own,
    };
    while let [option, word, rest @ ..] = words {
        match set(&mut policy, option, word) {
            Some(Ok(())) => words = rest,
            Some(Err(problem)) => {
                eprintln!("bulkhead-vmm: {option} {word}: {problem}");
                exit(2);
            }
            None => break,
        }
    }
    match *words {
        ["--control-fd", number] => match inherited(number) {
            Ok(socket) => {
                confine::set_policy(policy);
                serve(socket, stamps);
            }
            Err(problem) => {
                eprintln!("bulkhead-vmm: --control-fd {number}: {problem}");
                exit(2);
            }
        },
        ["--probe"] => match probe::instructions_per_second() {
            Ok(speed) => println!("instructions-per-second {speed}"),
            Err(error) => {
                eprintln!("{}", control::chain(&error));
                exit(1);
            }
        },
        ["--version"] => println!("bulkhead-vmm {}", env!("CARGO_PKG_VERSION")),
        ["--help" | "-h"] => print!("{USAGE}"),
        _ => {
            eprint!("{USAGE}");
            exit(2);
        }
    }
}

/// Takes an option of how the process is confined; none when it is not one.
fn set(policy: &mut Policy, option: &str, word: &str) -> Option<Result<(), String>> {
    let one_of = |no: &str, yes: &str| match word {
        word if word == no => Ok(false),
        word if word == yes => Ok(true),
        _ => Err(format!("not {yes} or {no}")),
    };
    Some(match option {
        "--seccomp" => word.parse().map(|mode| policy.seccomp = mode),
        "--jail" => one_of("off", "on").map(|jail| policy.jail = jail),
        "--user" => word.parse().map(|user| policy.user = user),
        "--network" => one_of("own", "kept").map(|kept| policy.keep_network = kept),
        _ => return None,
    })
}

fn serve(socket: OwnedFd, stamps: std::sync::Arc<Stamps>) -> ! {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .without_time()
        .with_target(false)
        .init();
    control::end_on_panic();
    allocate_plainly();
    let reason = match Server::new(Channel::from_fd(socket), stamps) {
        Ok(server) => server.run(),
        Err(error) => {
            tracing::error!(%error, "control socket cannot be served");
            ExitReason::VmmError
        }
    };
    exit(reason.code());
}

/// A descriptor that is opened later must not be taken for one of the standard
/// streams, and what is written to somebody who has gone is an error.
fn look_at_standard_streams() {
    let mut streams = [0, 1, 2].map(|fd| libc::pollfd {
        fd,
        events: 0,
        revents: 0,
    });
    // SAFETY: the array outlives the call; the disposition is no function.
    let open = unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        libc::poll(streams.as_mut_ptr(), 3, 0) >= 0
    };
    if !open || streams.iter().any(|s| s.revents & libc::POLLNVAL != 0) {
        eprintln!(
            "bulkhead-vmm: standard input, output and error must be open (/dev/null will do)"
        );
        exit(2);
    }
}

/// One heap for all threads: another would be mapped for each, and the C
/// library reads a setting in /proc when such a heap shrinks.
fn allocate_plainly() {
    // SAFETY: takes no pointers; no other thread runs yet.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Takes an inherited descriptor by its number.
fn inherited(number: &str) -> Result<OwnedFd, String> {
    use std::os::fd::FromRawFd;

    let fd: i32 = number
        .parse()
        .map_err(|_| "not a descriptor number".to_owned())?;
    if fd < 3 {
        return Err("standard streams cannot be the control socket".into());
    }
    // The VMM starts no programs, but none should inherit it.
    // SAFETY: harmless with any number but another's, and nobody else has
    // opened one yet.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err("no such descriptor is open".into());
    }
    // SAFETY: it is open, was inherited for this, and nothing else in the
    // process knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
