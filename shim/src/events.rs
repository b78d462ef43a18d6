// SPDX-License-Identifier: Apache-2.0
//! What happens in the pod, as containerd's events.

use std::time::SystemTime;

use bulkhead_runtime::sandbox::Event;
use bulkhead_shim_protocol::{events, types::Envelope, Named};
use protobuf::{well_known_types::any::Any, MessageField};

use crate::convert;

/// The envelope of an event that happens now.
///
/// # Errors
/// When protobuf cannot write it.
pub fn envelope(namespace: &str, event: Event) -> protobuf::Result<Envelope> {
    let (topic, event) = translate(event)?;
    Ok(Envelope {
        timestamp: MessageField::some(convert::timestamp(SystemTime::now())),
        namespace: namespace.into(),
        topic: topic.into(),
        event: MessageField::some(event),
        ..Default::default()
    })
}

fn translate(event: Event) -> protobuf::Result<(&'static str, Any)> {
    Ok(match event {
        Event::Created {
            id,
            bundle,
            rootfs,
            stdio,
            terminal,
            pid,
        } => {
            let io = events::TaskIO {
                stdin: stdio.stdin,
                stdout: stdio.stdout,
                stderr: stdio.stderr,
                terminal,
                ..Default::default()
            };
            let created = events::TaskCreate {
                container_id: id,
                bundle: bundle.to_string_lossy().into_owned(),
                rootfs: rootfs.into_iter().map(convert::mount).collect(),
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
            let started = events::TaskStart {
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
            let started = events::TaskExecStarted {
                container_id: id,
                exec_id: exec,
                pid,
                ..Default::default()
            };
            ("/tasks/exec-started", started.to_any()?)
        }
        Event::ExecAdded { id, exec } => {
            let added = events::TaskExecAdded {
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
            let exited = events::TaskExit {
                id: exec.unwrap_or_else(|| id.clone()),
                container_id: id,
                pid,
                exit_status: status,
                exited_at: MessageField::some(convert::timestamp(at)),
                ..Default::default()
            };
            ("/tasks/exit", exited.to_any()?)
        }
        Event::Oom { id } => {
            let oom = events::TaskOOM {
                container_id: id,
                ..Default::default()
            };
            ("/tasks/oom", oom.to_any()?)
        }
        Event::Paused { id } => {
            let paused = events::TaskPaused {
                container_id: id,
                ..Default::default()
            };
            ("/tasks/paused", paused.to_any()?)
        }
        Event::Resumed { id } => {
            let resumed = events::TaskResumed {
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
            let deleted = events::TaskDelete {
                id: exec.unwrap_or_else(|| id.clone()),
                container_id: id,
                pid,
                exit_status: status,
                exited_at: MessageField::some(convert::timestamp(at)),
                ..Default::default()
            };
            ("/tasks/delete", deleted.to_any()?)
        }
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bulkhead_runtime::{io::StdioPaths, sandbox::RootfsMount};
    use protobuf::Message;

    use super::*;

    fn sent<M: Message + Named>(event: Event, topic: &str) -> M {
        let envelope = envelope("ns", event).unwrap();
        assert_eq!(envelope.namespace, "ns");
        assert_eq!(envelope.topic, topic);
        assert!(envelope.timestamp.seconds > 1_700_000_000);
        assert_eq!(envelope.event.type_url, M::TYPE_URL);
        M::parse_from_bytes(&envelope.event.value).unwrap()
    }

    #[test]
    fn a_container_is_told_with_all_of_it() {
        let created: events::TaskCreate = sent(
            Event::Created {
                id: "c".into(),
                bundle: "/b".into(),
                rootfs: vec![RootfsMount {
                    fs_type: "overlay".into(),
                    ..Default::default()
                }],
                stdio: StdioPaths {
                    stdin: "i".into(),
                    stdout: "o".into(),
                    stderr: String::new(),
                },
                terminal: true,
                pid: 5,
            },
            "/tasks/create",
        );
        assert_eq!((created.container_id.as_str(), created.pid), ("c", 5));
        assert_eq!(created.bundle, "/b");
        assert_eq!(created.rootfs[0].type_, "overlay");
        assert_eq!(
            (created.io.stdin.as_str(), created.io.terminal),
            ("i", true)
        );
    }

    #[test]
    fn first_and_further_processes_are_told_apart() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(9);
        let exited = |exec: Option<&str>| Event::Exited {
            id: "c".into(),
            exec: exec.map(Into::into),
            pid: 5,
            status: 137,
            at,
        };
        for (exec, id) in [(None, "c"), (Some("e"), "e")] {
            let exit: events::TaskExit = sent(exited(exec), "/tasks/exit");
            assert_eq!((exit.container_id.as_str(), exit.id.as_str()), ("c", id));
            assert_eq!((exit.pid, exit.exit_status), (5, 137));
            assert_eq!(exit.exited_at.seconds, 9);
            let deleted = Event::Deleted {
                id: "c".into(),
                exec: exec.map(Into::into),
                pid: 5,
                status: 3,
                at,
            };
            let deleted: events::TaskDelete = sent(deleted, "/tasks/delete");
            assert_eq!(deleted.id, id);
            assert_eq!(deleted.exit_status, 3);
        }
        let started = |exec: Option<&str>| Event::Started {
            id: "c".into(),
            exec: exec.map(Into::into),
            pid: 6,
        };
        let first: events::TaskStart = sent(started(None), "/tasks/start");
        assert_eq!((first.container_id.as_str(), first.pid), ("c", 6));
        let further: events::TaskExecStarted = sent(started(Some("e")), "/tasks/exec-started");
        assert_eq!((further.exec_id.as_str(), further.pid), ("e", 6));
    }

    #[test]
    fn the_others_name_their_container() {
        let id = || "c".to_owned();
        let added: events::TaskExecAdded = sent(
            Event::ExecAdded {
                id: id(),
                exec: "e".into(),
            },
            "/tasks/exec-added",
        );
        assert_eq!((added.container_id, added.exec_id), (id(), "e".into()));
        let oom: events::TaskOOM = sent(Event::Oom { id: id() }, "/tasks/oom");
        assert_eq!(oom.container_id, id());
        let paused: events::TaskPaused = sent(Event::Paused { id: id() }, "/tasks/paused");
        assert_eq!(paused.container_id, id());
        let resumed: events::TaskResumed = sent(Event::Resumed { id: id() }, "/tasks/resumed");
        assert_eq!(resumed.container_id, id());
    }
}
