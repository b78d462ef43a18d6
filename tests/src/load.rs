// SPDX-License-Identifier: Apache-2.0
//! What a program does to a disk, to files and to a connection, timed with its
//! own clock. The same program runs in a guest and, as its peer, on the host.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use anyhow::{bail, ensure, Context, Result};
use nix::sys::socket::{connect, socket, AddressFamily, SockFlag, SockType, VsockAddr};

/// What unbuffered I/O must be aligned to.
const ALIGNMENT: usize = 4096;
/// Reads and writes of what is moved in bulk.
const CHUNK: usize = 64 << 10;
/// Reads of a file.
const FILE_CHUNK: usize = 1 << 20;

/// Name of a file for [`run`]'s `open`.
pub fn file_name(number: usize) -> String {
    format!("f{number}")
}

/// Does what `arguments` say; nanoseconds of each part:
///
/// * `read FILE random|sequential BLOCK COUNT`: so many unbuffered reads;
/// * `open DIRECTORY COUNT`: opens and closes each of its files, and then once more;
/// * `cached FILE`: reads all of it, and then once more;
/// * `echo ADDRESS SIZE COUNT`: messages that come back;
/// * `send ADDRESS BYTES`: until the other end says that all have come;
/// * `receive ADDRESS BYTES`: from asking for them to the last one.
///
/// An address is `vsock:PORT` (of the host), `unix:PATH` or `tcp:ADDRESS:PORT`;
/// [`serve`] is at the other end.
///
/// # Errors
/// The kernel's; a wrong argument.
pub fn run(arguments: &[&str]) -> Result<Vec<u64>> {
    match *arguments {
        ["read", file, order, block, count] => {
            let random = order == "random";
            read(file.as_ref(), random, block.parse()?, count.parse()?)
        }
        ["open", directory, count] => open(directory.as_ref(), count.parse()?),
        ["cached", file] => cached(file.as_ref()),
        ["echo", address, size, count] => echo(dial(address)?, size.parse()?, count.parse()?),
        ["send", address, bytes] => send(dial(address)?, bytes.parse()?),
        ["receive", address, bytes] => receive(dial(address)?, bytes.parse()?),
        _ => bail!("no such load: {arguments:?}"),
    }
}

fn nanoseconds(since: Instant) -> Result<u64> {
    Ok(u64::try_from(since.elapsed().as_nanos())?)
}

fn read(path: &Path, random: bool, block: usize, count: u64) -> Result<Vec<u64>> {
    let file = open_unbuffered(path).with_context(|| format!("open {}", path.display()))?;
    let mut buffer = vec![0; block + ALIGNMENT];
    let at = buffer.as_ptr().align_offset(ALIGNMENT);
    let buffer = &mut buffer[at..at + block];
    let blocks = length(&file)? / block as u64;
    ensure!(blocks > 0, "{} is smaller than a block", path.display());
    // Xorshift, the same in each run.
    let mut number = 0x2545_f491_4f6c_dd1d_u64;
    let begin = Instant::now();
    for index in 0..count {
        number ^= number << 13;
        number ^= number >> 7;
        number ^= number << 17;
        let place = if random { number } else { index } % blocks;
        file.read_exact_at(buffer, place * block as u64)?;
    }
    Ok(vec![nanoseconds(begin)?])
}

/// A file in memory needs no buffer, and a tmpfs before Linux 6.6 refuses to be
/// asked for none.
fn open_unbuffered(path: &Path) -> std::io::Result<File> {
    let mut file = OpenOptions::new();
    match file.read(true).custom_flags(libc::O_DIRECT).open(path) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => File::open(path),
        opened => opened,
    }
}

/// Of a disk as well, of which metadata says nothing.
fn length(mut file: &File) -> Result<u64> {
    use std::io::{Seek, SeekFrom};
    Ok(file.seek(SeekFrom::End(0))?)
}

fn open(directory: &Path, count: usize) -> Result<Vec<u64>> {
    let paths: Vec<_> = (0..count).map(|n| directory.join(file_name(n))).collect();
    let mut took = Vec::new();
    for _ in 0..2 {
        let begin = Instant::now();
        for path in &paths {
            drop(File::open(path)?);
        }
        took.push(nanoseconds(begin)?);
    }
    Ok(took)
}

fn cached(path: &Path) -> Result<Vec<u64>> {
    let file = File::open(path)?;
    let mut buffer = vec![0; FILE_CHUNK];
    let mut took = Vec::new();
    for _ in 0..2 {
        let begin = Instant::now();
        let mut at = 0;
        loop {
            match file.read_at(&mut buffer, at)? {
                0 => break,
                read => at += read as u64,
            }
        }
        took.push(nanoseconds(begin)?);
    }
    Ok(took)
}

/// What is asked of the other end: a letter and two numbers.
const REQUEST: usize = 1 + 8 + 8;
const ECHO: u8 = b'e';
const TAKE: u8 = b't';
const GIVE: u8 = b'g';

fn request(what: u8, size: u64, count: u64) -> [u8; REQUEST] {
    let mut bytes = [what; REQUEST];
    bytes[1..9].copy_from_slice(&size.to_le_bytes());
    bytes[9..].copy_from_slice(&count.to_le_bytes());
    bytes
}

