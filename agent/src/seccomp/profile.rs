// SPDX-License-Identifier: Apache-2.0
//! The specification's profile, checked, with numbers for names.

use std::path::PathBuf;

use bulkhead_agent_protocol::oci;

use super::table::SYSCALLS;
use crate::error::{AgentError, Result};

// Verdicts of a filter (linux/seccomp.h).
const KILL_THREAD: u32 = 0;
const KILL_PROCESS: u32 = 0x8000_0000;
const TRAP: u32 = 0x0003_0000;
const ERRNO: u32 = 0x0005_0000;
const NOTIFY: u32 = 0x7fc0_0000;
const TRACE: u32 = 0x7ff0_0000;
const LOG: u32 = 0x7ffc_0000;
const ALLOW: u32 = 0x7fff_0000;

/// How an argument is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// argument = value
    Equal,
    /// argument ≠ value
    NotEqual,
    /// argument < value
    Less,
    /// argument ≤ value
    LessEqual,
    /// argument > value
    Greater,
    /// argument ≥ value
    GreaterEqual,
    /// argument & this = value
    MaskedEqual(u64),
}

/// One condition on one argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Condition {
    /// 0 to 5.
    pub index: u8,
    /// How it is compared.
    pub comparison: Comparison,
    /// What it is compared with.
    pub value: u64,
}

/// What happens to one system call when all conditions hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The system call's number.
    pub number: u32,
    /// The filter's verdict.
    pub action: u32,
    /// None: always.
    pub conditions: Vec<Condition>,
}

/// A whole profile.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Profile {
    /// The verdict where no rule says otherwise.
    pub default: u32,
    /// Answer ENOSYS for calls newer than all that the profile names.
    pub unknown_is_missing: bool,
    /// In the order of the profile.
    pub rules: Vec<Rule>,
    /// SECCOMP_FILTER_FLAG_*.
    pub flags: libc::c_ulong,
    /// Who is asked what happens to calls, where a rule says so.
    pub listener: Option<Listener>,
}

/// Who decides about calls in a container's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Its socket, in the guest.
    pub path: PathBuf,
    /// What it wants to be told with the descriptor.
    pub metadata: String,
}

/// SECCOMP_FILTER_FLAG_NEW_LISTENER.
const NEW_LISTENER: libc::c_ulong = 8;
/// SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV.
const WAIT_KILLABLE_RECV: libc::c_ulong = 0x20;

/// Checks and translates a profile.
///
/// # Errors
/// [`AgentError::Invalid`] naming the field.
pub fn translate(profile: &oci::Seccomp) -> Result<Profile> {
    let default = action(
        &profile.default_action,
        profile.default_errno_ret,
        "linux.seccomp.defaultAction",
    )?;
    let mut translated = Profile {
        default,
        unknown_is_missing: !matches!(default & 0xffff_0000, ALLOW | LOG | TRACE)
            && default != ERRNO | libc::ENOSYS as u32,
        rules: Vec::new(),
        flags: flags(&profile.flags)?,
        listener: None,
    };
    if default == NOTIFY {
        return Err(invalid(
            "defaultAction",
            "SCMP_ACT_NOTIFY would stop the container before its listener is told",
        ));
    }
    for syscall in &profile.syscalls {
        let action = action(
            &syscall.action,
            syscall.errno_ret,
            "linux.seccomp.syscalls.action",
        )?;
        if syscall.names.is_empty() {
            return Err(invalid("syscalls.names", "empty"));
        }
        let conditions = conditions(&syscall.args)?;
        for name in &syscall.names {
            // Names of other architectures and of newer kernels.
            let Some(number) = number(name) else { continue };
            if action == NOTIFY && name == "write" {
                return Err(invalid(
                    "syscalls.action",
                    "SCMP_ACT_NOTIFY for write would stop the container before its listener is told",
                ));
            }
            for conditions in &conditions {
                // The default stays the default, and a call that is named so
                // counts as known.
                translated.rules.push(Rule {
                    number,
                    action,
                    conditions: conditions.clone(),
                });
            }
        }
    }
    listen(profile, &mut translated)?;
    Ok(translated)
}

