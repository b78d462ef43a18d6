// SPDX-License-Identifier: Apache-2.0
//! The daemon's command line, and its manual page's sections that do not follow
//! from it. `bulkhead man` makes the page.

use std::path::PathBuf;

use clap::Parser;

use crate::{group, sysfs, METRICS_SOCKET, SOCKET, STATE_FILE};

/// Sections of the manual page, in roff.
pub const SECTIONS: &str = include_str!("../man/sections.roff");

/// Merges identical memory of pods (KSM) while that pays.
///
/// Sleeps until a datagram comes to its socket: the shim sends one for each pod
/// that starts. Then has ksmd scan, within a bound on its processor time, until
/// two full scans in a row have gained nothing. At its end the settings it
/// found in /sys/kernel/mm/ksm are back; after a crash, at its next start.
#[derive(Debug, Parser)]
#[command(name = "bulkhead-ksm-throttler", version)]
pub struct Cli {
    /// Most processor time of ksmd while it scans, in percent of one processor
    #[arg(long, value_name = "PERCENT", default_value_t = 95,
          value_parser = clap::value_parser!(u8).range(1..=100))]
    pub cpu_percent: u8,
    /// Pages that a second of ksmd's processor time must save; a scan that saves
    /// fewer counts as one without gain
    #[arg(long, value_name = "PAGES", default_value_t = 500)]
    pub min_profit: u32,
    /// Socket for kicks
    #[arg(long, value_name = "PATH", default_value = SOCKET)]
    pub socket: PathBuf,
    /// Socket that answers HTTP GET with metrics for Prometheus
    #[arg(long, value_name = "PATH", default_value = METRICS_SOCKET)]
    pub metrics_socket: PathBuf,
    /// File for the settings found, for as long as they are changed
    #[arg(long, value_name = "PATH", default_value = STATE_FILE)]
    pub state_file: PathBuf,
    /// What to log: error, warn, info, debug
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log_level: tracing::Level,
    /// Which merge group has mergeable memory, for tests
    #[arg(long, value_name = "PATH", default_value = group::RECORD, hide = true)]
    pub merge_group: PathBuf,
    /// KSM's directory, for tests
    #[arg(long, value_name = "DIR", default_value = sysfs::DIRECTORY, hide = true)]
    pub sysfs: PathBuf,
    /// Directory of processes, for tests
    #[arg(long, value_name = "DIR", default_value = "/proc", hide = true)]
    pub proc: PathBuf,
}
