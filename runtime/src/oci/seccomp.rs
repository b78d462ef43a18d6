// SPDX-License-Identifier: Apache-2.0
//! A seccomp profile (config-linux.md, "Seccomp") for the agent.

use std::path::Path;

use bulkhead_agent_protocol::oci;
use oci_spec::runtime::LinuxSeccomp;

use super::{guest::Volume, name, SpecError};

/// Translates a profile.
///
/// # Errors
/// A value that does not fit, naming the field.
pub fn seccomp(profile: &LinuxSeccomp) -> Result<oci::Seccomp, SpecError> {
    let mut out = oci::Seccomp {
        default_action: name(&profile.default_action()),
        default_errno_ret: profile.default_errno_ret(),
        architectures: profile.architectures().iter().flatten().map(name).collect(),
        flags: profile.flags().iter().flatten().map(name).collect(),
        listener_path: match profile.listener_path() {
            Some(path) => path.to_string_lossy().into_owned(),
            None => String::new(),
        },
        listener_metadata: profile.listener_metadata().clone().unwrap_or_default(),
        ..Default::default()
    };
    for rule in profile.syscalls().iter().flatten() {
        let mut syscall = oci::Syscall {
            names: rule.names().clone(),
            action: name(&rule.action()),
            errno_ret: rule.errno_ret(),
            ..Default::default()
        };
        for arg in rule.args().iter().flatten() {
            syscall.args.push(oci::SyscallArg {
                index: u32::try_from(arg.index()).map_err(|_| {
                    SpecError::field("linux.seccomp.syscalls.args.index", "is out of range")
                })?,
                value: arg.value(),
                value_two: arg.value_two().unwrap_or(0),
                op: name(&arg.op()),
                ..Default::default()
            });
        }
        out.syscalls.push(syscall);
    }
    Ok(out)
}

/// Makes the listener's path the guest's. The descriptor that a listener gets
/// is one of the guest's kernel and cannot leave it, so only a process of the
/// pod can listen: at a socket in a directory that it shares with the container
/// by a volume.
///
/// # Errors
/// The path is not below any of `volumes`.
pub fn place_listener(
    profile: &mut oci::Seccomp,
    directory: &str,
    volumes: &[Volume],
) -> Result<(), SpecError> {
    let notifies = |action: &String| action == "SCMP_ACT_NOTIFY";
    let mut rules = profile.syscalls.iter().map(|rule| &rule.action);
    if !rules.any(notifies) || profile.listener_path.is_empty() {
        // Nobody is asked; or the agent tells what is missing.
        profile.listener_path.clear();
        return Ok(());
    }
    let path = Path::new(&profile.listener_path);
    let below = |volume: &Volume| {
        let rest = path.strip_prefix(&volume.source).ok()?.to_str()?;
        let depth = volume.source.components().count();
        Some((depth, format!("{directory}/mounts/{}/{rest}", volume.name)))
    };
    let deepest = volumes.iter().filter_map(below).max();
    let Some((_, place)) = deepest else {
        return Err(SpecError::field(
            "linux.seccomp.listenerPath",
            format!(
                "{} is in none of the container's volumes: the listener gets a descriptor of the \
                 guest's kernel, so it must be a process of the same pod; let a container of the \
                 pod listen in a volume, and mount that in this container too",
                path.display()
            ),
        ));
    };
    profile.listener_path = place;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(action: &str, path: &str) -> oci::Seccomp {
        oci::Seccomp {
            listener_path: path.into(),
            syscalls: vec![oci::Syscall {
                names: vec!["mkdir".into()],
                action: action.into(),
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[test]
    fn a_listener_is_in_a_volume() {
        let volume = |source: &str, name: &str| Volume {
            source: source.into(),
            name: name.into(),
            recursive: true,
            read_only: false,
            follows: false,
            mapped: None,
        };
        let volumes = [volume("/srv", "2"), volume("/srv/pod/x", "3")];
        let place = |action: &str, path: &str| {
            let mut profile = profile(action, path);
            place_listener(&mut profile, "/run/b/c", &volumes)
                .map(|()| profile.listener_path)
                .map_err(|error| error.to_string())
        };
        let notify = "SCMP_ACT_NOTIFY";
        for (action, path, wanted) in [
            (notify, "/srv/pod/x/s/l", "/run/b/c/mounts/3/s/l"),
            (notify, "/srv/pod/xy", "/run/b/c/mounts/2/pod/xy"),
            (notify, "", ""),
            ("SCMP_ACT_ERRNO", "/run/l", ""),
        ] {
            assert_eq!(place(action, path).unwrap(), wanted, "{path}");
        }
        let text = place(notify, "/run/listener").unwrap_err();
        assert!(text.starts_with("linux.seccomp.listenerPath"), "{text}");
    }
}
