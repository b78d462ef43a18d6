// SPDX-License-Identifier: Apache-2.0
//! The frames between the box's init program and its owner.
//!
//! A frame is a 12 byte header (payload length, session number, kind; each a
//! little-endian `u32`) and the payload. Both directions use the same framing,
//! on the virtio-serial port as well as on the socket of `bulkhead-box up`.
//!
//! Each output channel of a session and its standard input have a window of
//! [`WINDOW`] bytes that the receiver re-opens as it consumes, so that one
//! slow reader holds up neither the other sessions nor anybody's memory.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// Bytes a sender may have unacknowledged on one channel.
pub const WINDOW: u32 = 1 << 20;
/// Largest payload of a data frame.
pub const CHUNK: usize = 64 << 10;
/// Largest payload of any frame; more is a broken peer.
pub const MAX_PAYLOAD: usize = 4 << 20;
/// Bytes of a frame's header.
pub const HEADER: usize = 12;
/// Name of the virtio-serial port.
pub const PORT_NAME: &str = "bulkhead.box";

/// What a frame means. The comments say who sends it and what it carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// Owner: run a command; JSON [`Spec`].
    Spawn = 1,
    /// Owner: bytes for standard input.
    Stdin = 2,
    /// Owner: end of standard input.
    StdinEof = 3,
    /// Owner: terminal size; rows and columns as `u16`.
    Resize = 4,
    /// Owner: signal for the command's process; number as `u32`.
    Signal = 5,
    /// Owner: more room for output; channel (1 or 2) and bytes as `u32`.
    Credit = 6,
    /// Owner: kill everything the command started in its cgroup.
    Kill = 7,
    /// Owner: end the machine.
    PowerOff = 8,
    /// Box: commands may come; JSON [`Ready`].
    Ready = 16,
    /// Box: bytes of standard output (or of the terminal).
    Stdout = 17,
    /// Box: bytes of standard error.
    Stderr = 18,
    /// Box: the command ended and all its output was sent; JSON [`Exit`].
    Exit = 19,
    /// Box: more room for standard input; bytes as `u32`.
    StdinCredit = 20,
    /// Box: the command could not be started; text.
    SpawnFailed = 21,
}

impl Kind {
    /// The kind with this number.
    fn from_u32(v: u32) -> Option<Self> {
        use Kind::*;
        [
            Spawn,
            Stdin,
            StdinEof,
            Resize,
            Signal,
            Credit,
            Kill,
            PowerOff,
            Ready,
            Stdout,
            Stderr,
            Exit,
            StdinCredit,
            SpawnFailed,
        ]
        .into_iter()
        .find(|k| *k as u32 == v)
    }
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Session number; 0 is the machine itself.
    pub session: u32,
    /// Meaning of the payload.
    pub kind: Kind,
    /// The payload.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A frame with this content.
    pub fn new(session: u32, kind: Kind, payload: impl Into<Vec<u8>>) -> Self {
        Self {
            session,
            kind,
            payload: payload.into(),
        }
    }

    /// The frame's bytes on the wire.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER + self.payload.len());
        out.extend_from_slice(&(self.payload.len() as u32).to_le_bytes());
        out.extend_from_slice(&self.session.to_le_bytes());
        out.extend_from_slice(&(self.kind as u32).to_le_bytes());
        out.extend_from_slice(&self.payload);
        out
    }

    /// Takes one frame from the front of `buf`, or returns `None` when it is
    /// not complete yet.
    ///
    /// # Errors
    /// `InvalidData` for an unknown kind or a length over [`MAX_PAYLOAD`].
    pub fn decode(buf: &[u8]) -> io::Result<Option<(Frame, usize)>> {
        if buf.len() < HEADER {
            return Ok(None);
        }
        let (len, session, kind) = (word(buf, 0), word(buf, 4), word(buf, 8));
        let len = len as usize;
        let kind = Kind::from_u32(kind)
            .filter(|_| len <= MAX_PAYLOAD)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a frame of the box"))?;
        let Some(payload) = buf.get(HEADER..HEADER + len) else {
            return Ok(None);
        };
        Ok(Some((Frame::new(session, kind, payload), HEADER + len)))
    }

    /// Reads one frame; `None` at the end of the stream between two frames.
    ///
    /// # Errors
    /// Those of the stream, and those of [`Frame::decode`].
    pub fn read(stream: &mut impl Read) -> io::Result<Option<Frame>> {
        let mut header = [0; HEADER];
        let mut got = 0;
        while got < HEADER {
            match stream.read(&mut header[got..]) {
                Ok(0) if got == 0 => return Ok(None),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => got += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        let len = word(&header, 0) as usize;
        if len > MAX_PAYLOAD {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut whole = header.to_vec();
        whole.resize(HEADER + len, 0);
        stream.read_exact(&mut whole[HEADER..])?;
        Ok(Frame::decode(&whole)?.map(|(frame, _)| frame))
    }

    /// Writes the frame.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn write(&self, stream: &mut impl Write) -> io::Result<()> {
        stream.write_all(&self.encode())
    }
}

/// The little-endian `u32` at `at`; 0 where `buf` is too short.
pub fn word(buf: &[u8], at: usize) -> u32 {
    buf.get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_le_bytes)
}

