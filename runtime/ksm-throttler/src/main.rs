// SPDX-License-Identifier: Apache-2.0
//! `bulkhead-ksm-throttler`: raises the effort of page merging when pods start,
//! and ends it when it no longer pays.
#![forbid(unsafe_code)]

use std::{io::stderr, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use bulkhead_ksm_throttler::{
    controller::Limits,
    daemon::{self, Options},
    group, sysfs, METRICS_SOCKET, SOCKET, STATE_FILE,
};
use clap::Parser;

/// Merges identical memory of pods (KSM) while that pays.
///
/// Sleeps until a datagram comes to its socket: the shim sends one for each pod
/// that starts. Then has ksmd scan, within a bound on its processor time, until
/// two full scans in a row have gained nothing. At its end the settings it
/// found in /sys/kernel/mm/ksm are back; after a crash, at its next start.
#[derive(Debug, Parser)]
#[command(name = "bulkhead-ksm-throttler", version)]
struct Cli {
    /// Most processor time of ksmd while it scans, in percent of one processor
    #[arg(long, value_name = "PERCENT", default_value_t = 50,
          value_parser = clap::value_parser!(u8).range(1..=100))]
    cpu_percent: u8,
    /// Pages that a second of ksmd's processor time must save; a scan that saves
    /// fewer counts as one without gain
    #[arg(long, value_name = "PAGES", default_value_t = 500)]
    min_profit: u32,
    /// Socket for kicks
    #[arg(long, value_name = "PATH", default_value = SOCKET)]
    socket: PathBuf,
    /// Socket that answers HTTP GET with metrics for Prometheus
    #[arg(long, value_name = "PATH", default_value = METRICS_SOCKET)]
    metrics_socket: PathBuf,
    /// File for the settings found, for as long as they are changed
    #[arg(long, value_name = "PATH", default_value = STATE_FILE)]
    state_file: PathBuf,
    /// What to log: error, warn, info, debug
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log_level: tracing::Level,
    /// Which merge group has mergeable memory, for tests
    #[arg(long, value_name = "PATH", default_value = group::RECORD, hide = true)]
    merge_group: PathBuf,
    /// KSM's directory, for tests
    #[arg(long, value_name = "DIR", default_value = sysfs::DIRECTORY, hide = true)]
    sysfs: PathBuf,
    /// Directory of processes, for tests
    #[arg(long, value_name = "DIR", default_value = "/proc", hide = true)]
    proc: PathBuf,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_max_level(cli.log_level)
        .with_ansi(false)
        .with_writer(stderr)
        .init();
    let options = Options {
        sysfs: cli.sysfs,
        proc: cli.proc,
        socket: cli.socket,
        metrics_socket: cli.metrics_socket,
        state_file: cli.state_file,
        group: cli.merge_group,
        limits: Limits {
            cpu_share: f64::from(cli.cpu_percent) / 100.0,
            min_profit: f64::from(cli.min_profit),
            ..Limits::default()
        },
    };
    match daemon::run(&options).context("page merging is not steered") {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bulkhead-ksm-throttler: {error:#}");
            ExitCode::FAILURE
        }
    }
}
