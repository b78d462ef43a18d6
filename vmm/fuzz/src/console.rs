// SPDX-License-Identifier: Apache-2.0
//! A guest's use of its console and its log: any descriptors, rings and control
//! messages, with somebody at the other ends who writes, and reads or does not.
#![no_main]

mod guest;

use std::{
    fs::File,
    io::{Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::Once,
};

use bulkhead_vmm::virtio::console::{Console, Outputs};
use libfuzzer_sys::fuzz_target;

/// What is written to somebody who has gone is an error, as in the VMM.
fn ignore_broken_pipes() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: ignoring a signal runs nothing.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    });
}

fn pair() -> (UnixStream, File) {
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    for socket in [&ours, &theirs] {
        socket.set_nonblocking(true).expect("a flag");
    }
    (ours, File::from(OwnedFd::from(theirs)))
}

fuzz_target!(|data: &[u8]| {
    let Some((first, rest)) = data.split_first() else {
        return;
    };
    ignore_broken_pipes();
    let (mut console, file) = pair();
    let (log, other) = pair();
    if first & 1 != 0 {
        console.write_all(&[b'i'; 3000]).expect("input");
    }
    if first & 2 != 0 {
        console.shutdown(std::net::Shutdown::Write).expect("an end");
    }
    // Nobody may be there.
    let log = (first & 4 == 0).then_some(log);
    let outputs = Outputs {
        console: Some(file),
        input: first & 8 == 0,
        log: Some(other),
    };
    let mut device = Console::new(outputs);
    guest::drive(&mut device, rest);
    let mut bytes = Vec::new();
    for mut socket in [Some(console), log].into_iter().flatten() {
        // Until there is nothing.
        let _ = socket.read_to_end(&mut bytes);
    }
    drop(device);
});
