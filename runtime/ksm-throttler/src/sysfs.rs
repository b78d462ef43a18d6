// SPDX-License-Identifier: Apache-2.0
//! KSM's directory in sysfs: its settings and its figures.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use crate::KsmError;

/// Where the kernel keeps it.
pub const DIRECTORY: &str = "/sys/kernel/mm/ksm";

/// Every setting that the daemon may change, by its file's name.
pub const SETTINGS: [&str; 9] = [
    RUN,
    PAGES_TO_SCAN,
    SLEEP,
    SMART_SCAN,
    ADVISOR_MODE,
    ADVISOR_MAX_CPU,
    ADVISOR_TARGET,
    ADVISOR_MIN_PAGES,
    ADVISOR_MAX_PAGES,
];

/// 0 stands still, 1 merges, 2 takes all merged pages apart.
pub const RUN: &str = "run";
/// Pages that ksmd looks at before it sleeps.
pub const PAGES_TO_SCAN: &str = "pages_to_scan";
/// How long ksmd sleeps, in milliseconds.
pub const SLEEP: &str = "sleep_millisecs";
/// Whether pages that never merge are skipped (since 6.7).
pub const SMART_SCAN: &str = "smart_scan";
/// Whether the kernel sizes `pages_to_scan` itself (since 6.8).
pub const ADVISOR_MODE: &str = "advisor_mode";
/// Bound of the advisor, percent of a processor.
pub const ADVISOR_MAX_CPU: &str = "advisor_max_cpu";
/// How long the advisor lets one scan of everything take, in seconds.
pub const ADVISOR_TARGET: &str = "advisor_target_scan_time";
/// Fewest pages the advisor chooses, and those it starts with.
pub const ADVISOR_MIN_PAGES: &str = "advisor_min_pages_to_scan";
/// Most pages the advisor chooses.
pub const ADVISOR_MAX_PAGES: &str = "advisor_max_pages_to_scan";

/// Figure of pages replaced by the zero page (since 6.6).
pub const ZERO_PAGES: &str = "ksm_zero_pages";

/// The advisor when it is off.
pub const ADVISOR_OFF: &str = "none";
/// The advisor by scan time.
pub const ADVISOR_SCAN_TIME: &str = "scan-time";

/// The settings that there are, with their values.
pub type Settings = BTreeMap<String, String>;

/// What KSM has done so far. Pages are of 4 KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counters {
    /// Pages that others share.
    pub pages_shared: u64,
    /// Places that share them beyond the first: this many pages are saved.
    pub pages_sharing: u64,
    /// Pages that were found unique.
    pub pages_unshared: u64,
    /// Pages that changed too fast, or were seen only once so far.
    pub pages_volatile: u64,
    /// Pages replaced by the zero page; 0 where the kernel does not tell.
    pub zero_pages: u64,
    /// How often all mergeable memory was scanned.
    pub full_scans: u64,
    /// Pages that ksmd looks at before it sleeps.
    pub pages_to_scan: u64,
    /// How long it then sleeps, in milliseconds.
    pub sleep_millisecs: u64,
    /// 0 stands still, 1 merges, 2 takes apart.
    pub run: u64,
    /// Bytes saved less KSM's own memory; where the kernel tells (6.4).
    pub general_profit: Option<i64>,
}

impl Counters {
    /// Mergeable memory that KSM knows of, in pages.
    pub fn mergeable(&self) -> u64 {
        self.pages_shared
            .saturating_add(self.pages_sharing)
            .saturating_add(self.pages_unshared)
            .saturating_add(self.pages_volatile)
            .saturating_add(self.zero_pages)
    }

    /// Pages saved.
    pub fn saved(&self) -> u64 {
        self.pages_sharing.saturating_add(self.zero_pages)
    }
}

/// KSM's directory.
#[derive(Debug, Clone)]
pub struct Ksm {
    dir: PathBuf,
}

impl Ksm {
    /// Finds it.
    ///
    /// # Errors
    /// [`KsmError::Missing`].
    pub fn find(dir: &Path) -> Result<Self, KsmError> {
        if !dir.join(RUN).exists() {
            return Err(KsmError::Missing { path: dir.into() });
        }
        Ok(Self { dir: dir.into() })
    }

