// SPDX-License-Identifier: Apache-2.0
//! The values found, kept on disk while they are changed.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    sysfs::{self, Ksm, Settings},
    KsmError,
};

/// Names the running kernel: settings do not outlive it.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The file's contents.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    /// Of the kernel that the values were found in; empty if unknown.
    boot_id: String,
    /// KSM's directory.
    ksm: PathBuf,
    settings: Settings,
}

/// The file.
#[derive(Debug)]
pub struct Saved {
    path: PathBuf,
    ksm: PathBuf,
}

impl Saved {
    /// For the settings of `ksm`; writes nothing.
    pub fn new(path: &Path, ksm: &Ksm) -> Self {
        Self {
            path: path.into(),
            ksm: ksm.dir().into(),
        }
    }

    /// Whether values are kept.
    pub fn is_there(&self) -> bool {
        self.path.exists()
    }

    /// The values that a daemon of this boot has left.
    ///
    /// # Errors
    /// The file cannot be read or is not what was written.
    pub fn load(&self) -> Result<Option<Settings>, KsmError> {
        let text = match fs::read_to_string(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                return Err(KsmError::Read {
                    path: self.path.clone(),
                    source,
                });
            }
        };
        let bad = |problem: String| KsmError::BadState {
            path: self.path.clone(),
            ksm: self.ksm.clone(),
            problem,
        };
        let record: Record = serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
        // The names become paths.
        if let Some(name) = record
            .settings
            .keys()
            .find(|name| !sysfs::SETTINGS.contains(&name.as_str()))
        {
            return Err(bad(format!("no setting is called {name:?}")));
        }
        if record.boot_id != boot_id() || record.ksm != self.ksm {
            self.remove()?;
            return Ok(None);
        }
        Ok(Some(record.settings))
    }

    /// Keeps the values unless they are kept.
    ///
    /// # Errors
    /// [`KsmError::State`].
    pub fn save(&self, settings: &Settings) -> Result<(), KsmError> {
        if self.is_there() {
            return Ok(());
        }
        self.replace(settings)
    }

    /// Keeps these values from now on.
    ///
    /// # Errors
    /// [`KsmError::State`].
    pub fn replace(&self, settings: &Settings) -> Result<(), KsmError> {
        let record = Record {
            boot_id: boot_id(),
            ksm: self.ksm.clone(),
            settings: settings.clone(),
        };
        let written = serde_json::to_vec(&record)
            .map_err(io::Error::from)
            .and_then(|text| self.write(&text));
        written.map_err(|source| KsmError::State {
            path: self.path.clone(),
            source,
        })
    }

    /// Whole or not at all.
    fn write(&self, text: &[u8]) -> io::Result<()> {
        let new = self.path.with_extension("new");
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        file.write_all(text)?;
        file.sync_all()?;
        fs::rename(&new, &self.path)
    }

    /// The values are back in place.
    ///
    /// # Errors
    /// [`KsmError::State`].
    pub fn remove(&self) -> Result<(), KsmError> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(KsmError::State {
                path: self.path.clone(),
                source: error,
            }),
            _ => Ok(()),
        }
    }
}

fn boot_id() -> String {
    fs::read_to_string(BOOT_ID)
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved(dir: &Path) -> Saved {
        fs::write(dir.join("run"), "0\n").unwrap();
        Saved::new(&dir.join("state.json"), &Ksm::find(dir).unwrap())
    }

    #[test]
    fn values_come_back_once() {
        let dir = tempfile::tempdir().unwrap();
        let saved = saved(dir.path());
        assert_eq!(saved.load().unwrap(), None);
        let settings = Settings::from([("run".to_owned(), "1".to_owned())]);
        saved.save(&settings).unwrap();
        // The first found are the ones that count.
        saved.save(&Settings::new()).unwrap();
        assert_eq!(saved.load().unwrap(), Some(settings));
        saved.remove().unwrap();
        saved.remove().unwrap();
        assert_eq!(saved.load().unwrap(), None);
    }

    #[test]
    fn another_boot_s_values_are_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let saved = saved(dir.path());
        saved.save(&Settings::new()).unwrap();
        let path = dir.path().join("state.json");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace(&boot_id(), "other")).unwrap();
        assert_eq!(saved.load().unwrap(), None);
        assert!(!path.exists());
    }

    #[test]
    fn a_damaged_file_is_refused_with_a_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let saved = saved(dir.path());
        let path = dir.path().join("state.json");
        for text in [
            String::new(),
            "{}".into(),
            format!(
                "{{\"boot_id\":\"{}\",\"ksm\":{:?},\"settings\":{{\"../x\":\"1\"}}}}",
                boot_id(),
                dir.path()
            ),
        ] {
            fs::write(&path, text).unwrap();
            let error = saved.load().unwrap_err().to_string();
            assert!(error.contains("state.json is damaged"), "{error}");
        }
    }
}
