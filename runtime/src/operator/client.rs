// SPDX-License-Identifier: Apache-2.0
//! Asking on an operator's socket, with a deadline: a shim that does not answer
//! keeps nobody waiting.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    net::{connect, socket_with, AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};

/// Longest answer that is taken, in bytes.
const LONGEST: usize = 16 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody listens.
    #[error("nobody answers there")]
    Absent(#[source] io::Error),
    /// No answer in time.
    #[error("no answer within {} ms", .0.as_millis())]
    Silent(Duration),
    /// It answers that it cannot.
    #[error("{0}")]
    Refused(String),
    /// The connection broke.
    #[error("connection")]
    System(#[from] io::Error),
}

/// Asks, and takes the whole answer, within `limit`.
///
/// # Errors
/// There is none, or it is no success.
pub fn get(socket: &Path, target: &str, limit: Duration) -> Result<String, AskError> {
    let deadline = Instant::now() + limit;
    let late = |error: io::Error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => AskError::Silent(limit),
        _ => AskError::System(error),
    };
    let mut stream = ask(socket, target, limit)?;
    let mut answer = Vec::new();
    let mut part = [0; 8192];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(AskError::Silent(limit));
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut part).map_err(late)? {
            0 => break,
            _ if answer.len() > LONGEST => {
                return Err(AskError::Refused("the answer does not end".into()));
            }
            count => answer.extend_from_slice(&part[..count]),
        }
    }
    let text = String::from_utf8_lossy(&answer);
    let (head, body) = text
        .split_once("\r\n\r\n")
        .ok_or_else(|| AskError::Refused("the answer is cut off".into()))?;
    succeeded(head.lines().next().unwrap_or_default())?;
    Ok(body.to_owned())
}

/// Asks, and gives line after line as they come, until the other side ends.
///
/// # Errors
/// It cannot be asked, or its answer is no success.
pub fn follow(
    socket: &Path,
    target: &str,
    limit: Duration,
) -> Result<impl Iterator<Item = io::Result<String>>, AskError> {
    let stream = ask(socket, target, limit)?;
    stream.set_read_timeout(Some(limit))?;
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        let count = reader
            .read_line(&mut head)
            .map_err(|error| match error.kind() {
                io::ErrorKind::WouldBlock => AskError::Silent(limit),
                _ => AskError::System(error),
            })?;
        if count == 0 || head.len() > 8192 {
            return Err(AskError::Refused("the answer is cut off".into()));
        }
    }
    succeeded(head.lines().next().unwrap_or_default())?;
    // What happens next may be long in coming.
    reader.get_ref().set_read_timeout(None)?;
    Ok(reader.lines())
}

fn succeeded(line: &str) -> Result<(), AskError> {
    match line.split(' ').nth(1) {
        Some("200") => Ok(()),
        _ => Err(AskError::Refused(format!("it answers {line:?}"))),
    }
}

fn ask(socket: &Path, target: &str, limit: Duration) -> Result<UnixStream, AskError> {
    let fd = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .map_err(io::Error::from)?;
    let address = SocketAddrUnix::new(socket).map_err(io::Error::from)?;
    // Never waits: a full queue means that nobody takes from it.
    match connect(&fd, &address) {
        Ok(()) => {}
        Err(Errno::AGAIN) => return Err(AskError::Silent(limit)),
        Err(error) => return Err(AskError::Absent(error.into())),
    }
    let mut stream = UnixStream::from(fd);
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(limit))?;
    stream.write_all(
        format!("GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").as_bytes(),
    )?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixListener, time::Instant};

    use super::*;

    #[test]
    fn nobody_is_waited_for_too_long() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("o");
        let limit = Duration::from_millis(50);
        assert!(matches!(get(&path, "/", limit), Err(AskError::Absent(_))));
        let listener = UnixListener::bind(&path).unwrap();
        // It listens, and never answers.
        assert!(matches!(get(&path, "/", limit), Err(AskError::Silent(_))));
        assert!(matches!(
            follow(&path, "/", limit),
            Err(AskError::Silent(_))
        ));
        drop(listener);
        // Programs that other tests start have the listener until they are
        // executed.
        let end = Instant::now() + Duration::from_secs(10);
        while !matches!(get(&path, "/", limit), Err(AskError::Absent(_))) {
            assert!(Instant::now() < end);
        }
    }
}
