// SPDX-License-Identifier: Apache-2.0
//! The connection to the host. The agent dials, and then serves ttrpc on what
//! it dialled; when the connection ends (the virtual machine was cloned, or
//! the host's side restarted) it dials again.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::task::{ready, Context, Poll};
use std::time::{Duration, Instant};

use bulkhead_agent_protocol::AGENT_PORT;
use futures_core::Stream;
use nix::errno::Errno;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep;
use ttrpc::r#async::transport::Listener;
use ttrpc::r#async::{Server, Service};

use crate::error::{AgentError, Result};
use crate::sandbox::Times;
use crate::stdio::dial;
use crate::sys::{fd, host};

const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// Serves the host for ever with `services`.
///
/// # Errors
/// When the server cannot be started.
pub async fn serve_host(services: HashMap<String, Service>, times: &Times) -> Result<()> {
    let (connections, incoming) = mpsc::unbounded_channel();
    let mut server = Server::new()
        .add_listener(Listener::new(Incoming(incoming)))
        .register_service(services);
    server
        .start()
        .await
        .map_err(|error| AgentError::Internal(format!("start server: {error}")))?;
    let mut pause = FIRST_PAUSE;
    let mut failures: u64 = 0;
    loop {
        match dial::vsock(AGENT_PORT).await {
            Ok(stream) => {
                failures = 0;
                let begin = Instant::now();
                times
                    .ready_ns
                    .store(host::monotonic_ns(), Ordering::Relaxed);
                crate::info!("msg=\"connected to the host\" port={AGENT_PORT}");
                let (closed, end) = oneshot::channel();
                let connection = Connection::new(stream, closed);
                if connections.send(connection).is_err() {
                    return Err(AgentError::Internal("the server ended".into()));
                }
                // Ends when the server drops the connection.
                let _ = end.await;
                crate::info!("msg=\"connection to the host ended\"");
                // A host that takes connections and drops them is not dialled
                // as fast as it does.
                if begin.elapsed() > LONGEST_PAUSE {
                    pause = FIRST_PAUSE;
                }
            }
            Err(error) => {
                failures += 1;
                // Often enough to be seen, seldom enough to be read.
                if failures.is_power_of_two() {
                    crate::warn!(
                        "msg=\"cannot reach the host, trying again\" port={AGENT_PORT} attempts={failures} error=\"{error}\""
                    );
                }
            }
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Connections for the server, as a listener would give them.
struct Incoming(mpsc::UnboundedReceiver<Connection>);

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(cx).map(|item| item.map(Ok))
    }
}

/// A connection that tells when it is dropped.
struct Connection {
    stream: Arc<AsyncFd<OwnedFd>>,
    /// Ends when the socket is in error; none once it was. A socket that the
    /// transport's reset closed, as in a clone, has only that: it never becomes
    /// readable.
    failed: Option<Pin<Box<dyn Future<Output = ()> + Send + Sync>>>,
    _closed: oneshot::Sender<()>,
}

impl Connection {
    fn new(stream: AsyncFd<OwnedFd>, closed: oneshot::Sender<()>) -> Self {
        let stream = Arc::new(stream);
        let watched = Arc::clone(&stream);
        Self {
            stream,
            failed: Some(Box::pin(async move {
                drop(watched.ready(Interest::ERROR).await);
            })),
            _closed: closed,
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let failed = self.failed.take();
        self.failed = failed.and_then(|mut failed| match failed.as_mut().poll(cx) {
            Poll::Pending => Some(failed),
            Poll::Ready(()) => None,
        });
        if self.failed.is_none() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        loop {
            let mut guard = ready!(self.stream.poll_read_ready(cx))?;
            match fd::read(self.stream.as_fd(), buffer.initialize_unfilled()) {
                Ok(count) => {
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Err(Errno::EAGAIN) => guard.clear_ready(),
                Err(Errno::EINTR) => {}
                Err(errno) => return Poll::Ready(Err(errno.into())),
            }
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.stream.poll_write_ready(cx))?;
            match fd::write(self.stream.as_fd(), data) {
                Ok(count) => return Poll::Ready(Ok(count)),
                Err(Errno::EAGAIN) => guard.clear_ready(),
                Err(Errno::EINTR) => {}
                Err(errno) => return Poll::Ready(Err(errno.into())),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(fd::shutdown(self.stream.as_fd(), libc::SHUT_WR).map_err(Into::into))
    }
}
