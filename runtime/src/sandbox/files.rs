// SPDX-License-Identifier: Apache-2.0
//! What all containers of a pod see, where no front end keeps it: /etc/hosts,
//! /etc/hostname, /etc/resolv.conf, and the shared memory.

use std::{
    fs,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{Mount, MountBuilder, Spec};

use super::directory::Directory;
use crate::{
    error::{Error, Step},
    oci::GUEST_SHM,
};

/// The files on the host, and where containers have them.
#[derive(Debug, Default)]
pub struct PodFiles(Vec<(PathBuf, PathBuf)>);

impl PodFiles {
    /// Writes them to the sandbox's directory, with which they go.
    ///
    /// # Errors
    /// They cannot be written.
    pub fn write(directory: &Directory, files: Vec<(PathBuf, String)>) -> Result<Self, Error> {
        let below = directory.path().join("files");
        let step = |path: &Path| format!("write {}", path.display());
        if !files.is_empty() {
            fs::create_dir(&below).step(|| step(&below))?;
        }
        let mut written = Vec::with_capacity(files.len());
        for (number, (destination, text)) in files.into_iter().enumerate() {
            let path = below.join(number.to_string());
            fs::write(&path, text).step(|| step(&path))?;
            written.push((path, destination));
        }
        Ok(Self(written))
    }

    /// Adds them to a container's mounts where it has none of its own.
    pub fn mount(&self, spec: &mut Spec) {
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for (source, destination) in &self.0 {
            let taken = |mount: &Mount| mount.destination() == destination;
            if mounts.iter().any(taken) {
                continue;
            }
            let options = ["rbind", "rprivate", "rw"].map(String::from);
            let mount = MountBuilder::default()
                .destination(destination)
                .typ("bind")
                .source(source)
                .options(options)
                .build();
            // Nothing is required of a mount but its destination.
            mounts.extend(mount.ok());
        }
        for mount in &mut mounts {
            share_memory(mount);
        }
        spec.set_mounts(Some(mounts));
    }
}

/// Shared memory that a container would have for itself becomes the pod's.
fn share_memory(mount: &mut Mount) {
    let own = mount.destination() == Path::new(GUEST_SHM)
        && mount.typ().as_deref() == Some("tmpfs")
        && mount.source().as_deref() == Some(Path::new("shm"));
    if own {
        mount.set_typ(Some("bind".into()));
        mount.set_source(Some(GUEST_SHM.into()));
        let options = ["rbind", "nosuid", "noexec", "nodev"].map(String::from);
        mount.set_options(Some(options.into()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_has_them_unless_it_brings_its_own() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = Directory::of(scratch.path(), "k8s.io", "x");
        directory.create().unwrap();
        let files = ["/etc/hosts", "/etc/hostname"].map(|path| (path.into(), format!("of {path}")));
        let files = PodFiles::write(&directory, files.into()).unwrap();
        let mut spec: Spec = serde_json::from_str(
            r#"{"ociVersion":"1.2.0","mounts":[{"destination":"/etc/hosts","type":"tmpfs"},
                {"destination":"/dev/shm","type":"tmpfs","source":"shm","options":["size=65536k"]}]}"#,
        )
        .unwrap();
        files.mount(&mut spec);
        let mounts = spec.mounts().clone().unwrap();
        assert_eq!(mounts.len(), 3);
        assert_eq!(mounts[0].typ().as_deref(), Some("tmpfs"));
        assert_eq!(mounts[1].typ().as_deref(), Some("bind"));
        assert_eq!(mounts[1].source().as_deref(), Some(Path::new("/dev/shm")));
        assert_eq!(mounts[2].destination(), Path::new("/etc/hostname"));
        let source = mounts[2].source().clone().unwrap();
        assert_eq!(fs::read_to_string(source).unwrap(), "of /etc/hostname");
        directory.release().unwrap();
    }
}
