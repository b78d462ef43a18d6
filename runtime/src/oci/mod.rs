// SPDX-License-Identifier: Apache-2.0
//! A bundle's config.json, and what of it goes into the guest.

use std::{io, path::PathBuf};

/// Why a bundle's config.json cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// It cannot be read.
    #[error("{} cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It is not what the runtime specification says; the source tells the
    /// field, line and column.
    #[error("{}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and what.
        #[source]
        source: serde_json::Error,
    },
    /// A value cannot be used.
    #[error("{field}: {problem}")]
    Field {
        /// The field, or the annotation.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
}
