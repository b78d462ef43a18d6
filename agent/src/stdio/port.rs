// SPDX-License-Identifier: Apache-2.0
//! Connections to what listens in the pod, as `kubectl port-forward` has
//! them: to the loopback interface, which is the same for all containers.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use bulkhead_agent_protocol::agent::DialPortRequest;
use nix::errno::Errno;
use tokio::io::unix::AsyncFd;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::dial::Dialer;
use super::pump;
use crate::error::{AgentError, Result};
use crate::sys::fd;

/// How long a connection may take. It does not leave the guest: longer takes
/// only one to a listener that accepts none.
const CONNECT: Duration = Duration::from_secs(3);

/// Where a port may be listened at, in the order of the attempts.
const LOOPBACK: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::LOCALHOST),
    IpAddr::V6(Ipv6Addr::LOCALHOST),
];

/// Connects the host's stream to the port.
///
/// # Errors
/// [`AgentError::Invalid`] for a number that is no port's; nothing listens
/// there; the host does not take the stream.
pub async fn dial(dialer: &Dialer, request: &DialPortRequest) -> Result<()> {
    let port = match u16::try_from(request.port) {
        Ok(port) if port > 0 => port,
        _ => {
            return Err(AgentError::Invalid(format!(
                "port: {} is not from 1 to 65535",
                request.port
            )))
        }
    };
    let socket = connect(port).await?;
    let Some(stream) = dialer.stream(request.stream).await? else {
        return Err(AgentError::Invalid("stream: 0 is no stream".into()));
    };
    tokio::spawn(pump::both(socket, stream));
    Ok(())
}

async fn connect(port: u16) -> Result<AsyncFd<OwnedFd>> {
    let mut why = Errno::ECONNREFUSED;
    for address in LOOPBACK {
        let attempt = timeout(CONNECT, TcpStream::connect((address, port))).await;
        match attempt.unwrap_or_else(|_| Err(Errno::ETIMEDOUT.into())) {
            Ok(stream) => match watched(stream) {
                Ok(socket) => return Ok(socket),
                Err(error) => why = errno(&error),
            },
            // What IPv4 says is the better reason, unless only IPv6 is there.
            Err(error) if address.is_ipv4() => why = errno(&error),
            Err(_) => {}
        }
    }
    Err(AgentError::Step {
        step: format!("connect to port {port} of the pod's loopback interface"),
        errno: why,
    })
}

fn watched(stream: TcpStream) -> io::Result<AsyncFd<OwnedFd>> {
    fd::watched(stream.into_std()?.into())
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}
