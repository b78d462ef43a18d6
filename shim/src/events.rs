// SPDX-License-Identifier: Apache-2.0
//! Events for containerd (runtime v2, "Events"), in the order in which they
//! happened: one task sends one after the other, and waits for containerd
//! where it is being restarted. No call of containerd's ever waits for that.

use std::time::{Duration, SystemTime};

use bulkhead_runtime::sandbox::Event;
use bulkhead_shim_protocol::{
    events::{
        TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM,
        TaskPaused, TaskResumed, TaskStart,
    },
    forward::ForwardRequest,
    forward_ttrpc::EventsClient,
    types::Envelope,
    Named,
};
use protobuf::{well_known_types::any::Any, MessageField};
use tokio::{
    sync::mpsc::{UnboundedReceiver, UnboundedSender},
    time::{sleep, timeout},
};
use ttrpc::{asynchronous::Client, context};

use crate::convert::{mount, timestamp};

/// How long containerd may take to take an event.
const PATIENCE: Duration = Duration::from_secs(5);

/// Pauses between attempts; then the event is dropped, and with it all that
/// wait behind it go on.
const PAUSES: [Duration; 7] = [
    Duration::from_millis(50),
    Duration::from_millis(200),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(5),
    Duration::from_secs(10),
    Duration::from_secs(10),
];

/// An event as containerd takes it.
#[derive(Debug, Clone)]
pub struct Message {
    topic: &'static str,
    event: Any,
    at: SystemTime,
}

/// Passes the runtime's events on until it has no more.
pub async fn pass_on(mut from: UnboundedReceiver<Event>, to: UnboundedSender<Message>) {
    while let Some(event) = from.recv().await {
        match message(event) {
            Ok(message) => {
                if to.send(message).is_err() {
                    return;
                }
            }
            Err(error) => tracing::error!(%error, "event not encoded"),
        }
    }
}

/// Sends events to containerd's socket until there are no more. Without an
/// address (CRI-O) they are only logged.
pub async fn send(
    mut messages: UnboundedReceiver<Message>,
    namespace: String,
    address: Option<String>,
) {
    let mut client = None;
    while let Some(message) = messages.recv().await {
        let topic = message.topic;
        tracing::debug!(topic, "event");
        let Some(address) = &address else {
            continue;
        };
        let request = ForwardRequest {
            envelope: MessageField::some(Envelope {
                timestamp: MessageField::some(timestamp(message.at)),
                namespace: namespace.clone(),
                topic: topic.into(),
                event: MessageField::some(message.event),
                ..Default::default()
            }),
            ..Default::default()
        };
        let mut pauses = PAUSES.iter();
        while let Err(problem) = attempt(&mut client, address, &request).await {
            client = None;
            match pauses.next() {
                Some(pause) => sleep(*pause).await,
                None => {
                    tracing::error!(topic, problem, "event lost: containerd does not take it");
                    break;
                }
            }
        }
    }
}

async fn attempt(
    client: &mut Option<EventsClient>,
    address: &str,
    request: &ForwardRequest,
) -> Result<(), String> {
    let call = async {
        if client.is_none() {
            let address = match address.contains("://") {
                true => address.to_owned(),
                false => format!("unix://{address}"),
            };
            let connected = Client::connect(&address).await;
            *client = Some(EventsClient::new(connected.map_err(|e| e.to_string())?));
        }
        let Some(client) = client.as_ref() else {
            return Err("not connected".to_owned());
        };
        let limit = i64::try_from(PATIENCE.as_nanos()).unwrap_or(i64::MAX);
        let sent = client.forward(context::with_timeout(limit), request).await;
        sent.map(drop).map_err(|error| error.to_string())
    };
    timeout(PATIENCE * 2, call)
        .await
        .unwrap_or_else(|_| Err("no answer".into()))
}

fn message(event: Event) -> protobuf::Result<Message> {
    let (topic, event) = encode(event)?;
    Ok(Message {
        topic,
        event,
        at: SystemTime::now(),
    })
}

