// SPDX-License-Identifier: Apache-2.0
//! A small OCI image made here, without a registry: static busybox, users and
//! groups, and a file with a megabyte that is hard to confuse.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{json, Value};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

use crate::install::which;
use crate::proc;

/// The image whose containers run as root.
pub const ROOT_IMAGE: &str = "localhost/bulkhead/busybox:latest";
/// The same as user [`APP_UID`], with an environment and a working directory.
pub const APP_IMAGE: &str = "localhost/bulkhead/app:latest";
/// What stands for a pod where the CRI wants an image for it: it waits, and
/// collects processes whose parents have ended.
pub const PAUSE_IMAGE: &str = "localhost/bulkhead/pause:latest";
/// A web server that serves a page at port 80.
pub const WEB_IMAGE: &str = "localhost/bulkhead/web:latest";
/// What critest calls a web server in some cases, wherever it gets others
/// from: [`WEB_IMAGE`] again. It looks for a process `nginx` with its id in
/// `/var/run/nginx.pid` and `master process` on its command line.
pub const CRITEST_WEB_IMAGE: &str = "registry.k8s.io/e2e-test-images/nginx:1.14-2";
/// User of [`APP_IMAGE`].
pub const APP_UID: u32 = 1000;
/// Its primary group.
pub const APP_GID: u32 = 1000;
/// Its other groups.
pub const APP_GROUPS: [u32; 2] = [2001, 2002];
/// The file with [`pattern`] in the image.
pub const PATTERN_PATH: &str = "/pattern";

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n\
                      nobody:x:65534:65534::/:/bin/sh\n";
const GROUP: &str = "root:x:0:\napp:x:1000:\naudio:x:2001:app\nvideo:x:2002:app,root\n";

/// The program of [`WEB_IMAGE`].
const WEB_SERVER: &str =
    "#!/bin/sh\necho $$ >/var/run/nginx.pid\nhttpd -p 80 -h /www\nwhile :; do sleep 1; done\n";

/// `pgrep NAME` as far as critest needs it: Debian's busybox has none.
const PGREP: &str =
    "#!/bin/sh\nfor dir in /proc/[0-9]*; do\n  read -r name <$dir/comm || continue\n  \
    case $name in *$1*) echo ${dir#/proc/}; found=1 ;; esac\ndone 2>/dev/null\n[ -n \"$found\" ]\n";

/// `ipcs -m` as far as critest looks at it: Debian's busybox has none.
const IPCS: &str = "#!/bin/sh\ncat /proc/sysvipc/shm\n";

/// A megabyte that repeats nowhere within it and is the same every time.
pub fn pattern() -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut bytes = Vec::with_capacity(1 << 20);
    while bytes.len() < 1 << 20 {
        // xorshift64: no cryptography, only no repetition.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes
}

/// The archive in the cache, made when busybox or this crate has changed. A
/// box reads the one that was made outside.
///
/// # Errors
/// As [`write`].
pub fn cached() -> Result<PathBuf> {
    let busybox = busybox()?;
    let meta = fs::metadata(&busybox).with_context(|| format!("read {}", busybox.display()))?;
    let recipe = format!("{PASSWD}{GROUP}{}", env!("CARGO_PKG_VERSION"));
    let key = format!(
        "7 {} {}.{:09} {recipe}",
        meta.size(),
        meta.mtime(),
        meta.mtime_nsec()
    );
    let name = format!("image-{}.tar", &sha256(key.as_bytes())[..16]);
    let dir = crate::boxed::cache_dir()?;
    let path = dir.join(name);
    if path.exists() {
        return Ok(path);
    }
    // Boxes start side by side, also those of one process.
    let _lock = crate::boxed::lock_cache(&dir)?;
    if !path.exists() {
        let part = dir.join(format!(".image-{}", std::process::id()));
        write(&part)?;
        fs::rename(&part, &path).context("move the image to the cache")?;
    }
    Ok(path)
}

fn busybox() -> Result<PathBuf> {
    which("busybox").context("busybox is missing (package busybox-static)")
}

