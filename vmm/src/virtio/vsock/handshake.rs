// SPDX-License-Identifier: Apache-2.0
//! The line by which a client on the host says where to connect.

use std::{
    io,
    os::{fd::AsRawFd, unix::net::UnixStream},
};

use nix::{
    errno::Errno,
    sys::socket::{recv, MsgFlags},
};

/// The longest line, `CONNECT 4294967295\n`.
const MAX_LINE: usize = 19;

/// How far a handshake is.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// The line has not ended.
    Partial,
    /// The client wants this port of the guest's.
    Port(u32),
    /// The client is gone or speaks something else.
    Failed,
}

/// A client that has not said everything yet.
#[derive(Debug, Default)]
pub struct Handshake {
    line: Vec<u8>,
}

impl Handshake {
    /// Reads what has come of the line, and nothing beyond it: the client may
    /// send its stream's first bytes right after.
    pub fn read(&mut self, socket: &UnixStream) -> Progress {
        self.try_read(socket).unwrap_or(Progress::Failed)
    }

    fn try_read(&mut self, socket: &UnixStream) -> io::Result<Progress> {
        loop {
            let mut bytes = [0; MAX_LINE];
            let room = &mut bytes[..MAX_LINE - self.line.len()];
            let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
            let peeked = match recv(socket.as_raw_fd(), room, flags) {
                Ok(0) => return Ok(Progress::Failed),
                Ok(peeked) => peeked,
                Err(Errno::EAGAIN) => return Ok(Progress::Partial),
                Err(Errno::EINTR) => continue,
                Err(error) => return Err(error.into()),
            };
            let end = room[..peeked].iter().position(|byte| *byte == b'\n');
            let wanted = end.map_or(peeked, |end| end + 1);
            let taken = recv(
                socket.as_raw_fd(),
                &mut room[..wanted],
                MsgFlags::MSG_DONTWAIT,
            )?;
            self.line.extend_from_slice(&room[..taken]);
            if self.line.last() == Some(&b'\n') {
                return Ok(parse(&self.line).map_or(Progress::Failed, Progress::Port));
            }
            if self.line.len() == MAX_LINE {
                return Ok(Progress::Failed);
            }
        }
    }
}

/// The port of a whole line.
fn parse(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?.strip_suffix(b"\n")?;
    // Rust's parser takes a plus sign, the protocol does not.
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn a_line_may_come_byte_by_byte_and_what_follows_stays() {
        let (mut client, mut server) = UnixStream::pair().unwrap();
        let mut handshake = Handshake::default();
        for byte in b"CONNECT 1024" {
            client.write_all(&[*byte]).unwrap();
            assert_eq!(handshake.read(&server), Progress::Partial);
        }
        client.write_all(b"\nfirst bytes\n").unwrap();
        assert_eq!(handshake.read(&server), Progress::Port(1024));
        let mut rest = [0; 12];
        server.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"first bytes\n");
    }

    #[test]
    fn other_lines_fail() {
        for line in [
            &b"CONNECT \n"[..],
            b"CONNECT +1\n",
            b"CONNECT 4294967296\n",
            b"connect 1\n",
            b"CONNECT 1 \n",
            b"CONNECT 000000000000000000001\n",
            b"\n",
        ] {
            let (mut client, server) = UnixStream::pair().unwrap();
            client.write_all(line).unwrap();
            let progress = Handshake::default().read(&server);
            assert_eq!(progress, Progress::Failed, "{line:?}");
        }
        let (client, server) = UnixStream::pair().unwrap();
        drop(client);
        assert_eq!(Handshake::default().read(&server), Progress::Failed);
    }

    #[test]
    fn the_largest_port_fits() {
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(b"CONNECT 4294967295\n").unwrap();
        let progress = Handshake::default().read(&server);
        assert_eq!(progress, Progress::Port(u32::MAX));
    }
}
