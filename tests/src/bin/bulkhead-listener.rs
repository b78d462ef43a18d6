// SPDX-License-Identifier: Apache-2.0
//! A seccomp listener for tests, in a container beside the one that it decides
//! about: `bulkhead-listener SOCKET` tells what it is sent, and refuses each
//! call that it is asked about with ENOTBLK, which no file system says.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::process::ExitCode;

use anyhow::{Context, Result};
use bulkhead_tests::sys::{receive_descriptor, refuse_call};

fn main() -> ExitCode {
    match listen() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bulkhead-listener: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn listen() -> Result<()> {
    let path = std::env::args_os().nth(1).context("SOCKET is missing")?;
    let listener = UnixListener::bind(&path).context("listen")?;
    println!("listening");
    loop {
        let (stream, _) = listener.accept().context("accept")?;
        let (state, filter) = receive_descriptor(&stream).context("receive")?;
        println!("state {}", String::from_utf8_lossy(&state));
        // Each process with the filter waits for its own answers.
        std::thread::spawn(move || refuse_all(&filter));
    }
}

/// Refuses calls until nobody with the filter is left.
fn refuse_all(filter: &OwnedFd) {
    loop {
        match refuse_call(filter, libc::ENOTBLK) {
            Ok(call) => println!("refused {call}"),
            // Its process was killed meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
            Err(error) => {
                println!("ended: {error}");
                return;
            }
        }
    }
}
