// SPDX-License-Identifier: Apache-2.0
//! What the shim writes down in each bundle for `delete`, which has to clean
//! up whatever the bundle and the configuration look like by then.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// The file in the bundle.
const FILE: &str = "bulkhead.json";

/// Where the container's pod is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The pod.
    pub group: String,
    /// Where sandboxes keep their state.
    pub state_dir: PathBuf,
    /// The process that stands for the container; 0 when there is none yet.
    pub pid: u32,
}

impl Record {
    /// Writes it.
    ///
    /// # Errors
    /// Those of the system.
    pub fn write(&self, bundle: &Path) -> io::Result<()> {
        let new = bundle.join(format!("{FILE}.new"));
        fs::write(&new, serde_json::to_vec(self)?)?;
        fs::rename(&new, bundle.join(FILE))
    }

    /// Reads it; none when there is no usable one.
    pub fn read(bundle: &Path) -> Option<Self> {
        let text = fs::read(bundle.join(FILE)).ok()?;
        serde_json::from_slice(&text).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(Record::read(bundle.path()), None);
        let record = Record {
            group: "pod".into(),
            state_dir: "/run/x".into(),
            pid: 7,
        };
        record.write(bundle.path()).unwrap();
        assert_eq!(Record::read(bundle.path()), Some(record));
        fs::write(bundle.path().join(FILE), "{").unwrap();
        assert_eq!(Record::read(bundle.path()), None);
    }
}
