// SPDX-License-Identifier: Apache-2.0
use std::path::PathBuf;

use super::*;
use crate::operator::{
    client::{self, AskError},
    history::History,
    Start, State,
};

struct Pod(History);

#[async_trait::async_trait]
impl Observed for Pod {
    async fn metrics(&self) -> String {
        "bulkhead_test 1\n".into()
    }

    fn state(&self) -> State {
        State {
            namespace: "n".into(),
            sandbox: "s".into(),
            pid: 1,
            vmm_pid: 2,
            vcpus: 1,
            memory_mib: 64,
            ended: None,
            start: Start::default(),
            containers: Vec::new(),
        }
    }

    async fn kernel_log(&self) -> Result<String, crate::Error> {
        Ok("[    0.000000] Linux\n".into())
    }

    fn console(&self, _: usize) -> Vec<String> {
        vec!["last words".into()]
    }

    fn history(&self) -> &History {
        &self.0
    }
}

const SOON: Duration = Duration::from_secs(20);

async fn served() -> (tempfile::TempDir, PathBuf, Arc<Pod>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("o");
    let pod = Arc::new(Pod(History::new("n", "s", 10)));
    let listener = listen(&path).unwrap();
    tokio::spawn(serve(listener, Arc::downgrade(&pod)));
    (dir, path, pod)
}

/// Asks as a program does, on a thread of its own.
async fn get(path: &Path, target: &'static str) -> Result<String, AskError> {
    let path = path.to_owned();
    tokio::task::spawn_blocking(move || client::get(&path, target, SOON))
        .await
        .unwrap()
}

#[tokio::test]
async fn questions_are_answered() {
    let (_dir, path, pod) = served().await;
    assert_eq!(get(&path, "/metrics").await.unwrap(), "bulkhead_test 1\n");
    assert_eq!(get(&path, "/console").await.unwrap(), "last words\n");
    let state: State = serde_json::from_str(&get(&path, "/state").await.unwrap()).unwrap();
    assert_eq!(state, pod.state());
    let refused = get(&path, "/nothing").await.unwrap_err();
    assert!(
        matches!(refused, AskError::Refused(ref line) if line.contains("404")),
        "{refused}"
    );
    pod.0.tell_sandbox("sandbox-started", None);
    let events = get(&path, "/events").await.unwrap();
    assert_eq!(events.lines().count(), 1);
    assert!(events.contains("sandbox-started"));
}

#[tokio::test]
async fn events_are_followed_until_the_pod_is_gone() {
    let (_dir, path, pod) = served().await;
    pod.0.tell_sandbox("first", None);
    let following = tokio::spawn({
        let path = path.clone();
        async move { get(&path, "/events?follow").await }
    });
    while Arc::strong_count(&pod) > 1 || pod.0.listeners() == 0 {
        sleep(Duration::from_millis(2)).await;
    }
    pod.0.tell_sandbox("second", None);
    drop(pod);
    let told = following.await.unwrap().unwrap();
    let names: Vec<String> = told
        .lines()
        .map(|line| serde_json::from_str::<Happened>(line).unwrap().event)
        .collect();
    assert_eq!(names, ["first", "second"]);
}

#[tokio::test]
async fn noise_and_silence_do_not_keep_others_out() {
    let (_dir, path, _pod) = served().await;
    let mut noisy = UnixStream::connect(&path).await.unwrap();
    let _ = noisy.write_all(&vec![b'x'; 64 * 1024]).await;
    let _silent = UnixStream::connect(&path).await.unwrap();
    let mut wrong = UnixStream::connect(&path).await.unwrap();
    wrong.write_all(b"POST / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    wrong.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    assert_eq!(get(&path, "/metrics").await.unwrap(), "bulkhead_test 1\n");
}
