// SPDX-License-Identifier: Apache-2.0
//! Processes as a journalled resource.

use std::{
    io,
    time::{Duration, Instant},
};

use rustix::{
    event::{poll, PollFd, PollFlags, Timespec},
    process::{pidfd_open, pidfd_send_signal, Pid, PidfdFlags, Signal},
};

/// How long a killed process may take to disappear.
const GONE_WITHIN: Duration = Duration::from_secs(2);

/// When process `pid` started, in clock ticks since boot (field 22 of
/// `/proc/<pid>/stat`); none when there is no such process or it has ended
/// and only waits to be reaped.
pub fn start_time(pid: u32) -> io::Result<Option<u64>> {
    let stat = match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat,
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || error.raw_os_error() == Some(libc::ESRCH) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    // The command's name, in parentheses, may hold anything.
    let after = stat.rsplit_once(')').map_or("", |(_, after)| after);
    let mut fields = after.split_ascii_whitespace();
    if matches!(fields.next(), Some("Z" | "X")) {
        return Ok(None);
    }
    Ok(fields.nth(18).and_then(|field| field.parse().ok()))
}

/// Kills the process that had `pid` and started at `started`, and waits until
/// it is gone. Nothing happens to a later process with the same id.
pub fn kill(pid: u32, started: u64) -> io::Result<()> {
    let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return Ok(());
    };
    // The descriptor first, then the check: what the check looked at is what
    // the signal goes to.
    let pidfd = match pidfd_open(raw, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    if start_time(pid)? != Some(started) {
        return Ok(());
    }
    match pidfd_send_signal(&pidfd, Signal::KILL) {
        Ok(()) => {}
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    // Readable once the process has ended, reaped or not.
    let deadline = Instant::now() + GONE_WITHIN;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("process {pid} is still there {GONE_WITHIN:?} after SIGKILL"),
                ));
            }
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_start_time_is_known_and_absent_pid_is_none() {
        assert!(start_time(std::process::id()).unwrap().unwrap() > 0);
        // Above the kernel's limit of 2^22.
        assert_eq!(start_time(5_000_000).unwrap(), None);
    }

    #[test]
    fn another_process_with_the_same_id_is_spared() {
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        let started = start_time(child.id()).unwrap().unwrap();
        kill(child.id(), started + 1).unwrap();
        assert!(child.try_wait().unwrap().is_none());
        kill(child.id(), started).unwrap();
        assert!(!child.wait().unwrap().success());
        kill(child.id(), started).unwrap();
    }
}
