// SPDX-License-Identifier: Apache-2.0
//! Moving bytes from one descriptor to another: by splice(2) where one of
//! them is a pipe, so that they do not pass through this process's memory,
//! else by read and write.

use std::{io, os::fd::AsFd};

use rustix::{io::Errno, pipe::SpliceFlags};

use super::endpoint::Endpoint;

/// Bytes moved at a time: what a pipe holds.
const CHUNK: usize = 64 * 1024;

/// Chunks moved before other tasks get a turn.
const TURN: u32 = 8;

/// How a transfer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The source has no more.
    Source,
    /// The sink takes no more.
    Sink,
}

/// What one attempt came to.
enum Step {
    Moved,
    End(End),
    SourceEmpty,
    SinkFull,
    /// Not possible between these two.
    NoSplice,
}

/// Moves everything from `source` to `sink`; `first` is called when the first
/// byte has been moved.
///
/// Where `source` fails it is taken as at its end, and `sink` as closed.
pub async fn pump(source: &Endpoint, sink: &Endpoint, first: impl FnOnce()) -> End {
    let mut first = Some(first);
    let mut turn = 0;
    loop {
        let waited = match splice(source, sink) {
            Step::Moved => {
                if let Some(first) = first.take() {
                    first();
                }
                turn += 1;
                if turn % TURN == 0 {
                    tokio::task::yield_now().await;
                }
                Ok(())
            }
            Step::End(end) => return end,
            Step::SourceEmpty => match wait_source(source, sink).await {
                Some(end) => return end,
                None => Ok(()),
            },
            Step::SinkFull => sink.writable().await.map_err(|_| End::Sink),
            Step::NoSplice => return copy(source, sink, first).await,
        };
        if let Err(end) = waited {
            return end;
        }
    }
}

/// Waits for more to read, or for the sink's other end to go.
async fn wait_source(source: &Endpoint, sink: &Endpoint) -> Option<End> {
    tokio::select! {
        biased;
        ready = source.readable() => ready.err().map(|_| End::Source),
        _ = sink.abandoned() => Some(End::Sink),
    }
}

fn splice(source: &Endpoint, sink: &Endpoint) -> Step {
    let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
    let moved =
        rustix::io::retry_on_intr(|| rustix::pipe::splice(source, None, sink, None, CHUNK, flags));
    match moved {
        Ok(0) => Step::End(End::Source),
        Ok(_) => Step::Moved,
        // Which of the two is it?
        Err(Errno::AGAIN) => match (source.is_readable(), sink.is_writable()) {
            (Ok(false), _) => Step::SourceEmpty,
            (_, Ok(false)) => Step::SinkFull,
            // Neither says so: they do not go together.
            _ => Step::NoSplice,
        },
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::BADF) => Step::NoSplice,
        Err(Errno::PIPE) => Step::End(End::Sink),
        // Of either; by hand it shows of which.
        Err(_) => Step::NoSplice,
    }
}

/// As [`pump`], through this process's memory.
async fn copy(source: &Endpoint, sink: &Endpoint, mut first: Option<impl FnOnce()>) -> End {
    let mut buffer = vec![0; CHUNK];
    let mut turn = 0;
    loop {
        let count = match rustix::io::read(source, &mut buffer[..]) {
            Ok(0) => return End::Source,
            Ok(count) => count,
            Err(Errno::AGAIN) => match wait_source(source, sink).await {
                Some(end) => return end,
                None => continue,
            },
            Err(Errno::INTR) => continue,
            // A terminal whose other side has gone, a connection reset.
            Err(_) => return End::Source,
        };
        if write_all(sink, &buffer[..count]).await.is_err() {
            return End::Sink;
        }
        if let Some(first) = first.take() {
            first();
        }
        turn += 1;
        if turn % TURN == 0 {
            tokio::task::yield_now().await;
        }
    }
}

async fn write_all(sink: &Endpoint, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        match rustix::io::write(sink.as_fd(), data) {
            Ok(count) => data = &data[count..],
            Err(Errno::AGAIN) => sink.writable().await?,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