/// Writes the images as one OCI archive for `ctr image import`. Equal busybox
/// gives equal bytes.
///
/// # Errors
/// When busybox is not there (package busybox-static) or the file cannot be
/// written.
pub fn write(path: &Path) -> Result<()> {
    write_images(path, common())
}

/// As [`write`], of these images.
pub(crate) fn write_images(path: &Path, images: Vec<Image>) -> Result<()> {
    let busybox = busybox()?;
    let program = fs::read(&busybox).with_context(|| format!("read {}", busybox.display()))?;
    let list = proc::run(
        std::process::Command::new(&busybox).arg("--list"),
        std::time::Duration::from_secs(20),
    )?
    .ok()?;
    let layer = layer(&program, list.out().lines())?;
    let file = File::create(path).with_context(|| format!("make {}", path.display()))?;
    archive(Builder::new(file), &layer, images).with_context(|| format!("write {}", path.display()))
}

pub(crate) fn header(kind: EntryType, mode: u32, owner: (u32, u32), size: usize) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(owner.0.into());
    header.set_gid(owner.1.into());
    header.set_mtime(0);
    header.set_size(size as u64);
    header
}

fn layer<'a>(busybox: &[u8], applets: impl Iterator<Item = &'a str>) -> Result<Vec<u8>> {
    let mut tar = Builder::new(Vec::new());
    let (root, app) = ((0, 0), (APP_UID, APP_GID));
    for (dir, mode, owner) in [
        ("bin", 0o755, root),
        ("dev", 0o755, root),
        ("etc", 0o755, root),
        ("home", 0o755, root),
        ("home/app", 0o750, app),
        ("proc", 0o555, root),
        ("root", 0o700, root),
        ("run", 0o755, root),
        ("sys", 0o555, root),
        ("tmp", 0o1777, root),
        ("var", 0o755, root),
        ("var/run", 0o755, root),
        ("www", 0o755, root),
    ] {
        let mut header = header(EntryType::Directory, mode, owner, 0);
        tar.append_data(&mut header, format!("{dir}/"), &[][..])?;
    }
    for (name, mode, owner, content) in [
        ("bin/busybox", 0o755, root, busybox),
        ("bin/nginx", 0o755, root, WEB_SERVER.as_bytes()),
        ("bin/ipcs", 0o755, root, IPCS.as_bytes()),
        ("bin/pgrep", 0o755, root, PGREP.as_bytes()),
        ("www/index.html", 0o644, root, b"welcome\n"),
        ("etc/passwd", 0o644, root, PASSWD.as_bytes()),
        ("etc/group", 0o644, root, GROUP.as_bytes()),
        ("home/app/mine", 0o600, app, b"mine\n"),
        ("home/app/audio", 0o640, (0, APP_GROUPS[0]), b"audio\n"),
        ("root/secret", 0o600, root, b"secret\n"),
        (&PATTERN_PATH[1..], 0o644, root, &pattern()[..]),
    ] {
        let mut header = header(EntryType::Regular, mode, owner, content.len());
        tar.append_data(&mut header, name, content)?;
    }
    for applet in applets.filter(|name| !["busybox", "ipcs", "pgrep"].contains(name)) {
        let mut header = header(EntryType::Symlink, 0o777, root, 0);
        tar.append_link(&mut header, format!("bin/{applet}"), "busybox")?;
    }
    Ok(tar.into_inner()?)
}

/// In hexadecimal digits.
pub fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|b| format!("{b:02x}")).collect()
}

/// Adds a blob; gives its descriptor.
fn blob<W: std::io::Write>(tar: &mut Builder<W>, kind: &str, bytes: &[u8]) -> Result<Value> {
    let hash = sha256(bytes);
    let mut header = header(EntryType::Regular, 0o644, (0, 0), bytes.len());
    tar.append_data(&mut header, format!("blobs/sha256/{hash}"), bytes)?;
    Ok(json!({
        "mediaType": format!("application/vnd.oci.image.{kind}"),
        "digest": format!("sha256:{hash}"),
        "size": bytes.len(),
    }))
}

/// An image: its name, the configuration that runs its containers, and a layer
/// over the common one.
pub(crate) struct Image {
    pub(crate) name: &'static str,
    pub(crate) config: Value,
    pub(crate) over: Option<Vec<u8>>,
}

