// SPDX-License-Identifier: Apache-2.0
//! The EROFS image, by mkfs.erofs of erofs-utils 1.5 or later: uncompressed
//! and without inline data, since only whole blocks can be mapped by DAX.

use std::{
    fs::{self, File},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Command,
};

use anyhow::{bail, Context, Result};

use crate::tree::Entry;

/// virtio-pmem wants whole 2 MiB pages.
const UNIT: u64 = 2 << 20;

/// Fixed, so that equal trees give equal images.
const UUID: &str = "62756c6b-6865-6164-0000-000000000001";

/// Writes the image of `entries` to `image`, by way of the directory
/// `staging`, which must not exist.
pub fn write(entries: &[Entry], staging: &Path, image: &Path) -> Result<()> {
    stage(entries, staging)?;
    let output = Command::new("mkfs.erofs")
        .args([
            "--quiet",
            "-T0",
            "--all-root",
            "-U",
            UUID,
            "-E",
            "noinline_data",
        ])
        .arg(image)
        .arg(staging)
        .output()
        .context("mkfs.erofs cannot be run: install erofs-utils")?;
    fs::remove_dir_all(staging).with_context(|| staging.display().to_string())?;
    if !output.status.success() {
        bail!(
            "mkfs.erofs failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let file = File::options()
        .write(true)
        .open(image)
        .with_context(|| image.display().to_string())?;
    let size = file.metadata()?.len();
    file.set_len(size.next_multiple_of(UNIT))?;
    Ok(())
}

/// Lays the tree out in a directory. Device nodes stay out: devtmpfs brings
/// them, and making one takes rights that a build need not have.
fn stage(entries: &[Entry], staging: &Path) -> Result<()> {
    fs::create_dir(staging).with_context(|| staging.display().to_string())?;
    set_mode(staging, 0o755)?;
    for entry in entries {
        match entry {
            Entry::Directory(path) => {
                let path = staging.join(path);
                fs::create_dir(&path).with_context(|| path.display().to_string())?;
                set_mode(&path, 0o755)?;
            }
            Entry::File {
                path,
                mode,
                content,
            } => {
                let path = staging.join(path);
                fs::write(&path, content).with_context(|| path.display().to_string())?;
                set_mode(&path, *mode)?;
            }
            Entry::Character { .. } => {}
        }
    }
    Ok(())
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .with_context(|| path.display().to_string())
}
