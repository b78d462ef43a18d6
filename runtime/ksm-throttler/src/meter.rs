// SPDX-License-Identifier: Apache-2.0
//! Figures read again and again, from files that stay open: what opening costs
//! the kernel is most of what a step costs.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    ksmd::Ksmd,
    sysfs::{self, Counters, Ksm},
    KsmError,
};

/// Longer than any figure, and than all of a process's `schedstat`.
const LONGEST: usize = 128;

/// One open file.
#[derive(Debug)]
pub struct Figure {
    file: File,
    path: PathBuf,
}

impl Figure {
    /// Opens it.
    ///
    /// # Errors
    /// [`KsmError::Read`].
    pub fn open(path: &Path) -> Result<Self, KsmError> {
        match File::open(path) {
            Ok(file) => Ok(Self {
                file,
                path: path.into(),
            }),
            Err(source) => Err(KsmError::Read {
                path: path.into(),
                source,
            }),
        }
    }

    /// Its first word as a number, as it is now.
    ///
    /// # Errors
    /// [`KsmError::Read`], [`KsmError::Unexpected`].
    pub fn read(&self) -> Result<u64, KsmError> {
        let mut text = [0; LONGEST];
        // At its beginning, where the kernel makes the text anew.
        let length = self
            .file
            .read_at(&mut text, 0)
            .map_err(|source| KsmError::Read {
                path: self.path.clone(),
                source,
            })?;
        let text = String::from_utf8_lossy(&text[..length]);
        text.split_ascii_whitespace()
            .next()
            .and_then(|word| word.parse().ok())
            .ok_or_else(|| KsmError::Unexpected {
                path: self.path.clone(),
                text: text.trim_end().into(),
            })
    }
}

/// All that a step needs.
#[derive(Debug)]
pub struct Meter {
    pages_shared: Figure,
    pages_sharing: Figure,
    pages_unshared: Figure,
    pages_volatile: Figure,
    zero_pages: Option<Figure>,
    full_scans: Figure,
    pages_to_scan: Figure,
    ksmd: Ksmd,
    schedstat: Option<Figure>,
}

impl Meter {
    /// Opens the files.
    ///
    /// # Errors
    /// One that every kernel has cannot be opened.
    pub fn open(ksm: &Ksm, ksmd: Ksmd) -> Result<Self, KsmError> {
        let figure = |name: &str| Figure::open(&ksm.dir().join(name));
        let schedstat = match ksmd.exact()? {
            Some(_) => Some(Figure::open(&ksmd.schedstat())?),
            None => None,
        };
        Ok(Self {
            pages_shared: figure("pages_shared")?,
            pages_sharing: figure("pages_sharing")?,
            pages_unshared: figure("pages_unshared")?,
            pages_volatile: figure("pages_volatile")?,
            zero_pages: optional(figure(sysfs::ZERO_PAGES))?,
            full_scans: figure("full_scans")?,
            pages_to_scan: figure(sysfs::PAGES_TO_SCAN)?,
            ksmd,
            schedstat,
        })
    }

    /// ksmd's processor time, and those of KSM's figures that a decision takes;
    /// the others are 0.
    ///
    /// # Errors
    /// [`KsmError::Read`], [`KsmError::Unexpected`].
    pub fn read(&self) -> Result<(Duration, Counters), KsmError> {
        let cpu = match &self.schedstat {
            Some(exact) => Duration::from_nanos(exact.read()?),
            None => self.ksmd.cpu_time()?,
        };
        let counters = Counters {
            pages_shared: self.pages_shared.read()?,
            pages_sharing: self.pages_sharing.read()?,
            pages_unshared: self.pages_unshared.read()?,
            pages_volatile: self.pages_volatile.read()?,
            zero_pages: match &self.zero_pages {
                Some(figure) => figure.read()?,
                None => 0,
            },
            full_scans: self.full_scans.read()?,
            pages_to_scan: self.pages_to_scan.read()?,
            ..Counters::default()
        };
        Ok((cpu, counters))
    }
}

/// What older kernels do not have.
fn optional(figure: Result<Figure, KsmError>) -> Result<Option<Figure>, KsmError> {
    match figure {
        Ok(figure) => Ok(Some(figure)),
        Err(KsmError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_figure_is_read_as_it_is_now() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("figure");
        fs::write(&path, "1234567 89 0\n").unwrap();
        let figure = Figure::open(&path).unwrap();
        assert_eq!(figure.read().unwrap(), 1_234_567);
        fs::write(&path, "8\n").unwrap();
        assert_eq!(figure.read().unwrap(), 8);
        fs::write(&path, "many\n").unwrap();
        let error = figure.read().unwrap_err().to_string();
        assert!(error.contains("figure says \"many\""), "{error}");
    }
}
