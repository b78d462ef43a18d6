// SPDX-License-Identifier: Apache-2.0
//! The FIFOs through which a shim gives a process its standard streams.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::{mkfifoat, Mode, CWD};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::pipe,
    sync::watch,
    task::JoinHandle,
    time::{sleep, timeout},
};

/// Pause of a reader whose writer has not come yet.
const PAUSE: Duration = Duration::from_millis(5);

/// FIFOs in a directory of their own, removed when dropped.
#[derive(Debug)]
pub struct Fifos {
    directory: PathBuf,
    pub stdin: PathBuf,
    pub stdout: PathBuf,
    /// None: a terminal has one stream for both.
    pub stderr: Option<PathBuf>,
}

impl Fifos {
    /// Makes them, for root alone.
    ///
    /// # Errors
    /// Those of the system.
    pub fn create(directory: &Path, terminal: bool) -> io::Result<Self> {
        DirBuilder::new().mode(0o700).create(directory)?;
        let fifos = Self {
            directory: directory.into(),
            stdin: directory.join("0"),
            stdout: directory.join("1"),
            stderr: (!terminal).then(|| directory.join("2")),
        };
        let paths = [&fifos.stdin, &fifos.stdout];
        for path in paths.into_iter().chain(&fifos.stderr) {
            mkfifoat(CWD, path, Mode::RUSR | Mode::WUSR)?;
        }
        Ok(fifos)
    }

    /// The way into standard input, which the shim has opened.
    ///
    /// # Errors
    /// Those of the system.
    pub fn input(&self) -> io::Result<Input> {
        // For reading, too: that never fails for want of a reader.
        let sender = pipe::OpenOptions::new()
            .read_write(true)
            .open_sender(&self.stdin)?;
        Ok(Input(sender))
    }
}

impl Drop for Fifos {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.directory) {
            eprintln!("bulkhead: remove {}: {error}", self.directory.display());
        }
    }
}

/// Standard input.
#[derive(Debug)]
pub struct Input(pipe::Sender);

impl Input {
    /// Writes all of it, however long that takes.
    ///
    /// # Errors
    /// Those of the system.
    pub async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes).await
    }
}

/// Standard output and error on their way to our own.
#[derive(Debug)]
pub struct Copied {
    tasks: Vec<JoinHandle<()>>,
    over: watch::Sender<bool>,
}

/// Takes what was written; an error ends the copying.
pub type Sink = Box<dyn FnMut(&[u8]) -> io::Result<()> + Send>;

/// Our own standard output and error.
pub fn ours() -> [Sink; 2] {
    [
        Box::new(|bytes| put(bytes, false)),
        Box::new(|bytes| put(bytes, true)),
    ]
}

impl Copied {
    /// Begins. What comes on standard output and error goes to `sinks`.
    ///
    /// # Errors
    /// Those of the system.
    pub fn begin(fifos: &Fifos, sinks: [Sink; 2]) -> io::Result<Self> {
        let over = watch::Sender::new(false);
        let mut tasks = Vec::new();
        let paths = [Some(&fifos.stdout), fifos.stderr.as_ref()];
        for (path, sink) in paths.into_iter().zip(sinks) {
            let Some(path) = path else { continue };
            let receiver = pipe::OpenOptions::new().open_receiver(path)?;
            tasks.push(tokio::spawn(copy(receiver, over.subscribe(), sink)));
        }
        Ok(Self { tasks, over })
    }

    /// The process has ended: waits until everything was copied.
    pub async fn end(self, limit: Duration) {
        self.over.send_replace(true);
        for task in self.tasks {
            // What a background process holds open is not waited for long.
            let _ = timeout(limit, task).await;
        }
    }
}

async fn copy(mut from: pipe::Receiver, over: watch::Receiver<bool>, mut sink: Sink) {
    let mut part = vec![0; 16 * 1024];
    loop {
        match from.read(&mut part).await {
            // Nobody has it open for writing: not yet, or no more.
            Ok(0) if *over.borrow() => return,
            Ok(0) => sleep(PAUSE).await,
            Ok(count) => {
                if sink(&part[..count]).is_err() {
                    return;
                }
            }
            Err(_) => return,
        }
    }
}

fn put(bytes: &[u8], error: bool) -> io::Result<()> {
    use std::io::Write as _;
    if error {
        return io::stderr().lock().write_all(bytes);
    }
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileTypeExt, PermissionsExt};

    use super::*;

    #[test]
    fn fifos_are_private_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let fifos = Fifos::create(&path, false).unwrap();
        let kind = fs::metadata(&fifos.stdout).unwrap();
        assert!(kind.file_type().is_fifo());
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o700
        );
        assert!(fifos.stderr.is_some());
        drop(fifos);
        assert!(!path.exists());
        assert!(Fifos::create(&path, true).unwrap().stderr.is_none());
    }

    #[tokio::test]
    async fn copying_ends_with_the_last_writer() {
        let dir = tempfile::tempdir().unwrap();
        let fifos = Fifos::create(&dir.path().join("x"), true).unwrap();
        let copied = Copied::begin(&fifos, ours()).unwrap();
        let mut input = fifos.input().unwrap();
        input.write(b"held").await.unwrap();
        let writer = pipe::OpenOptions::new().open_sender(&fifos.stdout).unwrap();
        sleep(PAUSE * 3).await;
        drop(writer);
        let limit = Duration::from_secs(20);
        let begin = std::time::Instant::now();
        copied.end(limit).await;
        assert!(begin.elapsed() < limit);
    }
}
