// SPDX-License-Identifier: Apache-2.0
//! A pod's lock: containerd runs `start` and `delete` of one pod at the same
//! time.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::fs::{flock, FlockOperation};

/// Held until it is dropped; its file goes with it.
#[derive(Debug)]
pub struct PodLock {
    path: PathBuf,
    _file: File,
}

impl PodLock {
    /// Waits for the lock of the pod that is served at `socket`.
    ///
    /// # Errors
    /// Those of the system.
    pub fn acquire(socket: &Path) -> io::Result<Self> {
        let path = socket.with_extension("lock");
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        loop {
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .mode(0o600)
                .open(&path)?;
            flock(&file, FlockOperation::LockExclusive)?;
            // Whoever held it before has removed the file: then this is a lock
            // that nobody else can find.
            match fs::metadata(&path) {
                Ok(there) if there.ino() == file.metadata()?.ino() => {
                    return Ok(Self { path, _file: file });
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for PodLock {
    fn drop(&mut self) {
        // Still locked, so no one else has it. A file that stays is harmless.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicU32, Ordering},
        thread,
        time::Duration,
    };

    use super::*;

    #[test]
    fn one_at_a_time_and_nothing_left() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let inside = AtomicU32::new(0);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..10 {
                        let _lock = PodLock::acquire(&socket).unwrap();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        thread::sleep(Duration::from_micros(200));
                        assert_eq!(inside.fetch_sub(1, Ordering::SeqCst), 1);
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
