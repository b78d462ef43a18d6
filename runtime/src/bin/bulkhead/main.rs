// SPDX-License-Identifier: Apache-2.0
//! `bulkhead`: microVM containers from the command line, without a daemon, and
//! the operator's view of those that containerd runs.
#![forbid(unsafe_code)]

mod bundle;
mod check;
mod config;
mod cp;
mod density;
mod env;
mod events;
mod exec;
mod exec_io;
mod find;
mod format;
mod generate;
mod ksm;
mod list;
mod logs;
mod metrics;
mod run;
mod signals;
mod terminal;

use std::{path::PathBuf, process::ExitCode};

use bulkhead_runtime::{clock, config::Loaded, error::chain};
use clap::{Parser, Subcommand};

/// What every page and long help says at its end.
const EXIT_STATUS: &str = "Exit status: 0 on success; 1 when a check has found something; \
2 for a wrong command line; 3 when there is no such sandbox or container; \
125 when the command itself has failed; run and exec return their program's own otherwise, \
and 128 plus the signal's number when it was killed.";

/// Sections of the manual page that do not follow from the command line.
const SECTIONS: &str = include_str!("../../../man/sections.roff");

/// Containers in microVMs of their own.
///
/// Runs containers without a daemon, tells about those that containerd runs
/// through Bulkhead's shim, and checks the host.
#[derive(Debug, Parser)]
#[command(name = "bulkhead", version, after_long_help = EXIT_STATUS)]
struct Cli {
    /// Configuration file [default: /etc/bulkhead/config.toml, if it is there]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<Option<PathBuf>>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a command in a container in a microVM of its own
    Run(run::Run),
    /// List the sandboxes of this host, dead ones too
    List(list::List),
    /// Tell all about one sandbox
    State(list::Show),
    /// Run a further command in a container that containerd runs
    Exec(exec::Exec),
    /// Copy a file out of a container that containerd runs, or into it
    Cp(cp::Copy),
    /// Tell what has happened in sandboxes, and what happens
    Events(events::Command),
    /// Print what the shims of sandboxes have logged
    Logs(logs::Command),
    /// Print the metrics of all sandboxes, for Prometheus
    Metrics(metrics::Command),
    /// Tell what a bug report should tell of this host
    Env(env::Command),
    /// Tell whether this host can run microVMs, and what to do if not
    ///
    /// With --config only whether the configuration can be used, which needs no
    /// root.
    Check,
    /// Tell the effective configuration, and where each value comes from
    Config(config::Command),
    /// Page merging (KSM) between pods
    Ksm {
        #[command(subcommand)]
        command: ksm::Ksm,
    },
    /// Tell what each pod costs of the host's memory, what they share, and how
    /// many more would fit (root)
    Density(density::Command),
    /// Print the completion for a shell
    Completion(generate::Completion),
    /// Write the manual pages
    #[command(hide = true)]
    Man(generate::Pages),
}

/// Why a command has failed, and what is returned for it.
#[derive(Debug)]
struct Failure {
    code: u8,
    why: String,
}

impl From<String> for Failure {
    fn from(why: String) -> Self {
        Self { code: FAILED, why }
    }
}

/// What env(1) and container runtimes return when they fail themselves.
const FAILED: u8 = 125;

/// What clap returns for a wrong command line.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let start_us = clock::monotonic_us();
    match execute(Cli::parse(), start_us) {
        Ok(code) => code,
        Err(Failure { code, why }) => {
            eprintln!("bulkhead: {why}");
            ExitCode::from(code)
        }
    }
}

fn execute(cli: Cli, start_us: u64) -> Result<ExitCode, Failure> {
    // These need no configuration, and may have none that is usable.
    match &cli.command {
        Command::Completion(completion) => {
            completion.execute();
            return Ok(ExitCode::SUCCESS);
        }
        Command::Man(pages) => {
            pages.execute()?;
            return Ok(ExitCode::SUCCESS);
        }
        _ => {}
    }
    // `--config` alone, which says something to `check` only.
    if matches!(cli.config, Some(None)) && !matches!(cli.command, Command::Check) {
        return Err(Failure {
            code: USAGE,
            why: "--config: write the file's name".into(),
        });
    }
    let named = cli.config.as_ref().and_then(Option::as_deref);
    let loaded = Loaded::load(named).map_err(|error| chain(&error));
    if matches!(cli.command, Command::Check) && cli.config.is_some() {
        return Ok(check::configuration(&loaded));
    }
    let loaded = loaded?;
    tracing_subscriber::fmt()
        .with_max_level(match &cli.command {
            Command::Run(run) if run.verbose => {
                tracing::Level::from(loaded.config.runtime.log_level)
            }
            _ => tracing::Level::ERROR,
        })
        .with_writer(std::io::stderr)
        .init();
    let done = |()| ExitCode::SUCCESS;
    let config = &loaded.config;
    Ok(match cli.command {
        Command::Check => check::check(config),
        Command::Config(command) => command.execute(&loaded).map(done)?,
        Command::Ksm { command } => command.execute(config).map(done)?,
        Command::Density(density) => density.execute(config).map(done)?,
        Command::List(list) => list.execute(config).map(done)?,
        Command::State(show) => show.execute(config).map(done)?,
        Command::Exec(exec) => exit_code(exec.execute(config)?),
        Command::Cp(copy) => copy.execute(config).map(done)?,
        Command::Events(events) => events.execute(config).map(done)?,
        Command::Logs(logs) => logs.execute(config).map(done)?,
        Command::Metrics(metrics) => metrics.execute(config).map(done)?,
        Command::Env(env) => env.execute(&loaded).map(done)?,
        // Dealt with above.
        Command::Completion(_) | Command::Man(_) => ExitCode::SUCCESS,
        Command::Run(run) => exit_code(run.execute(loaded.config, start_us)?),
    })
}

/// What a process can return.
fn exit_code(status: u32) -> ExitCode {
    ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX))
}
