// SPDX-License-Identifier: Apache-2.0
//! `bulkhead ksm`.

use std::path::{Path, PathBuf};

use bulkhead_ksm_throttler::{group, status::Status, sysfs};
use bulkhead_runtime::{config::Config, error::chain};
use clap::Subcommand;

use crate::format::Format;

/// What to do about page merging.
#[derive(Debug, Subcommand)]
pub enum Ksm {
    /// Tell what is merged, and whether the daemon runs
    Status {
        /// How to tell it
        #[arg(long, value_enum, default_value_t = Format::Text)]
        format: Format,
        /// KSM's directory, for tests
        #[arg(long, value_name = "DIR", default_value = sysfs::DIRECTORY, hide = true)]
        sysfs: PathBuf,
    },
}

impl Ksm {
    /// Does it.
    pub fn execute(&self, config: &Config) -> Result<(), String> {
        match self {
            Self::Status { format, sysfs } => status(*format, sysfs, &config.ksm_socket()),
        }
    }
}

fn status(format: Format, sysfs: &Path, socket: &Path) -> Result<(), String> {
    let status =
        Status::take(sysfs, socket, Path::new(group::RECORD)).map_err(|error| chain(&error))?;
    format.print(&status)
}
