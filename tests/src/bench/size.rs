// SPDX-License-Identifier: Apache-2.0
//! Bytes of what is installed.

use std::fs;

use anyhow::{Context, Result};

use super::{Bench, Figure};

/// `agent-size`, `shim-size`, `vmm-size`, `kernel-size`.
///
/// # Errors
/// When something is not built.
pub fn figures(bench: &Bench) -> Result<Vec<Figure>> {
    let products = &bench.products;
    [
        ("agent-size", products.program("bulkhead-agent")),
        ("shim-size", products.program("containerd-shim-bulkhead-v2")),
        ("vmm-size", products.program("bulkhead-vmm")),
        ("kernel-size", products.kernel()),
    ]
    .into_iter()
    .map(|(name, path)| {
        let bytes = fs::metadata(&path)
            .with_context(|| format!("{name}: {}", path.display()))?
            .len();
        Ok(Figure::new(name, bytes as f64, "bytes", "size of the file"))
    })
    .collect()
}
