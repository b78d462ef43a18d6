// SPDX-License-Identifier: Apache-2.0
//! CopyFile: which file, and which way. The copying is done by a process of
//! the container (`child::copy`): a file system that never answers is its own.

use std::ffi::OsString;
use std::path::PathBuf;

use bulkhead_agent_protocol::agent;

use crate::error::{AgentError, Result};

/// The kernel's PATH_MAX.
const LONGEST_PATH: usize = 4096;
/// The kernel's NAME_MAX.
const LONGEST_NAME: usize = 255;

/// One file on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CopyPlan {
    /// To the host.
    Out(PathBuf),
    /// From the host.
    In(Box<Arriving>),
}

/// A file that comes from the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arriving {
    /// Where it goes: the file, or a directory for it.
    pub path: PathBuf,
    /// Whether `path` must be a directory: it was written with a slash behind.
    pub below: bool,
    /// Its name, where `path` is a directory.
    pub name: OsString,
    /// Bytes.
    pub size: u64,
    /// Permissions.
    pub mode: u32,
    /// Owner, in the container.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last modification, nanoseconds since the epoch.
    pub modified_ns: i64,
}

impl CopyPlan {
    /// Checks a request.
    ///
    /// # Errors
    /// [`AgentError::Invalid`] naming the field.
    pub fn new(request: &agent::CopyFileRequest) -> Result<Self> {
        let path = &request.path;
        let invalid = |text: String| Err(AgentError::Invalid(text));
        if !path.starts_with('/') || path.len() >= LONGEST_PATH || path.contains('\0') {
            return invalid(format!("path: {path:?} is no absolute path"));
        }
        let Some(file) = request.arriving.as_ref() else {
            return Ok(Self::Out(path.into()));
        };
        let name = &file.name;
        let bad = ["", ".", ".."].contains(&name.as_str()) || name.contains(['/', '\0']);
        if bad || name.len() > LONGEST_NAME {
            return invalid(format!("arriving.name: {name:?} is no file's name"));
        }
        if file.mode & !0o7777 != 0 {
            return invalid(format!("arriving.mode: {:o}", file.mode));
        }
        Ok(Self::In(Box::new(Arriving {
            path: path.into(),
            below: path.ends_with('/') || path.ends_with("/."),
            name: name.into(),
            size: file.size,
            mode: file.mode,
            uid: file.uid,
            gid: file.gid,
            modified_ns: file.modified_ns,
        })))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_file_is_refused() {
        let request = |path: &str, name: Option<&str>| agent::CopyFileRequest {
            path: path.into(),
            arriving: name
                .map(|name| agent::ArrivingFile {
                    name: name.into(),
                    ..Default::default()
                })
                .into(),
            ..Default::default()
        };
        assert!(CopyPlan::new(&request("/a", None)).is_ok());
        assert!(CopyPlan::new(&request("/a/", Some("b"))).is_ok());
        for path in ["", "a", "/a\0b", &format!("/{}", "x".repeat(5000))] {
            assert!(CopyPlan::new(&request(path, None)).is_err(), "{path:?}");
        }
        for name in ["", ".", "..", "a/b", "a\0", &"x".repeat(256)] {
            assert!(
                CopyPlan::new(&request("/a", Some(name))).is_err(),
                "{name:?}"
            );
        }
        let mut wrong = request("/a", Some("b"));
        wrong.arriving.mut_or_insert_default().mode = 0o100644;
        assert!(CopyPlan::new(&wrong).is_err());
    }
}
