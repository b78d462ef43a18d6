// SPDX-License-Identifier: Apache-2.0
//! Where the box keeps what is slow to make.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::fcntl::{Flock, FlockArg};

use super::error::{io_step, BoxError};

/// `${BULKHEAD_CACHE:-$HOME/.cache/bulkhead}/box`, made when missing.
///
/// # Errors
/// Those of making the directory.
pub fn dir() -> Result<PathBuf, BoxError> {
    let base = match env::var_os("BULKHEAD_CACHE").filter(|v| !v.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => env::var_os("HOME")
            .map_or_else(|| PathBuf::from("/root"), PathBuf::from)
            .join(".cache/bulkhead"),
    };
    let dir = base.join("box");
    fs::create_dir_all(&dir).map_err(io_step(format!("make {}", dir.display())))?;
    fs::canonicalize(&dir).map_err(io_step(format!("find {}", dir.display())))
}

/// Keeps other processes from preparing the same things until dropped.
///
/// # Errors
/// Those of opening and locking the lock file.
pub fn lock(cache: &Path) -> Result<Flock<File>, BoxError> {
    let path = cache.join("lock");
    let file = File::create(&path).map_err(io_step(format!("open {}", path.display())))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| io_step(format!("lock {}", path.display()))(errno.into()))
}

/// A directory in the cache that goes away with the value.
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes one.
    ///
    /// # Errors
    /// Those of making the directory.
    pub fn new(cache: &Path) -> Result<Self, BoxError> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = cache.join(format!(".scratch-{}-{n}", std::process::id()));
        fs::create_dir_all(&path).map_err(io_step(format!("make {}", path.display())))?;
        Ok(Self(path))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed is only in the way of nobody.
        let _ = fs::remove_dir_all(&self.0);
    }
}
