// SPDX-License-Identifier: Apache-2.0

use std::{
    collections::HashMap,
    path::Path,
    sync::atomic::{AtomicU32, Ordering},
};

use async_trait::async_trait;
use bulkhead_shim_protocol::forward_ttrpc::{create_events, Events};
use protobuf::well_known_types::empty::Empty;
use tokio::net::UnixListener;
use ttrpc::{
    asynchronous::{transport::Listener, Server, TtrpcContext},
    Code,
};

use super::*;

/// What containerd would be: takes events, after refusing the first few.
#[derive(Default)]
struct Containerd {
    refuse: AtomicU32,
    taken: Mutex<Vec<String>>,
}

#[async_trait]
impl Events for Containerd {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let refuse = |left: u32| left.checked_sub(1);
        let ordering = Ordering::SeqCst;
        if self.refuse.fetch_update(ordering, ordering, refuse).is_ok() {
            return Err(ttrpc::Error::RpcStatus(ttrpc::get_status(
                Code::INTERNAL,
                "not now",
            )));
        }
        let topic = request.envelope.topic.clone();
        self.taken.lock().unwrap().push(topic);
        Ok(Empty::new())
    }
}

impl Containerd {
    fn taken(&self) -> Vec<String> {
        self.taken.lock().unwrap().clone()
    }

    async fn serve(self: &Arc<Self>, path: &Path) -> Server {
        let services: HashMap<_, _> = create_events(self.clone());
        let listener = Listener::from(UnixListener::bind(path).unwrap());
        let mut server = Server::new()
            .add_listener(listener)
            .register_service(services);
        server.start().await.unwrap();
        server
    }
}

fn event(number: usize) -> Envelope {
    Envelope {
        topic: format!("/{number}"),
        ..Default::default()
    }
}

fn topics(numbers: std::ops::Range<usize>) -> Vec<String> {
    numbers.map(|number| format!("/{number}")).collect()
}

const LIMIT: Duration = Duration::from_secs(20);

#[tokio::test]
async fn events_arrive_in_order_also_when_some_are_refused_first() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ttrpc");
    let containerd = Arc::new(Containerd::default());
    containerd.refuse.store(3, Ordering::SeqCst);
    let _server = containerd.serve(&path).await;
    let (queue, forwarder) = forwarder(path.to_str().unwrap(), &config::Shim::default());
    for number in 0..100 {
        queue.push(event(number));
    }
    tokio::spawn(forwarder.run());
    assert!(queue.drained(LIMIT).await);
    assert_eq!(containerd.taken(), topics(0..100));
}

#[tokio::test]
async fn containerd_may_come_late_and_go_and_come_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ttrpc");
    let containerd = Arc::new(Containerd::default());
    let (queue, forwarder) = forwarder(
        &format!("unix://{}", path.display()),
        &config::Shim::default(),
    );
    tokio::spawn(forwarder.run());
    queue.push(event(0));
    assert!(!queue.drained(Duration::from_millis(200)).await);
    let mut server = containerd.serve(&path).await;
    assert!(queue.drained(LIMIT).await);

    server.shutdown().await.unwrap();
    drop(server);
    std::fs::remove_file(&path).unwrap();
    queue.push(event(1));
    queue.push(event(2));
    assert!(!queue.drained(Duration::from_millis(200)).await);
    let _server = containerd.serve(&path).await;
    assert!(queue.drained(LIMIT).await);
    assert_eq!(containerd.taken(), topics(0..3));
}

#[tokio::test]
async fn an_event_that_is_never_taken_does_not_hold_up_the_next() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ttrpc");
    let containerd = Arc::new(Containerd::default());
    containerd.refuse.store(ATTEMPTS, Ordering::SeqCst);
    let _server = containerd.serve(&path).await;
    let (queue, forwarder) = forwarder(path.to_str().unwrap(), &config::Shim::default());
    tokio::spawn(forwarder.run());
    queue.push(event(0));
    queue.push(event(1));
    assert!(queue.drained(LIMIT).await);
    assert_eq!(containerd.taken(), topics(1..2));
}

#[tokio::test]
async fn the_queue_ends_somewhere() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ttrpc");
    let (queue, forwarder) = forwarder(path.to_str().unwrap(), &config::Shim::default());
    for number in 0..config::Shim::default().event_queue + 10 {
        queue.push(event(number));
    }
    let containerd = Arc::new(Containerd::default());
    let _server = containerd.serve(&path).await;
    tokio::spawn(forwarder.run());
    assert!(queue.drained(LIMIT).await);
    assert_eq!(
        containerd.taken(),
        topics(10..config::Shim::default().event_queue + 10)
    );
}

#[tokio::test]
async fn without_an_address_events_are_only_logged() {
    let (queue, forwarder) = forwarder("", &config::Shim::default());
    tokio::spawn(forwarder.run());
    queue.push(event(0));
    assert!(queue.drained(LIMIT).await);
}