/// The listener, if a rule needs one; else it is ignored, as the
/// specification wants.
fn listen(profile: &oci::Seccomp, translated: &mut Profile) -> Result<()> {
    if !translated.rules.iter().any(|rule| rule.action == NOTIFY) {
        // The kernel knows it only together with a listener.
        translated.flags &= !WAIT_KILLABLE_RECV;
        return Ok(());
    }
    let path = PathBuf::from(&profile.listener_path);
    if !path.is_absolute() {
        return Err(invalid(
            "listenerPath",
            format!("{path:?} is not absolute, and SCMP_ACT_NOTIFY needs a listener"),
        ));
    }
    translated.flags |= NEW_LISTENER;
    translated.listener = Some(Listener {
        path,
        metadata: profile.listener_metadata.clone(),
    });
    Ok(())
}

fn invalid(field: &str, why: impl std::fmt::Display) -> AgentError {
    AgentError::Invalid(format!("linux.seccomp.{field}: {why}"))
}

/// The number of a system call.
pub fn number(name: &str) -> Option<u32> {
    let found = SYSCALLS
        .binary_search_by_key(&name, |(name, _)| name)
        .ok()?;
    Some(SYSCALLS[found].1)
}

fn action(name: &str, errno: Option<u32>, field: &str) -> Result<u32> {
    let data = errno.unwrap_or(libc::EPERM as u32);
    if data > 0xffff {
        return Err(AgentError::Invalid(format!("{field}: errno {data}")));
    }
    Ok(match name {
        "SCMP_ACT_ALLOW" => ALLOW,
        "SCMP_ACT_ERRNO" => ERRNO | data,
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => KILL_THREAD,
        "SCMP_ACT_KILL_PROCESS" => KILL_PROCESS,
        "SCMP_ACT_TRAP" => TRAP,
        "SCMP_ACT_TRACE" => TRACE | data,
        "SCMP_ACT_LOG" => LOG,
        "SCMP_ACT_NOTIFY" => NOTIFY,
        other => return Err(AgentError::Invalid(format!("{field}: unknown {other:?}"))),
    })
}

fn flags(names: &[String]) -> Result<libc::c_ulong> {
    names.iter().try_fold(0, |flags, name| {
        Ok(flags
            | match name.as_str() {
                // There is one thread to apply it to.
                "SECCOMP_FILTER_FLAG_TSYNC" => 0,
                "SECCOMP_FILTER_FLAG_LOG" => 2,
                "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => 4,
                "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV" => WAIT_KILLABLE_RECV,
                other => return Err(invalid("flags", format!("unknown {other:?}"))),
            })
    })
}

/// The alternatives under which a rule applies: one with all conditions, or,
/// when an argument is named more than once, one for each condition.
fn conditions(args: &[oci::SyscallArg]) -> Result<Vec<Vec<Condition>>> {
    let list = args.iter().map(condition).collect::<Result<Vec<_>>>()?;
    let mut seen = 0u8;
    let mut repeated = false;
    for condition in &list {
        repeated |= seen & 1 << condition.index != 0;
        seen |= 1 << condition.index;
    }
    Ok(if repeated {
        list.into_iter().map(|condition| vec![condition]).collect()
    } else {
        vec![list]
    })
}

