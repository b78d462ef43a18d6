// SPDX-License-Identifier: Apache-2.0
//! How page merging stands, for people and for programs.

use std::{fmt, io, os::unix::net::UnixDatagram, path::Path};

use serde::Serialize;

use crate::{
    group,
    sysfs::{self, Counters, Ksm},
    KsmError,
};

/// Bytes of a page.
const PAGE: u64 = 4096;

/// Everything that is told.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Status {
    /// Whether the daemon hears kicks.
    pub daemon: Daemon,
    /// Which merge group's pods have mergeable memory.
    pub group: Group,
    /// What ksmd does.
    pub ksmd: Doing,
    /// Bytes of memory saved.
    pub saved_bytes: u64,
    /// Bytes of memory that KSM knows to be mergeable.
    pub mergeable_bytes: u64,
    /// Whether pages that never merge are skipped; `None`: this kernel cannot.
    pub smart_scan: Option<bool>,
    /// The kernel's own sizing of batches, `none` when off; `None`: this kernel
    /// has none.
    pub advisor: Option<String>,
    /// The kernel's figures.
    pub counters: Counters,
}

/// Whether the daemon runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Daemon {
    /// It does.
    Running,
    /// It does not.
    Absent,
    /// Its socket may not be used by whoever asks.
    Unknown,
}

/// The one merge group that may have mergeable memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Group {
    /// No pod has any.
    None,
    /// This one's pods have; others start without.
    Is(String),
    /// The record may not be read by whoever asks, or is damaged: why.
    Unknown(String),
}

/// What ksmd does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Doing {
    /// Stands still; what is merged stays.
    Still,
    /// Scans and merges.
    Merging,
    /// Everything merged was taken apart.
    Unmerged,
}

impl Status {
    /// Looks. Sends no kick.
    ///
    /// # Errors
    /// This kernel has no KSM, or its figures cannot be read.
    pub fn take(sysfs: &Path, socket: &Path, record: &Path) -> Result<Self, KsmError> {
        let ksm = Ksm::find(sysfs)?;
        let counters = ksm.counters()?;
        let mut settings = ksm.settings()?;
        Ok(Self {
            daemon: daemon(socket),
            group: match group::current(record) {
                Ok(None) => Group::None,
                Ok(Some(name)) => Group::Is(name.to_string()),
                Err(error) => Group::Unknown(error.to_string()),
            },
            ksmd: match counters.run {
                0 => Doing::Still,
                1 => Doing::Merging,
                _ => Doing::Unmerged,
            },
            saved_bytes: counters.saved().saturating_mul(PAGE),
            mergeable_bytes: counters.mergeable().saturating_mul(PAGE),
            smart_scan: settings.remove(sysfs::SMART_SCAN).map(|value| value == "1"),
            advisor: settings.remove(sysfs::ADVISOR_MODE),
            counters,
        })
    }
}

fn daemon(socket: &Path) -> Daemon {
    // Connecting sends nothing, and fails where nobody listens any more.
    match UnixDatagram::unbound().and_then(|from| from.connect(socket)) {
        Ok(()) => Daemon::Running,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Daemon::Unknown,
        Err(_) => Daemon::Absent,
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counters = &self.counters;
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let daemon = match self.daemon {
            Daemon::Running => "running",
            Daemon::Absent => "not running: nothing wakes ksmd when a pod starts",
            Daemon::Unknown => "cannot be told: its socket is for root",
        };
        writeln!(f, "daemon:     {daemon}")?;
        match &self.group {
            Group::None => writeln!(f, "group:      none: no pod's memory is mergeable")?,
            Group::Is(name) => writeln!(
                f,
                "group:      {name}; pods of other groups start without mergeable memory, for the kernel keeps no groups apart"
            )?,
            Group::Unknown(why) => writeln!(f, "group:      cannot be told: {why}")?,
        }
        match self.ksmd {
            Doing::Still => writeln!(f, "ksmd:       stands still; what is merged stays merged")?,
            Doing::Merging => writeln!(
                f,
                "ksmd:       merges: {} pages, then {} ms of sleep",
                counters.pages_to_scan, counters.sleep_millisecs
            )?,
            Doing::Unmerged => writeln!(f, "ksmd:       off, and all that was merged is apart")?,
        }
        writeln!(
            f,
            "saved:      {:.1} MiB: {} pages share {}",
            mib(self.saved_bytes),
            counters.pages_sharing,
            counters.pages_shared
        )?;
        writeln!(
            f,
            "mergeable:  {:.1} MiB, of which {:.1} MiB unique and {:.1} MiB changing",
            mib(self.mergeable_bytes),
            mib(counters.pages_unshared.saturating_mul(PAGE)),
            mib(counters.pages_volatile.saturating_mul(PAGE))
        )?;
        if let Some(profit) = counters.general_profit {
            let profit = profit as f64 / f64::from(1 << 20);
            writeln!(f, "profit:     {profit:.1} MiB after what KSM itself takes")?;
        }
        writeln!(f, "full scans: {}", counters.full_scans)?;
        let smart = match self.smart_scan {
            Some(true) => "on",
            Some(false) => "off",
            None => "not in this kernel",
        };
        let advisor = match self.advisor.as_deref() {
            Some(sysfs::ADVISOR_OFF) => "off",
            Some(mode) => mode,
            None => "not in this kernel",
        };
        writeln!(f, "kernel:     smart scan {smart}, advisor {advisor}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> Status {
        let counters = Counters {
            pages_shared: 12,
            pages_sharing: 21_504,
            pages_unshared: 256,
            pages_to_scan: 420,
            sleep_millisecs: 20,
            full_scans: 7,
            run: 1,
            ..Counters::default()
        };
        Status {
            daemon: Daemon::Running,
            group: Group::Is("red".into()),
            ksmd: Doing::Merging,
            saved_bytes: counters.saved() * PAGE,
            mergeable_bytes: counters.mergeable() * PAGE,
            smart_scan: None,
            advisor: None,
            counters,
        }
    }

    #[test]
    fn people_are_told_in_mebibytes() {
        let text = status().to_string();
        assert!(
            text.contains("saved:      84.0 MiB: 21504 pages share 12"),
            "{text}"
        );
        assert!(text.contains("merges: 420 pages, then 20 ms"), "{text}");
        assert!(text.contains("group:      red; pods of other"), "{text}");
        assert!(text.contains("smart scan not in this kernel"), "{text}");
    }

    #[test]
    fn programs_are_told_in_bytes() {
        let json = serde_json::to_value(status()).unwrap();
        assert_eq!(json["saved_bytes"], 21_504 * 4096);
        assert_eq!(json["daemon"], "running");
        assert_eq!(json["group"]["is"], "red");
        assert_eq!(json["counters"]["full_scans"], 7);
    }

    #[test]
    fn a_daemon_that_died_is_absent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        assert_eq!(daemon(&path), Daemon::Absent);
        let socket = UnixDatagram::bind(&path).unwrap();
        assert_eq!(daemon(&path), Daemon::Running);
        drop(socket);
        assert_eq!(daemon(&path), Daemon::Absent);
    }
}
