// SPDX-License-Identifier: Apache-2.0
//! Answers on the operator's socket.

use std::{
    io,
    os::unix::net::UnixListener as Plain,
    path::Path,
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::{
        broadcast::{error::RecvError, Receiver},
        Semaphore,
    },
    time::{sleep, timeout},
};

use super::history::Happened;
use crate::{error::chain, sandbox::Observed};

/// Clients at a time.
const CLIENTS: usize = 16;

/// Longest question, in bytes.
const LONGEST: usize = 4096;

/// How long a client may take to ask, or to take a part of the answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Pause after a failed accept (no descriptors left).
const PAUSE: Duration = Duration::from_millis(100);

/// Lines of a guest's console.
const CONSOLE: usize = 2000;

/// Listens. The directory is for root alone, and so is the socket.
///
/// # Errors
/// Those of the system.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    let listener = Plain::bind(path)?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

/// Answers until the pod is gone.
pub async fn serve<P: Observed>(listener: UnixListener, pod: Weak<P>) {
    let clients = Arc::new(Semaphore::new(CLIENTS));
    loop {
        let Ok(permit) = clients.clone().acquire_owned().await else {
            return;
        };
        let client = match listener.accept().await {
            Ok((client, _)) => client,
            Err(error) => {
                tracing::debug!(%error, "operator not heard");
                sleep(PAUSE).await;
                continue;
            }
        };
        if pod.strong_count() == 0 {
            return;
        }
        let pod = pod.clone();
        tokio::spawn(async move {
            let _permit = permit;
            if let Err(error) = answer(client, &pod).await {
                tracing::debug!(%error, "operator not answered");
            }
        });
    }
}

async fn answer<P: Observed>(mut client: UnixStream, pod: &Weak<P>) -> io::Result<()> {
    let question = timeout(PATIENCE, ask(&mut client)).await??;
    let Some(pod) = pod.upgrade() else {
        return Ok(());
    };
    let target = target_of(&question).unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let text = "text/plain; charset=utf-8";
    let (status, kind, body) = match path {
        "/" | "/metrics" => (
            "200 OK",
            "text/plain; version=0.0.4; charset=utf-8",
            pod.metrics().await,
        ),
        "/state" => match serde_json::to_string(&pod.state()) {
            Ok(json) => ("200 OK", "application/json", json),
            Err(error) => ("500 Internal Server Error", text, error.to_string()),
        },
        "/console" => {
            let mut lines = pod.console(CONSOLE).join("\n");
            lines.push('\n');
            ("200 OK", text, lines)
        }
        "/kernel" => match pod.kernel_log().await {
            Ok(log) => ("200 OK", text, log),
            Err(error) => ("503 Service Unavailable", text, chain(&error)),
        },
        "/events" => return events(client, pod, query == "follow").await,
        _ => (
            "404 Not Found",
            text,
            "GET /metrics, /state, /events, /events?follow, /kernel or /console\n".into(),
        ),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    drop(pod);
    write(&mut client, head.as_bytes()).await?;
    write(&mut client, body.as_bytes()).await
}

/// A line an event; the end of the connection is the end.
async fn events<P: Observed>(mut client: UnixStream, pod: Arc<P>, follow: bool) -> io::Result<()> {
    let (past, mut live) = pod.history().listen();
    // Nobody who listens keeps a pod that has ended.
    drop(pod);
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nConnection: close\r\n\r\n";
    write(&mut client, head.as_bytes()).await?;
    for happened in &past {
        write(&mut client, &line(happened)?).await?;
    }
    match follow {
        true => go_on(&mut client, &mut live).await,
        false => Ok(()),
    }
}

/// Tells what happens until either side has gone.
async fn go_on(client: &mut UnixStream, live: &mut Receiver<Happened>) -> io::Result<()> {
    let mut rest = [0; 16];
    loop {
        tokio::select! {
            happened = live.recv() => match happened {
                Ok(happened) => write(client, &line(&happened)?).await?,
                // It was too slow, and goes on with what there is.
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return Ok(()),
            },
            // A client has no more to say, but it may go.
            said = client.read(&mut rest) => if said? == 0 {
                return Ok(());
            }
        }
    }
}

fn line(happened: &Happened) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(happened)?;
    line.push(b'\n');
    Ok(line)
}

async fn write(client: &mut UnixStream, bytes: &[u8]) -> io::Result<()> {
    timeout(PATIENCE, client.write_all(bytes)).await?
}

async fn ask(client: &mut UnixStream) -> io::Result<Vec<u8>> {
    let mut question = Vec::new();
    let mut part = [0; 512];
    while !question.windows(4).any(|end| end == b"\r\n\r\n") {
        match client.read(&mut part).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            _ if question.len() > LONGEST => return Err(io::ErrorKind::InvalidData.into()),
            count => question.extend_from_slice(&part[..count]),
        }
    }
    Ok(question)
}

/// What a GET asks for.
fn target_of(question: &[u8]) -> Option<&str> {
    let line = question.split(|byte| *byte == b'\r').next()?;
    let target = std::str::from_utf8(line).ok()?.strip_prefix("GET ")?;
    target.split(' ').next()
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
