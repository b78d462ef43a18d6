// SPDX-License-Identifier: Apache-2.0
//! `bulkhead-ksm-throttler`: raises the effort of page merging when pods start,
//! and ends it when it no longer pays.
#![forbid(unsafe_code)]

use std::{io::stderr, process::ExitCode};

use anyhow::Context as _;
use bulkhead_ksm_throttler::{
    cli::Cli,
    controller::Limits,
    daemon::{self, Options},
};
use clap::Parser;

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
