// SPDX-License-Identifier: Apache-2.0
//! `bulkhead metrics`.

use bulkhead_runtime::{
    config::Config,
    node::{self, PATIENCE},
};
use clap::Args;

/// Figures of all pods.
#[derive(Debug, Args)]
pub struct Command {}

impl Command {
    /// Tells them.
    pub fn execute(&self, config: &Config) -> Result<(), String> {
        let state_dir = &config.runtime.state_dir;
        let text = node::metrics(state_dir, PATIENCE).map_err(|error| {
            format!("read {} (runtime.state_dir): {error}", state_dir.display())
        })?;
        print!("{text}");
        Ok(())
    }
}
