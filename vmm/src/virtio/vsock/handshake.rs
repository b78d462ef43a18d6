// SPDX-License-Identifier: Apache-2.0
//! The line by which a host program says which port of the guest it wants.

use std::{io, os::unix::net::UnixStream};

/// `CONNECT ` and ten digits.
const LONGEST: usize = 18;

/// A host connection whose line has not arrived whole.
#[derive(Debug)]
pub struct Handshake {
    /// Its socket, non-blocking.
    pub stream: UnixStream,
    line: Vec<u8>,
}

/// What reading on gave.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// The line is not whole.
    Waiting,
    /// The port.
    Port(u32),
    /// Not a line of the protocol, or the program is gone.
    Bad,
}

impl Handshake {
    /// Waits for a line on `stream`.
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            line: Vec::new(),
        }
    }

    /// Reads on, byte by byte: what follows the line is the guest's.
    pub fn read(&mut self) -> Progress {
        use std::io::Read;

        loop {
            let mut byte = [0];
            match self.stream.read(&mut byte) {
                Ok(0) => return Progress::Bad,
                Ok(_) if byte[0] == b'\n' => return self.port(),
                Ok(_) if self.line.len() == LONGEST => return Progress::Bad,
                Ok(_) => self.line.push(byte[0]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Progress::Waiting;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Progress::Bad,
            }
        }
    }

    fn port(&self) -> Progress {
        std::str::from_utf8(&self.line)
            .ok()
            .and_then(|line| line.strip_prefix("CONNECT "))
            .filter(|port| port.bytes().all(|byte| byte.is_ascii_digit()))
            .and_then(|port| port.parse().ok())
            .map_or(Progress::Bad, Progress::Port)
    }
}
