// SPDX-License-Identifier: Apache-2.0

use std::{fs, path::Path, time::Instant};

use oci_spec::runtime::Spec;
use serde_json::Value;

use super::*;
use crate::error::chain;

/// The life of a container with these hooks; `DIR` is the bundle.
fn lifecycle(bundle: &Path, hooks: &str) -> Result<Lifecycle, SpecError> {
    let hooks = hooks.replace("DIR", bundle.to_str().unwrap());
    let spec: Spec = serde_json::from_str(&format!(
        r#"{{"ociVersion":"1.2.0","hooks":{hooks},"annotations":{{"a.b":"c\"d"}}}}"#
    ))
    .unwrap();
    Lifecycle::new(&spec, "web", bundle)
}

/// A hook that runs a shell script.
fn script(text: &str, more: &str) -> String {
    let text = Value::from(text);
    format!(r#"{{"path":"/bin/sh","args":["sh","-c",{text}]{more}}}"#)
}

#[tokio::test]
async fn every_hook_gets_the_state_in_its_turn() {
    let bundle = tempfile::tempdir().unwrap();
    let tell = |name: &str| script(&format!("(echo {name}; cat; echo) >> log"), "");
    let life = lifecycle(
        bundle.path(),
        &format!(
            r#"{{"createRuntime":[{}],"prestart":[{},{}],"poststart":[{}],"poststop":[{}]}}"#,
            tell("runtime"),
            tell("first"),
            tell("second"),
            tell("started"),
            tell("stopped")
        ),
    )
    .unwrap();
    life.before_start(7).await.unwrap();
    life.poststart(7).await.unwrap();
    life.poststop().await;
    let log = fs::read_to_string(bundle.path().join("log")).unwrap();
    let lines: Vec<&str> = log.lines().collect();
    let expected = [
        ("first", "creating", Some(7)),
        ("second", "creating", Some(7)),
        ("runtime", "creating", Some(7)),
        ("started", "running", Some(7)),
        ("stopped", "stopped", None),
    ];
    assert_eq!(lines.len(), 2 * expected.len(), "{log}");
    for ((name, status, pid), told) in expected.into_iter().zip(lines.chunks(2)) {
        assert_eq!(told[0], name);
        let state: Value = serde_json::from_str(told[1]).unwrap();
        assert_eq!(state["status"], status);
        assert_eq!(state["pid"].as_u64(), pid);
        assert_eq!(state["ociVersion"], "1.2.0");
        assert_eq!(state["id"], "web");
        assert_eq!(state["bundle"], bundle.path().to_str().unwrap());
        assert_eq!(state["annotations"]["a.b"], "c\"d");
    }
}

#[tokio::test]
async fn the_environment_is_the_hooks_own() {
    let bundle = tempfile::tempdir().unwrap();
    let life = lifecycle(
        bundle.path(),
        r#"{"createRuntime":[{"path":"/bin/sh","args":["renamed","-c",
            "tr '\\0' ' ' < /proc/$$/cmdline > DIR/log; echo $COLOUR:$HOME >> DIR/log"],
            "env":["COLOUR=deep blue","PATH=/bin:/usr/bin"]}]}"#,
    )
    .unwrap();
    life.before_start(1).await.unwrap();
    let log = fs::read_to_string(bundle.path().join("log")).unwrap();
    assert!(log.starts_with("renamed -c "), "{log}");
    assert!(log.ends_with("deep blue:\n"), "{log}");
}

#[tokio::test]
async fn the_first_that_fails_is_the_last_that_runs() {
    let bundle = tempfile::tempdir().unwrap();
    let life = lifecycle(
        bundle.path(),
        &format!(
            r#"{{"prestart":[{},{},{}]}}"#,
            script("echo $$ > one", ""),
            script("echo broken >&2; exit 3", ""),
            script("touch three", "")
        ),
    )
    .unwrap();
    let error = life.before_start(1).await.unwrap_err();
    assert_eq!(
        chain(&error),
        "hooks.prestart[1] /bin/sh: exit status: 3; it said: broken"
    );
    let first = fs::read_to_string(bundle.path().join("one")).unwrap();
    let first = first.trim().parse().unwrap();
    assert!(!children().contains(&first), "it has been waited for");
    assert!(!bundle.path().join("three").exists());
}

#[tokio::test]
async fn after_the_end_all_run_whatever_fails() {
    let bundle = tempfile::tempdir().unwrap();
    let hooks = format!(
        r#"[{},{{"path":"/no/such/program"}},{}]"#,
        script("exit 1", ""),
        script("touch done", "")
    );
    let life = lifecycle(bundle.path(), &format!(r#"{{"poststop":{hooks}}}"#)).unwrap();
    life.poststop().await;
    fs::remove_file(bundle.path().join("done")).unwrap();
    let life = lifecycle(bundle.path(), &format!(r#"{{"poststart":{hooks}}}"#)).unwrap();
    let error = life.poststart(1).await.unwrap_err();
    let wanted = "hooks.poststart[0] /bin/sh: exit status: 1";
    assert!(chain(&error).starts_with(wanted), "{}", chain(&error));
    assert!(!bundle.path().join("done").exists());
}

#[tokio::test]
async fn a_hook_ends_at_its_timeout_with_all_that_it_started() {
    let bundle = tempfile::tempdir().unwrap();
    let slow = script("echo slow >&2; sleep 77 & wait", r#","timeout":1"#);
    let life = lifecycle(bundle.path(), &format!(r#"{{"createRuntime":[{slow}]}}"#)).unwrap();
    let begin = Instant::now();
    let error = life.before_start(1).await.unwrap_err();
    assert!(begin.elapsed() < Duration::from_secs(20));
    let text = chain(&error);
    assert!(text.contains("timeout of 1 s; it said: slow"), "{text}");
    assert!(matches!(error, HookError::TimedOut { .. }));
}

#[tokio::test]
async fn a_daemon_and_an_unread_state_hold_nothing_up() {
    let bundle = tempfile::tempdir().unwrap();
    let daemon = script("setsid sleep 5 & exit 0", "");
    let life = lifecycle(bundle.path(), &format!(r#"{{"prestart":[{daemon}]}}"#)).unwrap();
    let begin = Instant::now();
    life.before_start(1).await.unwrap();
    assert!(begin.elapsed() < Duration::from_secs(4));
}

#[test]
fn what_cannot_be_a_hook_is_named() {
    let here = Path::new("/");
    for (hooks, field) in [
        (r#"{"prestart":[{"path":"sh"}]}"#, "hooks.prestart[0].path"),
        (
            r#"{"poststop":[{"path":"/a"},{"path":"/a","timeout":0}]}"#,
            "hooks.poststop[1].timeout",
        ),
        (
            r#"{"createRuntime":[{"path":"/a","timeout":-1}]}"#,
            "hooks.createRuntime[0].timeout",
        ),
    ] {
        let text = lifecycle(here, hooks).unwrap_err().to_string();
        assert!(text.starts_with(field), "{text}");
    }
}
