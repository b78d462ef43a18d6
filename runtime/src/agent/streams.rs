// SPDX-License-Identifier: Apache-2.0
//! Streams that the guest opens for standard input and output. Each begins
//! with its id, which the host has chosen; what comes with another id, or
//! with none in time, is closed. The guest is not trusted: however many
//! connections it opens, few are held.

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    sync::{
        atomic::{AtomicU64, Ordering},
        Arc, Mutex, MutexGuard, PoisonError,
    },
    time::Duration,
};

use tokio::{
    io::AsyncReadExt,
    net::{UnixListener, UnixStream},
    sync::{oneshot, Semaphore},
    task::JoinHandle,
    time::{sleep, timeout},
};

/// How long a connection may take to tell its id.
const INTRODUCTION: Duration = Duration::from_secs(10);

/// Connections that have not told their id yet.
const STRANGERS: usize = 32;

/// Pause after a failed accept (no descriptors left).
const PAUSE: Duration = Duration::from_millis(100);

type Waiting = Mutex<HashMap<u64, oneshot::Sender<UnixStream>>>;

/// Accepts the guest's streams; ends when dropped.
#[derive(Debug)]
pub struct Streams {
    waiting: Arc<Waiting>,
    next: AtomicU64,
    task: JoinHandle<()>,
}

/// A stream that the guest was asked for, or is about to be.
#[derive(Debug)]
pub struct Expected {
    id: u64,
    arrives: oneshot::Receiver<UnixStream>,
    waiting: Arc<Waiting>,
}

fn lock(waiting: &Waiting) -> MutexGuard<'_, HashMap<u64, oneshot::Sender<UnixStream>>> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Streams {
    /// Starts to accept.
    pub fn new(listener: UnixListener) -> Self {
        let waiting = Arc::new(Waiting::default());
        let task = tokio::spawn(accept(listener, waiting.clone()));
        Self {
            waiting,
            next: AtomicU64::new(1),
            task,
        }
    }

    /// Announces a stream; ask the guest for it by its id.
    pub fn expect(&self) -> Expected {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, arrives) = oneshot::channel();
        lock(&self.waiting).insert(id, sender);
        Expected {
            id,
            arrives,
            waiting: self.waiting.clone(),
        }
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Expected {
    /// Its id.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The stream, once the guest has opened it, non-blocking; none when it
    /// has not within `limit`.
    pub async fn arrival(mut self, limit: Duration) -> Option<OwnedFd> {
        let stream = timeout(limit, &mut self.arrives).await.ok()?.ok()?;
        stream.into_std().ok().map(OwnedFd::from)
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        lock(&self.waiting).remove(&self.id);
    }
}

async fn accept(listener: UnixListener, waiting: Arc<Waiting>) {
    let strangers = Arc::new(Semaphore::new(STRANGERS));
    loop {
        // More of them wait in the listener's queue, and then the guest does.
        let Ok(permit) = strangers.clone().acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "stream of the guest cannot be accepted");
                sleep(PAUSE).await;
                continue;
            }
        };
        let waiting = waiting.clone();
        tokio::spawn(async move {
            let _permit = permit;
            introduce(stream, &waiting).await;
        });
    }
}

async fn introduce(mut stream: UnixStream, waiting: &Waiting) {
    let id = match timeout(INTRODUCTION, stream.read_u64_le()).await {
        Ok(Ok(id)) => id,
        Ok(Err(error)) => {
            tracing::warn!(%error, "stream of the guest ended before its id");
            return;
        }
        Err(_) => {
            tracing::warn!("stream of the guest came without an id");
            return;
        }
    };
    let wanted = lock(waiting).remove(&id);
    match wanted {
        // Nobody waits any more: closed.
        Some(wanted) => drop(wanted.send(stream)),
        None => tracing::warn!(id, "stream of the guest that nobody asked for"),
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::net::UnixStream as Plain};

    use tokio::io::AsyncReadExt;

    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    struct Guest {
        dir: tempfile::TempDir,
        streams: Streams,
    }

    impl Guest {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let listener = UnixListener::bind(dir.path().join("s")).unwrap();
            Self {
                streams: Streams::new(listener),
                dir,
            }
        }

        fn dial(&self, first: &[u8]) -> Plain {
            let mut stream = Plain::connect(self.dir.path().join("s")).unwrap();
            stream.write_all(first).unwrap();
            stream
        }
    }

    #[tokio::test]
    async fn a_stream_goes_to_who_asked_for_it() {
        let guest = Guest::new();
        let (first, second) = (guest.streams.expect(), guest.streams.expect());
        let mut dialled = guest.dial(&second.id().to_le_bytes());
        dialled.write_all(b"hello").unwrap();
        drop(dialled);
        let arrived = second.arrival(SOON).await.unwrap();
        let mut stream = UnixStream::from_std(arrived.into()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "hello");
        assert!(first.arrival(Duration::from_millis(20)).await.is_none());
        assert!(lock(&guest.streams.waiting).is_empty());
    }

    #[tokio::test]
    async fn what_was_not_asked_for_is_closed() {
        let guest = Guest::new();
        for first in [&7u64.to_le_bytes()[..], b"half"] {
            let dialled = guest.dial(first);
            dialled.shutdown(std::net::Shutdown::Write).unwrap();
            dialled.set_nonblocking(true).unwrap();
            let mut dialled = UnixStream::from_std(dialled).unwrap();
            let mut rest = Vec::new();
            timeout(SOON, dialled.read_to_end(&mut rest))
                .await
                .expect("the host closes it")
                .unwrap();
            assert!(rest.is_empty());
        }
    }

    #[tokio::test]
    async fn strangers_do_not_keep_out_those_that_are_expected_for_ever() {
        let guest = Guest::new();
        let silent: Vec<Plain> = (0..STRANGERS * 2).map(|_| guest.dial(b"")).collect();
        let expected = guest.streams.expect();
        let _dialled = guest.dial(&expected.id().to_le_bytes());
        // The silent ones hold every place; when they go, there is room.
        drop(silent);
        assert!(expected.arrival(SOON).await.is_some());
    }

    #[tokio::test]
    async fn an_id_serves_once() {
        let guest = Guest::new();
        let expected = guest.streams.expect();
        let id = expected.id().to_le_bytes();
        let _first = guest.dial(&id);
        assert!(expected.arrival(SOON).await.is_some());
        let second = guest.dial(&id);
        second.set_nonblocking(true).unwrap();
        let mut second = UnixStream::from_std(second).unwrap();
        let mut rest = Vec::new();
        timeout(SOON, second.read_to_end(&mut rest))
            .await
            .expect("the host closes it")
            .unwrap();
    }
}
