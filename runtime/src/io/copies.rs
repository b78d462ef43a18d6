// SPDX-License-Identifier: Apache-2.0
//! The copies that serve one process's standard streams.

use std::{net::Shutdown, os::fd::OwnedFd, os::unix::net::UnixStream, time::Duration};

use tokio::{
    sync::watch,
    task::{AbortHandle, JoinHandle},
    time::timeout,
};

use super::{endpoint::Endpoint, pump::pump, Stdio};

/// The guest's ends of a process's standard streams: connected stream
/// sockets. With a terminal `output` is one stream for both ways.
#[derive(Debug, Default)]
pub struct GuestStreams {
    /// Standard input.
    pub input: Option<OwnedFd>,
    /// Standard output, or the terminal.
    pub output: Option<OwnedFd>,
    /// Standard error.
    pub error: Option<OwnedFd>,
}

/// Running copies. Dropping it lets them go on; [`Copies::stop`] ends them.
#[derive(Debug, Default)]
pub struct Copies {
    input: Option<AbortHandle>,
    outputs: Vec<AbortHandle>,
    /// Outputs that have not been delivered.
    open: Option<watch::Receiver<usize>>,
}

impl Copies {
    /// Starts to copy. `first_output` is called when the first byte of output
    /// has been delivered.
    ///
    /// # Errors
    /// When a descriptor is not usable.
    pub fn start(
        stdio: Stdio,
        guest: GuestStreams,
        first_output: impl Fn() + Send + Sync + Clone + 'static,
    ) -> std::io::Result<Self> {
        let mut copies = Self::default();
        let input = match (stdio.stdin, &guest.output) {
            // One stream for both ways.
            (Some(from), Some(stream)) if stdio.terminal => Some((from, stream.try_clone()?)),
            (Some(from), _) => guest.input.map(|stream| (from, stream)),
            (None, _) => {
                // At its end from the start.
                if let Some(stream) = guest.input {
                    let _ = UnixStream::from(stream).shutdown(Shutdown::Write);
                }
                None
            }
        };
        if let Some((from, stream)) = input {
            let (source, sink) = (Endpoint::new(from)?, Endpoint::new(stream)?);
            let task = tokio::spawn(feed(source, sink));
            copies.input = Some(task.abort_handle());
        }
        let (open, opened) = watch::channel(0);
        let open = std::sync::Arc::new(open);
        for (stream, to) in [(guest.output, stdio.stdout), (guest.error, stdio.stderr)] {
            let (Some(stream), Some(to)) = (stream, to) else {
                continue;
            };
            let (source, sink) = (Endpoint::new(stream)?, Endpoint::new(to)?);
            open.send_modify(|count| *count += 1);
            let delivered = Delivered(open.clone());
            let first = first_output.clone();
            let task: JoinHandle<()> = tokio::spawn(async move {
                pump(&source, &sink, first).await;
                // Closed before it counts as delivered: its reader then knows.
                drop((source, sink));
                drop(delivered);
            });
            copies.outputs.push(task.abort_handle());
        }
        copies.open = Some(opened);
        Ok(copies)
    }

    /// Takes no more input; the process has ended.
    pub fn end_input(&self) {
        if let Some(input) = &self.input {
            input.abort();
        }
    }

    /// Waits until all output has been delivered and closed. `false`: it has
    /// not been within `limit`.
    pub async fn delivered(&self, limit: Duration) -> bool {
        let Some(mut open) = self.open.clone() else {
            return true;
        };
        timeout(limit, async move {
            // An error: all that could count are gone.
            let _ = open.wait_for(|count| *count == 0).await;
        })
        .await
        .is_ok()
    }

    /// Closes everything, delivered or not.
    pub fn stop(&self) {
        self.end_input();
        for output in &self.outputs {
            output.abort();
        }
    }
}

/// Counts one output down, also when its task is ended from outside.
struct Delivered(std::sync::Arc<watch::Sender<usize>>);

impl Drop for Delivered {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

/// Input until its end, which the process is told.
async fn feed(source: Endpoint, sink: Endpoint) {
    pump(&source, &sink, || {}).await;
    drop(source);
    let _ = rustix::net::shutdown(&sink, rustix::net::Shutdown::Write);
}
