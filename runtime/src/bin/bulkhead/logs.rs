// SPDX-License-Identifier: Apache-2.0
//! `bulkhead logs`: what the shims of pods have logged, also of one that is
//! dead.

use std::{
    fs::File,
    io::{self, stdout, Read, Write},
    os::unix::fs::MetadataExt,
    path::Path,
    thread,
    time::Duration,
};

use bulkhead_runtime::{
    config::Config,
    error::chain,
    node::{Found, PATIENCE},
    operator::client,
};
use clap::Args;

use crate::{find, Failure};

/// How often more is looked for.
const LOOK: Duration = Duration::from_millis(200);

/// Logs of pods.
#[derive(Debug, Args)]
pub struct Command {
    /// Only of this sandbox, or of that with this container
    #[arg(value_name = "NAME", required_if_eq_any([("follow", "true"), ("console", "true"), ("kernel", "true")]))]
    name: Option<String>,
    /// Go on with what is logged, until the sandbox is gone
    #[arg(short, long)]
    follow: bool,
    /// The last lines of the guest's console instead
    #[arg(long, conflicts_with = "follow")]
    console: bool,
    /// The log of the guest's kernel instead
    #[arg(long, conflicts_with_all = ["follow", "console"])]
    kernel: bool,
}

impl Command {
    /// Prints them.
    pub fn execute(&self, config: &Config) -> Result<(), Failure> {
        let sandboxes = match &self.name {
            Some(name) => vec![find::sandbox(config, name)?],
            None => find::all(config)?,
        };
        for found in &sandboxes {
            if self.console || self.kernel {
                let what = if self.kernel { "/kernel" } else { "/console" };
                let text = client::get(&found.socket(), what, PATIENCE)
                    .map_err(|error| format!("ask {}: {}", found.id, chain(&error)))?;
                print!("{text}");
                continue;
            }
            let [old, new] = found.logs();
            if self.name.is_some() && !new.exists() {
                return Err(find::absent(nothing(found)));
            }
            let told = copy(&old).and_then(|_| match self.follow {
                true => follow(&new),
                false => copy(&new).map(drop),
            });
            told.map_err(|error| format!("log of {}: {error}", found.id))?;
        }
        Ok(())
    }
}

fn nothing(found: &Found) -> String {
    let why = match found.task_socket {
        Some(_) => "runtime.log_kept_kib is 0, or it was not finished",
        None => "it has no shim: bulkhead run --verbose logs to its standard error",
    };
    format!("no log of {} is kept: {why}", found.id)
}

/// Prints a file, if it is there.
fn copy(path: &Path) -> io::Result<u64> {
    match File::open(path) {
        Ok(mut file) => io::copy(&mut file, &mut stdout().lock()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error),
    }
}

/// Prints a file and what is added to it, and its successors, until there is
/// none.
fn follow(path: &Path) -> io::Result<()> {
    let mut file = File::open(path)?;
    loop {
        io::copy(&mut file, &mut stdout().lock())?;
        stdout().flush()?;
        let there = std::fs::metadata(path);
        match there {
            Ok(there) if there.ino() == file.metadata()?.ino() => thread::sleep(LOOK),
            // What was written before it was replaced, or removed.
            Ok(_) => {
                drain(&mut file)?;
                file = File::open(path)?;
            }
            Err(_) => return drain(&mut file),
        }
    }
}

fn drain(file: &mut File) -> io::Result<()> {
    let mut rest = Vec::new();
    file.read_to_end(&mut rest)?;
    stdout().lock().write_all(&rest)
}
