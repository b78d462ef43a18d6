// SPDX-License-Identifier: Apache-2.0
//! `bulkhead density`.

use bulkhead_runtime::{
    config::Config,
    density::{Density, Places},
    error::chain,
};
use clap::Args;

use crate::format::Format;

/// What pods cost.
#[derive(Debug, Args)]
pub struct Command {
    /// How to tell it
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

impl Command {
    /// Tells it.
    pub fn execute(&self, config: &Config) -> Result<(), String> {
        let places = Places::new(&config.runtime.state_dir);
        let density = Density::take(&places).map_err(|error| chain(&error))?;
        self.format.print(&density)
    }
}
