// SPDX-License-Identifier: Apache-2.0
//! The guest's serial console on the host's side: to a file where one is
//! configured, else its end is kept for the error when the guest dies.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::PathBuf,
};

use rustix::{
    fs::{fcntl_setfl, OFlags},
    pipe::{pipe_with, PipeFlags},
};
use tokio::io::{unix::AsyncFd, Interest};

use super::tail::Tail;
use crate::{config::Runtime, sys};

/// A guest's console.
#[derive(Debug)]
pub struct Console {
    place: Place,
    /// How much of its end is kept or looked at, bytes.
    kept: usize,
}

#[derive(Debug)]
enum Place {
    Memory(Tail),
    File(PathBuf),
}

impl Console {
    /// Opens the console of sandbox `id`; the descriptor is for the VMM.
    /// `config` tells where it goes.
    pub fn open(config: &Runtime, id: &str) -> io::Result<(Self, OwnedFd)> {
        let prefix = &config.guest_console;
        let kept = config.console_kept_kib.saturating_mul(1024);
        if prefix.is_empty() {
            return Self::in_memory(kept);
        }
        let path = PathBuf::from(format!("{prefix}{id}"));
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&path)?;
        let place = Place::File(path);
        Ok((Self { place, kept }, file.into()))
    }

    fn in_memory(kept: usize) -> io::Result<(Self, OwnedFd)> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        // A console never waits: what does not fit is lost.
        fcntl_setfl(&writer, OFlags::NONBLOCK)?;
        fcntl_setfl(&reader, OFlags::NONBLOCK)?;
        let tail = Tail::new(kept);
        let reader =
            sys::watch(File::from(reader), Interest::READABLE).map_err(|(_, error)| error)?;
        tokio::spawn(keep(reader, tail.clone()));
        let place = Place::Memory(tail);
        Ok((Self { place, kept }, writer))
    }

    /// Its last lines, as one text that is fit to be shown; empty: nothing
    /// was written.
    pub fn last_lines(&self, lines: usize) -> String {
        self.lines(lines).join(" | ")
    }

    /// Its last lines, fit to be shown.
    pub fn lines(&self, lines: usize) -> Vec<String> {
        match &self.place {
            Place::Memory(tail) => tail.lines(lines),
            Place::File(path) => {
                end_of(path, self.kept).map_or_else(|_| Vec::new(), |tail| tail.lines(lines))
            }
        }
    }
}

fn end_of(path: &PathBuf, kept: usize) -> io::Result<Tail> {
    use std::io::{Seek, SeekFrom};

    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(kept as u64)))?;
    let mut bytes = Vec::new();
    file.take(kept as u64).read_to_end(&mut bytes)?;
    let tail = Tail::new(kept);
    tail.push(&bytes);
    Ok(tail)
}

async fn keep(reader: AsyncFd<File>, tail: Tail) {
    let mut buffer = [0; 4096];
    loop {
        let Ok(mut guard) = reader.readable().await else {
            return;
        };
        match guard.try_io(|file| {
            rustix::io::read(file.get_ref().as_fd(), &mut buffer).map_err(Into::into)
        }) {
            Ok(Ok(0) | Err(_)) => return,
            Ok(Ok(count)) => tail.push(&buffer[..count]),
            Err(_would_block) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, time::Duration};

    use super::*;

    #[tokio::test]
    async fn the_end_is_kept_without_a_file() {
        let (console, writer) = Console::open(&Runtime::default(), "x").unwrap();
        File::from(writer)
            .write_all(b"Kernel panic\r\n---[ end ]---\r\n")
            .unwrap();
        for _ in 0..100 {
            if !console.last_lines(1).is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(console.last_lines(2), "Kernel panic | ---[ end ]---");
    }

    #[tokio::test]
    async fn a_file_gets_everything() {
        let dir = tempfile::tempdir().unwrap();
        let prefix = format!("{}/console-", dir.path().display());
        let config = Runtime {
            guest_console: prefix,
            ..Runtime::default()
        };
        let (console, writer) = Console::open(&config, "x").unwrap();
        File::from(writer).write_all(b"one\ntwo\n").unwrap();
        assert_eq!(console.last_lines(1), "two");
        assert_eq!(
            std::fs::read(dir.path().join("console-x")).unwrap(),
            b"one\ntwo\n"
        );
    }
}