/// A command to run in the box.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Program and arguments; the program is looked up in `PATH`.
    pub argv: Vec<String>,
    /// Environment, complete.
    pub env: Vec<(String, String)>,
    /// Working directory; `/` when empty.
    pub cwd: String,
    /// Rows and columns of a terminal to run it on.
    pub tty: Option<(u16, u16)>,
    /// Whether standard input comes over the stream; else it is `/dev/null`.
    pub stdin: bool,
    /// Milliseconds after which everything it started is killed; 0 is never.
    pub timeout_ms: u64,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code, or 128 + number of the signal that ended it.
    pub code: i32,
    /// The signal that ended it; 0 for none.
    pub signal: i32,
    /// Whether the time limit ended it.
    pub timed_out: bool,
}

impl Exit {
    /// What a command line tool exits with: 124 for a time limit, as
    /// `timeout(1)` does.
    pub fn status(&self) -> i32 {
        if self.timed_out {
            124
        } else {
            self.code
        }
    }

    /// Ended by itself with exit code 0.
    pub fn success(&self) -> bool {
        self.code == 0 && !self.timed_out
    }
}

/// What the box says of itself when it is up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// Release of the box's kernel.
    pub release: String,
    /// Milliseconds from the kernel's start to now, by its own clock.
    pub uptime_ms: u64,
    /// Complaints of the boot: modules not loaded, mounts not made.
    pub warnings: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_survives_the_wire_in_pieces() {
        let frames = [
            Frame::new(7, Kind::Stdout, b"hello".to_vec()),
            Frame::new(0, Kind::PowerOff, []),
            Frame::new(u32::MAX, Kind::Exit, vec![9; CHUNK]),
        ];
        let wire: Vec<u8> = frames.iter().flat_map(Frame::encode).collect();
        for cut in [0, 5, HEADER, HEADER + 4] {
            assert_eq!(Frame::decode(&wire[..cut]).unwrap(), None);
        }
        let mut rest = &wire[..];
        for want in &frames {
            assert_eq!(Frame::read(&mut rest).unwrap().as_ref(), Some(want));
        }
        assert_eq!(Frame::read(&mut rest).unwrap(), None);
    }

    #[test]
    fn a_frame_cut_short_is_an_error() {
        let wire = Frame::new(1, Kind::Stdin, b"abc".to_vec()).encode();
        for cut in 1..wire.len() {
            assert!(Frame::read(&mut &wire[..cut]).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let mut wire = Frame::new(1, Kind::Stdin, []).encode();
        wire[8] = 99;
        assert!(Frame::decode(&wire).is_err());
        let mut wire = Frame::new(1, Kind::Stdin, []).encode();
        wire[3] = 0xff;
        assert!(Frame::decode(&wire).is_err());
        assert!(Frame::read(&mut &wire[..]).is_err());
    }

    #[test]
    fn a_time_limit_shows_as_124() {
        let exit = Exit {
            code: 137,
            signal: 9,
            timed_out: true,
        };
        assert_eq!(exit.status(), 124);
        assert!(!exit.success());
    }
}
