// SPDX-License-Identifier: Apache-2.0
//! Hooks of a specification (config.md, "POSIX-platform Hooks"): what is wrong
//! with one, and those that run in the guest.

use std::time::Duration;

use bulkhead_agent_protocol::oci;
use oci_spec::runtime::{Hook, Hooks};

use super::{SpecError, Volume};

/// A hook's place in the specification, and its timeout.
///
/// # Errors
/// A path that is not absolute, a timeout that is no time.
pub fn check(
    kind: &str,
    number: usize,
    hook: &Hook,
) -> Result<(String, Option<Duration>), SpecError> {
    let field = format!("hooks.{kind}[{number}]");
    if !hook.path().is_absolute() {
        return Err(SpecError::field(
            format!("{field}.path"),
            format!("{} is not an absolute path", hook.path().display()),
        ));
    }
    let timeout = match hook.timeout() {
        None => None,
        // Longer than the agent's protocol can say is longer than anybody waits.
        Some(secs) => match u32::try_from(secs) {
            Ok(secs @ 1..=0x7fff_ffff) => Some(Duration::from_secs(secs.into())),
            _ => {
                return Err(SpecError::field(
                    format!("{field}.timeout"),
                    format!("{secs} is not a number of seconds above 0"),
                ))
            }
        },
    };
    Ok((field, timeout))
}

/// Those that run in the guest. A program of createContainer is the host's and
/// is shared with the guest, below `directory`; one of startContainer is the
/// container's own. None: there are none.
///
/// # Errors
/// As [`check`].
pub fn in_guest(
    hooks: &Hooks,
    directory: &str,
    volumes: &mut Vec<Volume>,
) -> Result<Option<oci::Hooks>, SpecError> {
    let mut out = oci::Hooks::new();
    for (number, hook) in hooks.create_container().iter().flatten().enumerate() {
        let mut hook_out = translate("createContainer", number, hook)?;
        let name = format!("hook-{number}");
        if hook_out.args.is_empty() {
            // Its own name is not that in the guest.
            hook_out.args.push(hook_out.path);
        }
        hook_out.path = format!("{directory}/mounts/{name}");
        volumes.push(Volume {
            source: hook.path().clone(),
            name,
            recursive: false,
            follows: false,
            read_only: true,
            mapped: None,
        });
        out.create_container.push(hook_out);
    }
    for (number, hook) in hooks.start_container().iter().flatten().enumerate() {
        let hook = translate("startContainer", number, hook)?;
        out.start_container.push(hook);
    }
    let none = out.create_container.is_empty() && out.start_container.is_empty();
    Ok((!none).then_some(out))
}

fn translate(kind: &str, number: usize, hook: &Hook) -> Result<oci::Hook, SpecError> {
    let (_, timeout) = check(kind, number, hook)?;
    let secs = timeout.map(|timeout| timeout.as_secs());
    Ok(oci::Hook {
        path: hook.path().to_string_lossy().into_owned(),
        args: hook.args().clone().unwrap_or_default(),
        env: hook.env().clone().unwrap_or_default(),
        // Checked to fit.
        timeout: secs.and_then(|secs| i32::try_from(secs).ok()),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_of_the_host_are_shared_with_the_guest() {
        let hooks: Hooks = serde_json::from_str(
            r#"{"createContainer":[{"path":"/opt/a"},{"path":"/opt/b","args":["b","x"],"timeout":7}],
                "startContainer":[{"path":"/bin/c","env":["A=1"]}],"poststop":[{"path":"/d"}]}"#,
        )
        .unwrap();
        let mut volumes = Vec::new();
        let out = in_guest(&hooks, "/shared/web", &mut volumes)
            .unwrap()
            .unwrap();
        let [first, second] = &out.create_container[..] else {
            panic!("{out:?}");
        };
        assert_eq!(first.path, "/shared/web/mounts/hook-0");
        assert_eq!(first.args, ["/opt/a"]);
        assert_eq!(
            (&second.args[..], second.timeout),
            (&["b".to_owned(), "x".to_owned()][..], Some(7))
        );
        assert_eq!(volumes[1].source.to_str(), Some("/opt/b"));
        assert!(volumes.iter().all(|volume| volume.read_only));
        let [start] = &out.start_container[..] else {
            panic!("{out:?}");
        };
        assert_eq!(
            (start.path.as_str(), &start.env[..]),
            ("/bin/c", &["A=1".to_owned()][..])
        );
        let none: Hooks = serde_json::from_str(r#"{"poststop":[{"path":"/d"}]}"#).unwrap();
        assert!(in_guest(&none, "/s", &mut volumes).unwrap().is_none());
    }
}
