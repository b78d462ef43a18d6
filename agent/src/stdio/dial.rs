// SPDX-License-Identifier: Apache-2.0
//! Connections to the host: vsock in a guest, Unix sockets in tests.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use bulkhead_agent_protocol::{HOST_CID, STREAM_PORT};
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::error::{AgentError, Context, Result};
use crate::sys::{fd, socket};

/// How long a stream may take to connect. The host listens before it sends
/// the request, so this is a host that has gone wrong.
const CONNECT: Duration = Duration::from_secs(10);

/// Reaches the host.
#[derive(Clone, Debug)]
pub enum Dialer {
    /// The host of this virtual machine.
    Vsock,
    /// A Unix socket that stands for the host's stream port (tests).
    Unix(PathBuf),
}

impl Dialer {
    /// Opens the stream `id`; none for 0.
    ///
    /// # Errors
    /// When the host does not take the connection.
    pub async fn stream(&self, id: u64) -> Result<Option<AsyncFd<OwnedFd>>> {
        if id == 0 {
            return Ok(None);
        }
        let open = async {
            let stream = match self {
                Self::Vsock => vsock(STREAM_PORT).await,
                Self::Unix(path) => unix(path).await,
            }?;
            announce(&stream, id).await?;
            Ok::<_, io::Error>(stream)
        };
        match timeout(CONNECT, open).await {
            Ok(stream) => stream
                .map(Some)
                .step(|| format!("connect stdio stream {id}")),
            Err(_) => Err(AgentError::Timeout(format!("connect stdio stream {id}"))),
        }
    }
}

/// Connects to a port of the host.
pub async fn vsock(port: u32) -> io::Result<AsyncFd<OwnedFd>> {
    let socket = fd::watched(socket::vsock_connect(HOST_CID, port)?)?;
    drop(socket.writable().await?);
    socket::take_error(socket.as_fd())?;
    Ok(socket)
}

async fn unix(path: &PathBuf) -> io::Result<AsyncFd<OwnedFd>> {
    let stream = UnixStream::connect(path).await?.into_std()?;
    fd::watched(OwnedFd::from(stream))
}

/// The first eight bytes of a stream say which it is.
async fn announce(stream: &AsyncFd<OwnedFd>, id: u64) -> io::Result<()> {
    let bytes = id.to_le_bytes();
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let written = stream
            .async_io(tokio::io::Interest::WRITABLE, |socket| {
                Ok(fd::write(socket.as_fd(), rest)?)
            })
            .await?;
        rest = &rest[written..];
    }
    Ok(())
}
