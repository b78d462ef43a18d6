// SPDX-License-Identifier: Apache-2.0
//! What has happened in a pod, for whoever asks later.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

use crate::{clock::Utc, sandbox::Event};

/// Events that a slow listener may be behind before it loses some.
const BEHIND: usize = 256;

/// One event, as it is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Happened {
    /// When: RFC 3339, UTC.
    pub time: String,
    /// containerd's namespace, or what stands for it.
    pub namespace: String,
    /// The pod.
    pub sandbox: String,
    /// `sandbox-started`, `sandbox-ended`, `created`, `started`, `exec-added`,
    /// `exited`, `oom`, `paused`, `resumed` or `deleted`.
    pub event: String,
    /// The container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// The further process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec: Option<String>,
    /// Exit code, or 128 + signal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u32>,
    /// Why, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// The last events of a pod, and how many there were of each kind.
#[derive(Debug)]
pub struct History {
    namespace: String,
    sandbox: String,
    kept: usize,
    past: Mutex<Past>,
    live: broadcast::Sender<Happened>,
}

#[derive(Debug, Default)]
struct Past {
    events: VecDeque<Happened>,
    counts: BTreeMap<String, u64>,
}

impl History {
    /// Of a pod; keeps this many events.
    pub fn new(namespace: &str, sandbox: &str, kept: usize) -> Self {
        Self {
            namespace: namespace.into(),
            sandbox: sandbox.into(),
            kept,
            past: Mutex::default(),
            live: broadcast::Sender::new(BEHIND),
        }
    }

    fn past(&self) -> MutexGuard<'_, Past> {
        self.past.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something has happened to a container or process.
    pub fn tell(&self, event: &Event) {
        let (name, container, exec, status) = match event {
            Event::Created { id, .. } => ("created", id, None, None),
            Event::Started { id, exec, .. } => ("started", id, exec.clone(), None),
            Event::ExecAdded { id, exec } => ("exec-added", id, Some(exec.clone()), None),
            Event::Exited {
                id, exec, status, ..
            } => ("exited", id, exec.clone(), Some(*status)),
            Event::Oom { id } => ("oom", id, None, None),
            Event::Paused { id } => ("paused", id, None, None),
            Event::Resumed { id } => ("resumed", id, None, None),
            Event::Deleted {
                id, exec, status, ..
            } => ("deleted", id, exec.clone(), Some(*status)),
        };
        self.push(Happened {
            container: Some(container.clone()),
            exec,
            status,
            ..self.now(name)
        });
    }

    /// Something has happened to the pod.
    pub fn tell_sandbox(&self, name: &str, why: Option<String>) {
        self.push(Happened {
            why,
            ..self.now(name)
        });
    }

    fn now(&self, name: &str) -> Happened {
        Happened {
            time: Utc(SystemTime::now()).to_string(),
            namespace: self.namespace.clone(),
            sandbox: self.sandbox.clone(),
            event: name.into(),
            container: None,
            exec: None,
            status: None,
            why: None,
        }
    }

    fn push(&self, happened: Happened) {
        let mut past = self.past();
        *past.counts.entry(happened.event.clone()).or_default() += 1;
        past.events.push_back(happened.clone());
        while past.events.len() > self.kept {
            past.events.pop_front();
        }
        // While the past is locked: who listens misses none and has none twice.
        // Nobody may.
        let _ = self.live.send(happened);
    }

    /// What there was, and what comes.
    pub fn listen(&self) -> (Vec<Happened>, broadcast::Receiver<Happened>) {
        let past = self.past();
        (past.events.iter().cloned().collect(), self.live.subscribe())
    }

    /// How many listen.
    #[cfg(test)]
    pub fn listeners(&self) -> usize {
        self.live.receiver_count()
    }

    /// How many there were of each kind.
    pub fn counts(&self) -> BTreeMap<String, u64> {
        self.past().counts.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_are_kept_and_all_are_counted() {
        let history = History::new("k8s.io", "pod", 2);
        for id in ["a", "b", "c"] {
            history.tell(&Event::Oom { id: id.into() });
        }
        history.tell_sandbox("sandbox-ended", Some("power cut".into()));
        let (past, mut live) = history.listen();
        let told: Vec<_> = past
            .iter()
            .map(|h| (h.event.as_str(), h.container.as_deref()))
            .collect();
        assert_eq!(told, [("oom", Some("c")), ("sandbox-ended", None)]);
        assert_eq!(past[1].why.as_deref(), Some("power cut"));
        assert_eq!(history.counts()["oom"], 3);
        history.tell(&Event::Paused { id: "a".into() });
        assert_eq!(live.try_recv().unwrap().event, "paused");
        let json = serde_json::to_string(&past[0]).unwrap();
        assert!(
            json.contains(r#""sandbox":"pod","event":"oom","container":"c"}"#),
            "{json}"
        );
    }
}
