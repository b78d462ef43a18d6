// SPDX-License-Identifier: Apache-2.0
//! Hooks that run in the guest (runtime-spec config.md, "POSIX-platform
//! Hooks"): createContainer in the container's namespaces before its root is
//! entered, startContainer in the container before its program.
//!
//! A program of createContainer is a file of the host, which the runtime shares
//! with the guest; one of startContainer is the container's own.

use std::collections::HashMap;
use std::ffi::CString;
use std::fmt::Write;
use std::time::Duration;

use bulkhead_agent_protocol::oci;

use crate::error::{AgentError, Result};

/// What a container wants run, and what it is told.
#[derive(Clone, Debug, Default)]
pub struct GuestHooks {
    /// Before the container's root is entered.
    pub create_container: Vec<HookPlan>,
    /// Before the container's program.
    pub start_container: Vec<HookPlan>,
    /// The specification's version.
    version: String,
    /// The state's members that do not change.
    state: String,
}

/// One program to run.
#[derive(Clone, Debug)]
pub struct HookPlan {
    /// Where it is in the specification.
    pub name: String,
    /// The program.
    pub path: CString,
    /// Arguments, the program's name first.
    pub args: Vec<CString>,
    /// Its environment, where the specification gives one.
    pub env: Option<Vec<CString>>,
    /// How long it may take.
    pub timeout: Option<Duration>,
}

impl GuestHooks {
    /// Checks and translates those of the container `id`.
    ///
    /// # Errors
    /// [`AgentError::Invalid`] naming the field.
    pub fn new(spec: &oci::Spec, id: &str) -> Result<Self> {
        let none = oci::Hooks::default();
        let hooks = spec.hooks.as_ref().unwrap_or(&none);
        let mut state = String::from("{");
        for (key, value) in [
            ("ociVersion", spec.version.as_str()),
            ("id", id),
            ("bundle", spec.bundle.as_str()),
        ] {
            member(&mut state, key, value);
            state.push(',');
        }
        annotations(&mut state, &spec.annotations);
        Ok(Self {
            create_container: plans("createContainer", &hooks.create_container)?,
            start_container: plans("startContainer", &hooks.start_container)?,
            version: spec.version.clone(),
            state,
        })
    }

    /// The version of the specification that the container was given in.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The container's state (runtime-spec runtime.md, "State") as JSON.
    pub fn state(&self, status: &str, pid: u32) -> String {
        let mut state = self.state.clone();
        member(&mut state, "status", status);
        // Writing to a string cannot fail.
        let _ = write!(state, ",\"pid\":{pid}}}");
        state
    }
}

fn plans(kind: &str, hooks: &[oci::Hook]) -> Result<Vec<HookPlan>> {
    let hooks = hooks.iter().enumerate();
    hooks
        .map(|(number, hook)| {
            let name = format!("hooks.{kind}[{number}]");
            let wrong = |what: &str| AgentError::Invalid(format!("{name}.{what}"));
            let string = |text: &String| {
                CString::new(text.as_str()).map_err(|_| wrong(&format!("args: NUL in {text:?}")))
            };
            let strings = |list: &[String]| list.iter().map(string).collect::<Result<Vec<_>>>();
            if !hook.path.starts_with('/') {
                return Err(wrong(&format!("path: {:?} is not absolute", hook.path)));
            }
            let timeout = match hook.timeout {
                None => None,
                Some(secs) => match u64::try_from(secs) {
                    Ok(secs @ 1..) => Some(Duration::from_secs(secs)),
                    _ => return Err(wrong(&format!("timeout: {secs} is not above 0"))),
                },
            };
            let path = string(&hook.path)?;
            Ok(HookPlan {
                args: match hook.args.is_empty() {
                    true => vec![path.clone()],
                    false => strings(&hook.args)?,
                },
                env: match hook.env.is_empty() {
                    true => None,
                    false => Some(strings(&hook.env)?),
                },
                path,
                timeout,
                name,
            })
        })
        .collect()
}

fn annotations(state: &mut String, map: &HashMap<String, String>) {
    if map.is_empty() {
        return;
    }
    let mut ordered: Vec<_> = map.iter().collect();
    ordered.sort();
    state.push_str("\"annotations\":{");
    for (number, (key, value)) in ordered.into_iter().enumerate() {
        if number > 0 {
            state.push(',');
        }
        member(state, key, value);
    }
    state.push_str("},");
}

/// A member of a JSON object, with text as its value.
pub fn member(out: &mut String, key: &str, value: &str) {
    text(out, key);
    out.push(':');
    text(out, value);
}

/// A string as JSON has it (RFC 8259, section 7).
fn text(out: &mut String, text: &str) {
    out.push('"');
    for letter in text.chars() {
        match letter {
            '"' | '\\' => out.extend(['\\', letter]),
            '\0'..='\u{1f}' => {
                // Writing to a string cannot fail.
                let _ = write!(out, "\\u{:04x}", u32::from(letter));
            }
            _ => out.push(letter),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(hook: oci::Hook) -> oci::Spec {
        oci::Spec {
            version: "1.2.0".into(),
            bundle: "/run/b \"x\"".into(),
            annotations: [("k", "a\\b\n"), ("a", "é")]
                .map(|(key, value)| (key.into(), value.into()))
                .into(),
            hooks: Some(oci::Hooks {
                start_container: vec![hook],
                ..Default::default()
            })
            .into(),
            ..Default::default()
        }
    }

    #[test]
    fn the_state_is_json() {
        let hook = oci::Hook {
            path: "/bin/x".into(),
            ..Default::default()
        };
        let hooks = GuestHooks::new(&spec(hook), "web").unwrap();
        assert_eq!(hooks.start_container[0].args[0].to_bytes(), b"/bin/x");
        assert_eq!(
            hooks.state("created", 5),
            r#"{"ociVersion":"1.2.0","id":"web","bundle":"/run/b \"x\"","annotations":{"a":"é","k":"a\\b\u000a"},"status":"created","pid":5}"#
        );
    }

    #[test]
    fn what_cannot_be_a_hook_is_named() {
        for (path, timeout, field) in [
            ("x", None, "hooks.startContainer[0].path"),
            ("/x", Some(0), "hooks.startContainer[0].timeout"),
            ("/x", Some(-3), "hooks.startContainer[0].timeout"),
        ] {
            let hook = oci::Hook {
                path: path.into(),
                timeout,
                ..Default::default()
            };
            let text = GuestHooks::new(&spec(hook), "c").unwrap_err().to_string();
            assert!(text.starts_with(field), "{text}");
        }
    }
}
