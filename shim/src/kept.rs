// SPDX-License-Identifier: Apache-2.0
//! The part of the log that stays with the pod's state, for `bulkhead logs`:
//! there whether containerd's log can be found or not, and still there when
//! the shim is not. Two files, the older of which goes when the newer is full.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// What is remembered while there is no place for it, in bytes.
const EARLY: usize = 32 * 1024;

static KEPT: Mutex<Kept> = Mutex::new(Kept::Early(String::new()));

#[derive(Debug)]
enum Kept {
    /// There is no pod yet.
    Early(String),
    /// Beside the pod's state.
    Files {
        file: File,
        path: PathBuf,
        length: u64,
        /// Of one file.
        limit: u64,
    },
    /// It is not wanted, or cannot be kept.
    Nowhere,
}

fn kept() -> MutexGuard<'static, Kept> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps a line.
pub fn line(line: &str) {
    kept().line(line);
}

/// Keeps what comes, and what has come, at `path`, `bytes` of it in all.
pub fn at(path: &Path, bytes: u64) {
    kept().at(path, bytes);
}

/// The pod is gone, and with it the files.
pub fn end() {
    *kept() = Kept::Early(String::new());
}

impl Kept {
    fn line(&mut self, line: &str) {
        match self {
            Self::Early(text) => {
                if text.len() + line.len() <= EARLY {
                    text.push_str(line);
                }
            }
            Self::Files {
                file,
                path,
                length,
                limit,
            } => {
                if *length + line.len() as u64 > *limit && *length > 0 {
                    match renewed(path) {
                        Some(new) => (*file, *length) = (new, 0),
                        None => {
                            *self = Self::Nowhere;
                            return;
                        }
                    }
                }
                // A line that does not fit any more is lost.
                if file.write_all(line.as_bytes()).is_ok() {
                    *length += line.len() as u64;
                }
            }
            Self::Nowhere => {}
        }
    }

    fn at(&mut self, path: &Path, bytes: u64) {
        let early = match self {
            Self::Early(text) => std::mem::take(text),
            Self::Files { .. } | Self::Nowhere => String::new(),
        };
        *self = match renewed(path).filter(|_| bytes > 0) {
            Some(file) => Self::Files {
                file,
                path: path.into(),
                length: 0,
                limit: bytes / 2,
            },
            None => Self::Nowhere,
        };
        for line in early.split_inclusive('\n') {
            self.line(line);
        }
    }
}

/// An empty file; what there was is the older one now.
fn renewed(path: &Path) -> Option<File> {
    // There is none at first.
    let _ = fs::rename(path, path.with_extension("old"));
    File::create(path).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut kept = Kept::Early(String::new());
        kept.line("early\n");
        kept.at(&path, 40);
        kept.line("second\n");
        assert_eq!(fs::read_to_string(&path).unwrap(), "early\nsecond\n");
        for number in 0..10 {
            kept.line(&format!("line {number}\n"));
        }
        let text = |path: &Path| fs::read_to_string(path).unwrap();
        // Two lines fit into half of 40 bytes.
        assert_eq!(text(&path), "line 9\n");
        assert_eq!(text(&path.with_extension("old")), "line 7\nline 8\n");
    }

    #[test]
    fn what_is_not_wanted_is_not_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut kept = Kept::Early(String::new());
        kept.at(&path, 0);
        kept.line("x\n");
        assert!(fs::read(&path).map_or(true, |text| text.is_empty()));
        // Whose directory is gone.
        let mut kept = Kept::Early(String::new());
        kept.at(&directory.path().join("gone/log"), 100);
        kept.line("x\n");
        assert!(matches!(kept, Kept::Nowhere));
    }
}
