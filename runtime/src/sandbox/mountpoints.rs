// SPDX-License-Identifier: Apache-2.0
//! Mount points in a root file system that the guest gets read-only: what is
//! not there is made by the host, as other runtimes make it before they make
//! the root read-only.

use std::{
    ffi::OsStr,
    fs, io,
    os::fd::OwnedFd,
    path::{Component, Path, PathBuf},
};

use oci_spec::runtime::Mount;
use rustix::fs::{mkdirat, openat2, Mode, OFlags, ResolveFlags, CWD};

use crate::error::Error;

/// Makes what is missing of the places that `mounts` name. Links lead nowhere
/// out of `root`. Blocks.
///
/// # Errors
/// One cannot be made, naming it.
pub fn make(root: &Path, mounts: &[Mount]) -> Result<(), Error> {
    let places: Vec<PathBuf> = mounts.iter().map(|m| below(m.destination())).collect();
    for (mount, place) in mounts.iter().zip(&places) {
        // What is in another mount is not in the root.
        let inside = |other: &PathBuf| other != place && place.starts_with(other);
        if place.as_os_str().is_empty() || places.iter().any(inside) {
            continue;
        }
        one(root, place, is_file(mount)).map_err(|source| {
            let destination = mount.destination().display();
            Error::Invalid(format!("mounts: {destination}: make its place: {source}"))
        })?;
    }
    Ok(())
}

/// A destination without what is not a name.
fn below(destination: &Path) -> PathBuf {
    let mut clean = PathBuf::new();
    for component in destination.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            _ => {}
        }
    }
    clean
}

/// Whether the mount is a file of the host.
fn is_file(mount: &Mount) -> bool {
    let bind = |name: &str| ["bind", "rbind"].contains(&name);
    let options = mount.options().iter().flatten();
    let bound = mount.typ().as_deref().is_some_and(bind) || options.map(String::as_str).any(bind);
    let source = mount.source().as_deref();
    bound && source.is_some_and(|source| fs::metadata(source).is_ok_and(|meta| !meta.is_dir()))
}

fn one(root: &Path, place: &Path, file: bool) -> io::Result<()> {
    let path = OFlags::PATH | OFlags::CLOEXEC;
    let root = openat2(
        CWD,
        root,
        path | OFlags::DIRECTORY,
        Mode::empty(),
        ResolveFlags::empty(),
    )?;
    let find = |below: &Path| {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        openat2(&root, below, path, Mode::empty(), resolve)
    };
    let mut done = PathBuf::new();
    let mut parent: OwnedFd = root.try_clone()?;
    let names: Vec<&OsStr> = place.iter().collect();
    for (number, name) in names.iter().enumerate() {
        done.push(name);
        parent = match find(&done) {
            Err(rustix::io::Errno::NOENT) => {
                if file && number + 1 == names.len() {
                    let new = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                    rustix::fs::openat(&parent, *name, new, Mode::from_raw_mode(0o644))?;
                    return Ok(());
                }
                mkdirat(&parent, *name, Mode::from_raw_mode(0o755))?;
                find(&done)?
            }
            found => found?,
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::os::unix::fs::symlink;

    fn mounts(list: &str) -> Vec<Mount> {
        serde_json::from_str(list).unwrap()
    }

    #[test]
    fn what_is_missing_is_made_inside() {
        let scratch = tempfile::tempdir().unwrap();
        let (root, outside) = (scratch.path().join("root"), scratch.path().join("outside"));
        fs::create_dir_all(root.join("real")).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("file"), "x").unwrap();
        symlink("/real", root.join("link")).unwrap();
        symlink(&outside, root.join("away")).unwrap();
        let source = outside.join("file").display().to_string();
        let list = format!(
            r#"[{{"destination":"/proc","type":"proc"}},
                {{"destination":"/proc/deep/er","type":"tmpfs"}},
                {{"destination":"/a/../b/c","type":"tmpfs"}},
                {{"destination":"/link/d","type":"tmpfs"}},
                {{"destination":"/etc/file","type":"bind","source":{source:?}}},
                {{"destination":"/etc/none","source":{source:?},"options":["rbind"]}}]"#
        );
        make(&root, &mounts(&list)).unwrap();
        for directory in ["proc", "b/c", "real/d", "etc"] {
            assert!(root.join(directory).is_dir(), "{directory}");
        }
        assert!(root.join("etc/file").is_file() && root.join("etc/none").is_file());
        assert!(!root.join("proc/deep").exists() && !root.join("a").exists());
        // Again changes nothing; a link to what is not in the root is an error.
        make(&root, &mounts(&list)).unwrap();
        let error = make(
            &root,
            &mounts(r#"[{"destination":"/away/x","type":"tmpfs"}]"#),
        );
        let text = error.unwrap_err().to_string();
        assert!(text.starts_with("mounts: /away/x: "), "{text}");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    }
}
