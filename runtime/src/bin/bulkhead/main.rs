// SPDX-License-Identifier: Apache-2.0
//! `bulkhead`: microVM containers from the command line, without a daemon.
#![forbid(unsafe_code)]

mod bundle;
mod check;
mod density;
mod format;
mod ksm;
mod run;
mod terminal;

use std::{path::PathBuf, process::ExitCode};

use bulkhead_runtime::{clock, config::Config, error::chain};
use clap::{Parser, Subcommand};

/// Containers in microVMs of their own.
#[derive(Debug, Parser)]
#[command(name = "bulkhead", version)]
struct Cli {
    /// Configuration file [default: /etc/bulkhead/config.toml, if it is there]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a command in a container in a microVM of its own
    Run(run::Run),
    /// Tell whether this host can run microVMs, and what to do if not
    Check,
    /// Page merging (KSM) between pods
    Ksm {
        #[command(subcommand)]
        command: ksm::Ksm,
    },
    /// Tell what each pod costs of the host's memory, what they share, and how
    /// many more would fit (root)
    Density(density::Command),
}

/// What env(1) and container runtimes return when they fail themselves.
const FAILED: u8 = 125;

fn main() -> ExitCode {
    let start_us = clock::monotonic_us();
    let cli = Cli::parse();
    let config = match Config::load(cli.config.as_deref()) {
        Ok(config) => config,
        Err(error) => return fail(&chain(&error)),
    };
    tracing_subscriber::fmt()
        .with_max_level(match &cli.command {
            Command::Run(run) if run.verbose => tracing::Level::from(config.runtime.log_level),
            _ => tracing::Level::ERROR,
        })
        .with_writer(std::io::stderr)
        .init();
    match cli.command {
        Command::Check => check::check(&config),
        Command::Ksm { command } => match command.execute(&config) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error),
        },
        Command::Density(density) => match density.execute(&config) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error),
        },
        Command::Run(run) => match run.execute(config, start_us) {
            // What a process can return.
            Ok(status) => ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX)),
            Err(error) => fail(&error),
        },
    }
}

fn fail(why: &str) -> ExitCode {
    eprintln!("bulkhead: {why}");
    ExitCode::from(FAILED)
}