fn dial(address: &str) -> Result<File> {
    let (kind, rest) = address.split_once(':').context("an address without kind")?;
    let stream: OwnedFd = match kind {
        "unix" => UnixStream::connect(rest)?.into(),
        "tcp" => TcpStream::connect(rest)?.into(),
        "vsock" => {
            let stream = socket(
                AddressFamily::Vsock,
                SockType::Stream,
                SockFlag::SOCK_CLOEXEC,
                None,
            )?;
            let host = VsockAddr::new(libc::VMADDR_CID_HOST, rest.parse()?);
            connect(stream.as_raw_fd(), &host)?;
            stream
        }
        _ => bail!("no such kind of address: {address}"),
    };
    Ok(stream.into())
}

fn echo(mut stream: File, size: usize, count: u64) -> Result<Vec<u64>> {
    stream.write_all(&request(ECHO, size as u64, count))?;
    let mut message = vec![7; size];
    let begin = Instant::now();
    for _ in 0..count {
        stream.write_all(&message)?;
        stream.read_exact(&mut message)?;
    }
    Ok(vec![nanoseconds(begin)?])
}

fn send(mut stream: File, bytes: u64) -> Result<Vec<u64>> {
    let begin = Instant::now();
    stream.write_all(&request(TAKE, 0, bytes))?;
    pour(&mut stream, bytes)?;
    stream.read_exact(&mut [0])?;
    Ok(vec![nanoseconds(begin)?])
}

fn receive(mut stream: File, bytes: u64) -> Result<Vec<u64>> {
    let begin = Instant::now();
    stream.write_all(&request(GIVE, 0, bytes))?;
    drain(&mut stream, bytes)?;
    Ok(vec![nanoseconds(begin)?])
}

fn pour(stream: &mut impl Write, bytes: u64) -> Result<()> {
    let chunk = vec![7; CHUNK];
    let mut left = bytes;
    while left > 0 {
        let part = left.min(CHUNK as u64) as usize;
        stream.write_all(&chunk[..part])?;
        left -= part as u64;
    }
    Ok(())
}

fn drain(stream: &mut impl Read, bytes: u64) -> Result<()> {
    let mut chunk = vec![0; CHUNK];
    let mut left = bytes;
    while left > 0 {
        match stream.read(&mut chunk)? {
            0 => bail!("the other end has closed with {left} bytes to come"),
            read => left = left.saturating_sub(read as u64),
        }
    }
    Ok(())
}

/// Does what one connection asks for; `mark` is called at its begin and when
/// all is done.
///
/// # Errors
/// The connection's.
pub fn serve(stream: &mut (impl Read + Write), mut mark: impl FnMut() -> Result<()>) -> Result<()> {
    let mut asked = [0; REQUEST];
    stream.read_exact(&mut asked)?;
    let number = |at: usize| {
        let bytes = asked[at..at + 8].iter().rev();
        bytes.fold(0, |number, byte| number << 8 | u64::from(*byte))
    };
    let (size, count) = (number(1), number(9));
    mark()?;
    match asked[0] {
        ECHO => {
            let mut message = vec![0; usize::try_from(size)?];
            for _ in 0..count {
                stream.read_exact(&mut message)?;
                stream.write_all(&message)?;
            }
            mark()
        }
        TAKE => {
            drain(stream, count)?;
            mark()?;
            Ok(stream.write_all(&[1])?)
        }
        GIVE => {
            pour(stream, count)?;
            mark()
        }
        other => bail!("asked for {other}"),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    #[test]
    fn a_connection_gets_what_it_asks_for() {
        let path = std::env::temp_dir().join(format!("bulkhead-load-{}", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            let mut marks = 0;
            for _ in 0..3 {
                let mut stream = listener.accept().unwrap().0;
                let mark = || {
                    marks += 1;
                    Ok(())
                };
                serve(&mut stream, mark).unwrap();
            }
            marks
        });
        let address = format!("unix:{}", path.display());
        for load in [
            ["echo", &address, "64", "5"].as_slice(),
            &["send", &address, "1000001"],
            &["receive", &address, "1000001"],
        ] {
            assert_eq!(run(load).unwrap().len(), 1, "{load:?}");
        }
        std::fs::remove_file(path).unwrap();
        assert_eq!(server.join().unwrap(), 6);
    }

    #[test]
    fn files_are_opened_and_read_twice() {
        let dir = std::env::temp_dir().join(format!("bulkhead-loads-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        for number in 0..3 {
            std::fs::write(dir.join(file_name(number)), "x").unwrap();
        }
        let name = dir.to_str().unwrap();
        assert_eq!(run(&["open", name, "3"]).unwrap().len(), 2);
        assert!(run(&["open", name, "4"]).is_err());
        let file = dir.join(file_name(0));
        std::fs::write(&file, vec![1; 3 * ALIGNMENT]).unwrap();
        let file = file.to_str().unwrap();
        assert_eq!(run(&["cached", file]).unwrap().len(), 2);
        for order in ["random", "sequential"] {
            assert_eq!(run(&["read", file, order, "4096", "5"]).unwrap().len(), 1);
        }
        assert!(run(&["read", file, "random", "16384", "5"]).is_err());
        assert!(run(&["write"]).is_err());
        std::fs::remove_dir_all(dir).unwrap();
    }
}