    /// Its path.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Tries whether the settings can be changed; changes none.
    ///
    /// # Errors
    /// [`KsmError::NotWritable`] with the file.
    pub fn check_writable(&self) -> Result<(), KsmError> {
        for name in [RUN, PAGES_TO_SCAN, SLEEP] {
            let path = self.dir.join(name);
            if let Err(source) = OpenOptions::new().write(true).open(&path) {
                return Err(KsmError::NotWritable { path, source });
            }
        }
        Ok(())
    }

    /// Whether this kernel has the setting.
    pub fn has(&self, setting: &str) -> bool {
        self.dir.join(setting).exists()
    }

    /// One file's text.
    ///
    /// # Errors
    /// [`KsmError::Read`].
    pub fn read(&self, name: &str) -> Result<String, KsmError> {
        let path = self.dir.join(name);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(text.trim().to_owned()),
            Err(source) => Err(KsmError::Read { path, source }),
        }
    }

    /// Changes a setting.
    ///
    /// # Errors
    /// [`KsmError::Write`].
    pub fn write(&self, setting: &str, value: &str) -> Result<(), KsmError> {
        let path = self.dir.join(setting);
        // Never creates: what is not there is no setting.
        let written = OpenOptions::new()
            .write(true)
            .truncate(true)
            .open(&path)
            .and_then(|mut file| file.write_all(value.as_bytes()));
        written.map_err(|source| KsmError::Write {
            path,
            value: value.into(),
            source,
        })
    }

    /// The settings that there are.
    ///
    /// # Errors
    /// [`KsmError::Read`].
    pub fn settings(&self) -> Result<Settings, KsmError> {
        let mut settings = Settings::new();
        for name in SETTINGS {
            match self.read(name) {
                Ok(text) => {
                    settings.insert(name.into(), chosen(&text).to_owned());
                }
                Err(KsmError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(settings)
    }

    /// The figures now.
    ///
    /// # Errors
    /// [`KsmError::Read`], [`KsmError::Unexpected`].
    pub fn counters(&self) -> Result<Counters, KsmError> {
        Ok(Counters {
            pages_shared: self.number("pages_shared")?,
            pages_sharing: self.number("pages_sharing")?,
            pages_unshared: self.number("pages_unshared")?,
            pages_volatile: self.number("pages_volatile")?,
            zero_pages: self.optional(ZERO_PAGES)?.unwrap_or(0),
            full_scans: self.number("full_scans")?,
            pages_to_scan: self.number(PAGES_TO_SCAN)?,
            sleep_millisecs: self.number(SLEEP)?,
            run: self.number(RUN)?,
            general_profit: self.optional("general_profit")?,
        })
    }

    fn number<T: std::str::FromStr>(&self, name: &str) -> Result<T, KsmError> {
        let text = self.read(name)?;
        text.parse().map_err(|_| KsmError::Unexpected {
            path: self.dir.join(name),
            text,
        })
    }

    /// A figure that older kernels do not have.
    fn optional<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>, KsmError> {
        match self.number(name) {
            Ok(number) => Ok(Some(number)),
            Err(KsmError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

/// Of `[none] scan-time` the word in brackets, else the whole text: what is
/// read differs from what is written.
fn chosen(text: &str) -> &str {
    text.split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'))
        .map_or(text, |(word, _)| word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chosen_word_is_in_brackets() {
        assert_eq!(chosen("[none] scan-time"), "none");
        assert_eq!(chosen("none [scan-time]"), "scan-time");
        assert_eq!(chosen("100"), "100");
    }

    #[test]
    fn mergeable_memory_is_all_that_ksm_knows() {
        let counters = Counters {
            pages_shared: 1,
            pages_sharing: 20,
            pages_unshared: 300,
            pages_volatile: 4000,
            zero_pages: 50_000,
            ..Counters::default()
        };
        assert_eq!(counters.mergeable(), 54_321);
        assert_eq!(counters.saved(), 50_020);
    }

    #[test]
    fn an_absent_directory_is_refused_by_name() {
        let error = Ksm::find(Path::new("/nonexistent/ksm")).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("/nonexistent/ksm") && text.contains("CONFIG_KSM"),
            "{text}"
        );
    }
}
