// SPDX-License-Identifier: Apache-2.0
//! Sending events to containerd, one after the other and in their order,
//! whatever becomes of containerd meanwhile.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bulkhead_runtime::{config, error::chain};
use bulkhead_shim_protocol::{
    forward::ForwardRequest, forward_ttrpc::EventsClient, types::Envelope,
};
use protobuf::MessageField;
use tokio::{
    net::UnixStream,
    sync::watch,
    time::{sleep, timeout},
};
use ttrpc::{
    asynchronous::{transport::Socket, Client},
    context,
};

use crate::socket;

/// How often one is sent that containerd does not take.
const ATTEMPTS: u32 = 6;

/// Pauses between attempts to reach containerd: from, to.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// The queue's end where events are put in. Clones are the same queue.
#[derive(Debug, Clone)]
pub struct Queue {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Events that wait at most; the oldest goes when there are more.
    /// containerd asks for the state of tasks when it comes back.
    longest: usize,
    waiting: Mutex<VecDeque<Envelope>>,
    /// How many have not been dealt with.
    open: watch::Sender<usize>,
}

/// Sends what is in the queue.
pub struct Forwarder {
    shared: Arc<Shared>,
    address: String,
    /// How long containerd may take to take one.
    patience: Duration,
    client: Option<EventsClient>,
}

/// A queue, and what sends its events to `address`; to nobody when that is
/// empty (CRI-O).
pub fn forwarder(address: &str, config: &config::Shim) -> (Queue, Forwarder) {
    let shared = Arc::new(Shared {
        longest: config.event_queue,
        waiting: Mutex::default(),
        open: watch::Sender::new(0),
    });
    let forwarder = Forwarder {
        shared: shared.clone(),
        address: address.into(),
        patience: Duration::from_millis(config.event_timeout_ms),
        client: None,
    };
    (Queue { shared }, forwarder)
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, VecDeque<Envelope>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    /// Puts an event in. Never waits.
    pub fn push(&self, envelope: Envelope) {
        let dropped = {
            let mut waiting = self.shared.waiting();
            waiting.push_back(envelope);
            match waiting.len() > self.shared.longest {
                true => waiting.pop_front(),
                false => None,
            }
        };
        match dropped {
            Some(envelope) => lost(&envelope, "containerd is away for too long"),
            None => self.shared.open.send_modify(|open| *open += 1),
        }
    }

    /// Waits until all have been sent. `false`: not within `limit`.
    pub async fn drained(&self, limit: Duration) -> bool {
        let mut open = self.shared.open.subscribe();
        let drained = timeout(limit, open.wait_for(|open| *open == 0)).await;
        drained.is_ok()
    }
}

impl Forwarder {
    /// Sends, for ever.
    pub async fn run(mut self) {
        let mut open = self.shared.open.subscribe();
        loop {
            // The sender is in `self`: it does not go.
            let _ = open.wait_for(|open| *open > 0).await;
            let next = self.shared.waiting().pop_front();
            if let Some(envelope) = next {
                self.deliver(envelope).await;
                self.shared.open.send_modify(|open| *open -= 1);
            }
        }
    }

    async fn deliver(&mut self, envelope: Envelope) {
        if self.address.is_empty() {
            tracing::debug!(topic = envelope.topic, "event, and nobody to tell");
            return;
        }
        let request = ForwardRequest {
            envelope: MessageField::some(envelope),
            ..Default::default()
        };
        for attempt in 1..=ATTEMPTS {
            let client = self.client().await;
            match call(&client, &request, self.patience).await {
                Ok(()) => {
                    self.client = Some(client);
                    return;
                }
                Err(problem) if attempt == ATTEMPTS => lost(&request.envelope, &problem),
                Err(problem) => {
                    tracing::debug!(
                        topic = request.envelope.topic,
                        problem,
                        "event not taken, sent again"
                    );
                    sleep(PAUSE.0 * attempt).await;
                }
            }
        }
    }

    /// A connection: the one there is, or a new one, however long that takes.
    async fn client(&mut self) -> EventsClient {
        if let Some(client) = self.client.take() {
            return client;
        }
        let mut pause = PAUSE.0;
        loop {
            match UnixStream::connect(socket::path_of(&self.address)).await {
                Ok(stream) => return EventsClient::new(Client::new(Socket::new(stream))),
                Err(error) => {
                    tracing::debug!(address = self.address, %error, "containerd is away");
                    sleep(pause).await;
                    pause = (pause * 2).min(PAUSE.1);
                }
            }
        }
    }
}

/// One attempt; the connection is not to be used again when it fails.
async fn call(
    client: &EventsClient,
    request: &ForwardRequest,
    patience: Duration,
) -> Result<(), String> {
    let limit = i64::try_from(patience.as_nanos()).unwrap_or(i64::MAX);
    let answer = timeout(
        patience,
        client.forward(context::with_timeout(limit), request),
    )
    .await;
    match answer {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(chain(&error)),
        Err(_) => Err("no answer".into()),
    }
}

fn lost(envelope: &Envelope, problem: &str) {
    tracing::error!(topic = envelope.topic, problem, "event lost");
}

#[cfg(test)]
mod tests;
