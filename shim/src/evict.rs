// SPDX-License-Identifier: Apache-2.0
//! Asking a living shim to give up a container: what `delete` does where
//! containerd takes a shim for dead that is not.

use std::{os::unix::net::UnixStream, time::Duration};

use bulkhead_shim_protocol::{
    shim::{DeleteRequest, KillRequest, ShutdownRequest, WaitRequest},
    shim_ttrpc::TaskClient,
};
use tokio::time::timeout;
use ttrpc::{
    asynchronous::{transport::Socket, Client},
    context, Code,
};

/// How long all of it may take: `delete` has five seconds.
const LIMIT: Duration = Duration::from_millis(2500);

/// SIGKILL.
const KILL: u32 = 9;

/// Why a shim has not given up a container.
#[derive(Debug, thiserror::Error)]
pub enum EvictError {
    /// A system call failed.
    #[error("talk to the shim")]
    System(#[from] std::io::Error),
    /// It answers with an error.
    #[error("ask the shim")]
    Answer(#[from] ttrpc::Error),
    /// It does not answer in time.
    #[error("no answer from the shim")]
    Silent,
}

/// Kills and deletes the container; ends the shim when it was the last.
///
/// # Errors
/// When the shim cannot or does not do it.
pub fn evict(stream: UnixStream, id: &str) -> Result<(), EvictError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        stream.set_nonblocking(true)?;
        let stream = tokio::net::UnixStream::from_std(stream)?;
        let client = TaskClient::new(Client::new(Socket::new(stream)));
        match timeout(LIMIT, ask(&client, id)).await {
            Ok(answer) => Ok(answer?),
            Err(_) => Err(EvictError::Silent),
        }
    })
}

async fn ask(client: &TaskClient, id: &str) -> ttrpc::Result<()> {
    let limit = || context::with_timeout(i64::try_from(LIMIT.as_nanos()).unwrap_or(i64::MAX));
    let kill = KillRequest {
        id: id.into(),
        signal: KILL,
        all: true,
        ..Default::default()
    };
    unless_gone(client.kill(limit(), &kill).await)?;
    let wait = WaitRequest {
        id: id.into(),
        ..Default::default()
    };
    unless_gone(client.wait(limit(), &wait).await)?;
    let delete = DeleteRequest {
        id: id.into(),
        ..Default::default()
    };
    unless_gone(client.delete(limit(), &delete).await)?;
    let shutdown = ShutdownRequest {
        id: id.into(),
        ..Default::default()
    };
    client.shutdown(limit(), &shutdown).await.map(drop)
}

/// What is gone already is as it should be.
fn unless_gone<T>(answer: ttrpc::Result<T>) -> ttrpc::Result<()> {
    match answer {
        Err(ttrpc::Error::RpcStatus(status)) if status.code.enum_value() == Ok(Code::NOT_FOUND) => {
            Ok(())
        }
        other => other.map(drop),
    }
}