/// Topic and message of an event.
fn encode(event: Event) -> protobuf::Result<(&'static str, Any)> {
    Ok(match event {
        Event::Created {
            id,
            bundle,
            rootfs,
            stdio,
            terminal,
            pid,
        } => {
            let io = TaskIO {
                stdin: stdio.stdin,
                stdout: stdio.stdout,
                stderr: stdio.stderr,
                terminal,
                ..Default::default()
            };
            let created = TaskCreate {
                container_id: id,
                bundle: bundle.to_string_lossy().into_owned(),
                rootfs: rootfs.into_iter().map(mount).collect(),
                io: MessageField::some(io),
                pid,
                ..Default::default()
            };
            ("/tasks/create", created.to_any()?)
        }
        Event::Started {
            id,
            exec: None,
            pid,
        } => {
            let started = TaskStart {
                container_id: id,
                pid,
                ..Default::default()
            };
            ("/tasks/start", started.to_any()?)
        }
        Event::Started {
            id,
            exec: Some(exec),
            pid,
        } => {
            let started = TaskExecStarted {
                container_id: id,
                exec_id: exec,
                pid,
                ..Default::default()
            };
            ("/tasks/exec-started", started.to_any()?)
        }
        Event::ExecAdded { id, exec } => {
            let added = TaskExecAdded {
                container_id: id,
                exec_id: exec,
                ..Default::default()
            };
            ("/tasks/exec-added", added.to_any()?)
        }
        Event::Exited {
            id,
            exec,
            pid,
            status,
            at,
        } => {
            let exited = TaskExit {
                id: exec.unwrap_or_else(|| id.clone()),
                container_id: id,
                pid,
                exit_status: status,
                exited_at: MessageField::some(timestamp(at)),
                ..Default::default()
            };
            ("/tasks/exit", exited.to_any()?)
        }
        Event::Oom { id } => {
            let oom = TaskOOM {
                container_id: id,
                ..Default::default()
            };
            ("/tasks/oom", oom.to_any()?)
        }
        Event::Paused { id } => {
            let paused = TaskPaused {
                container_id: id,
                ..Default::default()
            };
            ("/tasks/paused", paused.to_any()?)
        }
        Event::Resumed { id } => {
            let resumed = TaskResumed {
                container_id: id,
                ..Default::default()
            };
            ("/tasks/resumed", resumed.to_any()?)
        }
        Event::Deleted {
            id,
            exec,
            pid,
            status,
            at,
        } => {
            let deleted = TaskDelete {
                id: exec.unwrap_or_else(|| id.clone()),
                container_id: id,
                pid,
                exit_status: status,
                exited_at: MessageField::some(timestamp(at)),
                ..Default::default()
            };
            ("/tasks/delete", deleted.to_any()?)
        }
    })
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use async_trait::async_trait;
    use bulkhead_shim_protocol::forward_ttrpc::{create_events, Events};
    use protobuf::{well_known_types::empty::Empty, Message as _};
    use tokio::sync::mpsc::unbounded_channel;
    use ttrpc::asynchronous::{Server, TtrpcContext};

    use super::*;

    #[derive(Default)]
    struct Daemon {
        taken: Mutex<Vec<Envelope>>,
        refuse: Mutex<u32>,
    }

    struct Shared(Arc<Daemon>);

    #[async_trait]
    impl Events for Shared {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let mut refuse = self.0.refuse.lock().unwrap();
            if *refuse > 0 {
                *refuse -= 1;
                let status = ttrpc::get_status(ttrpc::Code::UNAVAILABLE, "later");
                return Err(ttrpc::Error::RpcStatus(status));
            }
            self.0.taken.lock().unwrap().push(request.envelope.unwrap());
            Ok(Empty::new())
        }
    }

    #[tokio::test]
    async fn events_arrive_in_order_also_when_they_are_refused_at_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let daemon = Arc::new(Daemon::default());
        *daemon.refuse.lock().unwrap() = 2;
        let (events, from) = unbounded_channel();
        let (to, messages) = unbounded_channel();
        let passing = tokio::spawn(pass_on(from, to));
        let address = path.display().to_string();
        let sending = tokio::spawn(send(messages, "ns".into(), Some(address.clone())));
        for pid in 1..=20 {
            let id = format!("c{pid}");
            events
                .send(Event::Started {
                    id,
                    exec: None,
                    pid,
                })
                .unwrap();
        }
        drop(events);
        // containerd comes back only now.
        sleep(Duration::from_millis(20)).await;
        let mut server = Server::new()
            .bind(&format!("unix://{address}"))
            .unwrap()
            .register_service(create_events(Arc::new(Shared(daemon.clone()))));
        server.start().await.unwrap();
        timeout(Duration::from_secs(20), sending)
            .await
            .unwrap()
            .unwrap();
        passing.await.unwrap();
        server.shutdown().await.unwrap();
        let taken = daemon.taken.lock().unwrap();
        let pids: Vec<u32> = taken
            .iter()
            .map(|envelope| {
                assert_eq!(envelope.namespace, "ns");
                assert_eq!(envelope.topic, "/tasks/start");
                assert_eq!(envelope.event.type_url, "containerd.events.TaskStart");
                TaskStart::parse_from_bytes(&envelope.event.value)
                    .unwrap()
                    .pid
            })
            .collect();
        assert_eq!(pids, (1..=20).collect::<Vec<_>>());
    }

    #[test]
    fn an_exit_names_the_process() {
        let exit = |exec: Option<&str>| {
            let (topic, any) = encode(Event::Exited {
                id: "c".into(),
                exec: exec.map(Into::into),
                pid: 3,
                status: 137,
                at: SystemTime::now(),
            })
            .unwrap();
            assert_eq!(topic, "/tasks/exit");
            TaskExit::parse_from_bytes(&any.value).unwrap()
        };
        assert_eq!(exit(None).id, "c");
        assert_eq!(exit(Some("e")).id, "e");
        assert_eq!(exit(Some("e")).container_id, "c");
        assert!(exit(None).exited_at.is_some());
    }
}