/// The images that everything has.
fn common() -> Vec<Image> {
    let path = "PATH=/bin";
    let root = json!({ "Cmd": ["sh"], "Env": [path], "WorkingDir": "/" });
    let app = json!({
        "Cmd": ["sh", "-c", "id"],
        "Env": [path, "COLOUR=green and blue"],
        "User": "app",
        "WorkingDir": "/home/app",
    });
    // Not called sleep: critest looks for processes of that name.
    let pause = json!({
        "Entrypoint": ["sh", "-c", "trap 'exit 0' TERM INT; while :; do /bin/busybox sleep 86400 & wait; done"],
        "Env": [path],
        "WorkingDir": "/",
    });
    let web = json!({ "Cmd": ["nginx", "master process"], "Env": [path], "WorkingDir": "/" });
    let image = |(name, config)| Image {
        name,
        config,
        over: None,
    };
    [
        (ROOT_IMAGE, root),
        (APP_IMAGE, app),
        (PAUSE_IMAGE, pause),
        (WEB_IMAGE, web.clone()),
        (CRITEST_WEB_IMAGE, web),
    ]
    .map(image)
    .into()
}

fn archive<W: std::io::Write>(mut tar: Builder<W>, layer: &[u8], images: Vec<Image>) -> Result<()> {
    let base = blob(&mut tar, "layer.v1.tar", layer)?;
    let mut manifests = Vec::new();
    for Image { name, config, over } in images {
        let mut layers = vec![base.clone()];
        if let Some(over) = over {
            layers.push(blob(&mut tar, "layer.v1.tar", &over)?);
        }
        let diff_ids: Vec<&Value> = layers.iter().map(|layer| &layer["digest"]).collect();
        let created = json!({ "created": "1970-01-01T00:00:00Z" });
        let config = json!({
            "architecture": "amd64",
            "os": "linux",
            "created": "1970-01-01T00:00:00Z",
            "config": config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
            "history": vec![created; layers.len()],
        });
        let config = blob(&mut tar, "config.v1+json", config.to_string().as_bytes())?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": layers,
        });
        let mut manifest = blob(
            &mut tar,
            "manifest.v1+json",
            manifest.to_string().as_bytes(),
        )?;
        manifest["annotations"] = json!({
            "io.containerd.image.name": name,
            "org.opencontainers.image.ref.name": "latest",
        });
        manifest["platform"] = json!({ "architecture": "amd64", "os": "linux" });
        manifests.push(manifest);
    }
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": manifests,
    });
    for (name, content) in [
        ("index.json", index),
        ("oci-layout", json!({ "imageLayoutVersion": "1.0.0" })),
    ] {
        let content = content.to_string();
        let mut header = header(EntryType::Regular, 0o644, (0, 0), content.len());
        tar.append_data(&mut header, name, content.as_bytes())?;
    }
    tar.into_inner()?.flush()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn the_archive_is_complete_and_repeatable() {
        let make = || {
            let layer = layer(b"program", ["sh", "busybox", "ls"].into_iter()).unwrap();
            let mut bytes = Vec::new();
            archive(Builder::new(&mut bytes), &layer, common()).unwrap();
            bytes
        };
        let bytes = make();
        assert_eq!(bytes, make());
        let mut names = Vec::new();
        for entry in tar::Archive::new(&bytes[..]).entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().to_string_lossy().into_owned();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            if let Some(hash) = name.strip_prefix("blobs/sha256/") {
                assert_eq!(hash, sha256(&content));
            }
            names.push(name);
        }
        assert!(names.contains(&"index.json".to_owned()));
        assert!(names.contains(&"oci-layout".to_owned()));
        // One layer, and a configuration and a manifest for each image.
        assert_eq!(names.len(), 2 + 1 + 2 * 5);
    }

    #[test]
    fn the_pattern_is_a_megabyte_and_stays_the_same() {
        let bytes = pattern();
        assert_eq!(bytes.len(), 1 << 20);
        assert_ne!(bytes[..4096], bytes[4096..8192]);
        assert_eq!(bytes, pattern());
    }
}
