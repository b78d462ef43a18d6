// SPDX-License-Identifier: Apache-2.0
//! For whom something is printed.

use std::fmt::Display;

use clap::ValueEnum;
use serde::Serialize;

/// For whom.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Format {
    /// Plain words
    Text,
    /// One JSON object; sizes in bytes
    Json,
}

impl Format {
    /// Prints it.
    pub fn print(self, what: &(impl Display + Serialize)) -> Result<(), String> {
        match self {
            Self::Text => print!("{what}"),
            Self::Json => {
                let json = serde_json::to_string_pretty(what).map_err(|error| error.to_string())?;
                println!("{json}");
            }
        }
        Ok(())
    }
}