fn condition(arg: &oci::SyscallArg) -> Result<Condition> {
    let index = match u8::try_from(arg.index) {
        Ok(index @ 0..=5) => index,
        _ => return Err(invalid("syscalls.args.index", arg.index)),
    };
    let mut value = arg.value;
    let comparison = match arg.op.as_str() {
        "SCMP_CMP_EQ" => Comparison::Equal,
        "SCMP_CMP_NE" => Comparison::NotEqual,
        "SCMP_CMP_LT" => Comparison::Less,
        "SCMP_CMP_LE" => Comparison::LessEqual,
        "SCMP_CMP_GT" => Comparison::Greater,
        "SCMP_CMP_GE" => Comparison::GreaterEqual,
        "SCMP_CMP_MASKED_EQ" => {
            // The first value is the mask, the second what must remain.
            value = arg.value_two;
            Comparison::MaskedEqual(arg.value)
        }
        other => return Err(invalid("syscalls.args.op", format!("unknown {other:?}"))),
    };
    Ok(Condition {
        index,
        comparison,
        value,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_agrees_with_libc() {
        assert!(SYSCALLS.windows(2).all(|pair| pair[0].0 < pair[1].0));
        for (name, wanted) in [
            ("read", libc::SYS_read),
            ("clone3", libc::SYS_clone3),
            ("openat2", libc::SYS_openat2),
            ("mseal", libc::SYS_mseal),
            ("futex_waitv", libc::SYS_futex_waitv),
            ("ptrace", libc::SYS_ptrace),
        ] {
            assert_eq!(number(name), Some(wanted as u32), "{name}");
        }
        assert_eq!(number("nosuch"), None);
    }

    #[test]
    fn actions() {
        let of = |name: &str, errno| action(name, errno, "f");
        assert_eq!(of("SCMP_ACT_ERRNO", None).unwrap(), 0x0005_0001);
        assert_eq!(of("SCMP_ACT_ERRNO", Some(38)).unwrap(), 0x0005_0026);
        assert_eq!(of("SCMP_ACT_ALLOW", Some(1)).unwrap(), 0x7fff_0000);
        assert!(of("ALLOW", None).is_err());
        assert!(of("SCMP_ACT_ERRNO", Some(1 << 16)).is_err());
    }

    #[test]
    fn a_listener_is_there_where_a_rule_needs_it() {
        let profile = |name: &str, action: &str, path: &str| oci::Seccomp {
            default_action: "SCMP_ACT_ALLOW".into(),
            flags: vec!["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV".into()],
            listener_path: path.into(),
            syscalls: vec![oci::Syscall {
                names: vec![name.into()],
                action: action.into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let notify = "SCMP_ACT_NOTIFY";
        let with = translate(&profile("mkdir", notify, "/run/l")).unwrap();
        assert_eq!(with.flags, NEW_LISTENER | WAIT_KILLABLE_RECV);
        assert_eq!(with.listener.unwrap().path, PathBuf::from("/run/l"));
        let without = translate(&profile("mkdir", "SCMP_ACT_ERRNO", "/run/l")).unwrap();
        assert_eq!((without.flags, without.listener), (0, None));
        for (name, path, field) in [
            ("mkdir", "", "listenerPath"),
            ("mkdir", "l", "listenerPath"),
            ("write", "/run/l", "syscalls.action"),
        ] {
            let text = translate(&profile(name, notify, path)).unwrap_err();
            assert!(text.to_string().contains(field), "{text}");
        }
        let mut all = profile("mkdir", "SCMP_ACT_ALLOW", "/run/l");
        all.default_action = notify.into();
        let text = translate(&all).unwrap_err().to_string();
        assert!(text.contains("defaultAction"), "{text}");
    }

    #[test]
    fn an_argument_named_twice_means_either() {
        let arg = |index, value| oci::SyscallArg {
            index,
            value,
            op: "SCMP_CMP_EQ".into(),
            ..Default::default()
        };
        assert_eq!(conditions(&[arg(0, 1), arg(1, 2)]).unwrap().len(), 1);
        assert_eq!(conditions(&[arg(0, 1), arg(0, 2)]).unwrap().len(), 2);
        assert_eq!(conditions(&[]).unwrap(), [vec![]]);
        assert!(conditions(&[arg(6, 1)]).is_err());
    }
}
