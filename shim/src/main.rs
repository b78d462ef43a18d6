// SPDX-License-Identifier: Apache-2.0
//! The shim between containerd (or CRI-O) and a pod in its microVM.
//!
//! containerd runs this binary with an action on its command line. `start`
//! finds the pod's shim or runs one in the background (`serve`: the same
//! binary again) and prints its address; containerd then calls the task
//! service there. `delete` cleans up after a shim that has died.

#![deny(unsafe_code)] // the module named `sys` alone

mod bootstrap;
mod calls;
mod convert;
mod delete;
mod error;
mod events;
mod evict;
mod flags;
mod forward;
mod group;
mod info;
mod kept;
mod lock;
mod log;
mod metrics;
mod options;
mod pod;
mod reaper;
mod record;
mod sandbox;
mod serve;
mod service;
mod socket;
mod start;
mod stdio;
mod sys;

use std::{error::Error, process::ExitCode};

use bulkhead_runtime::error::chain;

use crate::flags::{Action, Flags};

fn main() -> ExitCode {
    let started_us = bulkhead_runtime::clock::monotonic_us();
    let flags = match Flags::parse(std::env::args_os().skip(1)) {
        Ok(flags) => flags,
        Err(error) => {
            eprintln!("{}: {error}", env!("CARGO_PKG_NAME"));
            return ExitCode::from(2);
        }
    };
    let done: Result<(), Box<dyn Error>> = match flags.action {
        Action::Start => start::run(&flags, started_us).map_err(Into::into),
        Action::Delete => delete::run(&flags).map_err(Into::into),
        Action::Serve => serve::run(&flags).map_err(Into::into),
        Action::Info => info::run().map_err(Into::into),
        Action::Version => info::version().map_err(Into::into),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let text = chain(error.as_ref());
            tracing::error!(error = text, "shim failed");
            eprintln!("{}: {text}", env!("CARGO_PKG_NAME"));
            ExitCode::FAILURE
        }
    }
}
