// SPDX-License-Identifier: Apache-2.0
//! Names of capabilities, resource limits and the like.

use bulkhead_agent_protocol::CAPABILITIES;

/// The bit of a capability by its name, with or without `CAP_`.
fn bit(name: &str) -> Option<u64> {
    let upper = name.to_ascii_uppercase();
    let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
    let number = CAPABILITIES.iter().position(|known| *known == short)?;
    Some(1 << number)
}

/// A set of capabilities by their names. Unknown names are left out with a
/// warning, as other runtimes do: a newer client names capabilities that this
/// kernel has not.
pub fn mask(names: &[String]) -> u64 {
    names.iter().fold(0, |mask, name| match bit(name) {
        Some(bit) => mask | bit,
        None => {
            crate::warn_limited!("msg=\"unknown capability left out\" name=\"{name}\"");
            mask
        }
    })
}

/// The number of a resource limit by its name (`RLIMIT_NOFILE`).
pub fn rlimit(name: &str) -> Option<libc::c_int> {
    let number = match name.strip_prefix("RLIMIT_")? {
        "CPU" => libc::RLIMIT_CPU,
        "FSIZE" => libc::RLIMIT_FSIZE,
        "DATA" => libc::RLIMIT_DATA,
        "STACK" => libc::RLIMIT_STACK,
        "CORE" => libc::RLIMIT_CORE,
        "RSS" => libc::RLIMIT_RSS,
        "NPROC" => libc::RLIMIT_NPROC,
        "NOFILE" => libc::RLIMIT_NOFILE,
        "MEMLOCK" => libc::RLIMIT_MEMLOCK,
        "AS" => libc::RLIMIT_AS,
        "LOCKS" => libc::RLIMIT_LOCKS,
        "SIGPENDING" => libc::RLIMIT_SIGPENDING,
        "MSGQUEUE" => libc::RLIMIT_MSGQUEUE,
        "NICE" => libc::RLIMIT_NICE,
        "RTPRIO" => libc::RLIMIT_RTPRIO,
        "RTTIME" => libc::RLIMIT_RTTIME,
        _ => return None,
    };
    Some(number as libc::c_int)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_and_without_prefix() {
        assert_eq!(bit("CAP_CHOWN"), Some(1));
        assert_eq!(bit("cap_sys_admin"), Some(1 << 21));
        assert_eq!(bit("CHECKPOINT_RESTORE"), Some(1 << 40));
        assert_eq!(bit("CAP_NOSUCH"), None);
    }

    #[test]
    fn masks_leave_unknown_names_out() {
        assert_eq!(mask(&["CAP_KILL".into(), "CAP_NOSUCH".into()]), 1 << 5);
    }

    #[test]
    fn limits_by_name() {
        assert_eq!(rlimit("RLIMIT_NOFILE"), Some(libc::RLIMIT_NOFILE as i32));
        assert_eq!(rlimit("NOFILE"), None);
    }
}
