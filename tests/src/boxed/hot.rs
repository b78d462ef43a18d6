// SPDX-License-Identifier: Apache-2.0
//! Files that the box reads from a disk image and not over 9p.
//!
//! 9p under emulation moves a few megabytes a second and asks the host for
//! every look-up. What is used all the time (container engine, VMM, guest
//! kernel, shared libraries) is packed into an EROFS image that lies above 9p
//! in the box's overlay.

use std::collections::BTreeSet;
use std::fs::{self, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{lchown, symlink, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::cache;
use super::error::{io_step, BoxError};
use super::kernel::tool;

/// Images kept in the cache, most recently used first.
const KEEP: usize = 4;

/// The image with `paths` (files, or directories with all below them; symbolic
/// links with what they point to), from the cache when nothing changed. A file
/// counts as unchanged by size, times, mode and inode, as for make.
///
/// # Errors
/// [`BoxError::Io`] when a path cannot be read, [`BoxError::Tool`] when
/// mkfs.erofs fails.
pub fn image(paths: &[PathBuf]) -> Result<Option<PathBuf>, BoxError> {
    let mut all = BTreeSet::new();
    for path in paths {
        collect(path, &mut all).map_err(io_step(format!("read {}", path.display())))?;
    }
    if all.is_empty() {
        return Ok(None);
    }
    let mut hash = Sha256::new();
    for path in &all {
        let meta =
            fs::symlink_metadata(path).map_err(io_step(format!("read {}", path.display())))?;
        hash.update(path.as_os_str().as_encoded_bytes());
        // A directory's times change with files that are not in the image.
        let times = if meta.is_dir() {
            [0; 3]
        } else {
            [meta.mtime(), meta.mtime_nsec(), meta.size() as i64]
        };
        hash.update(
            format!(
                "\0{:o} {} {} {} {times:?}\n",
                meta.mode(),
                meta.uid(),
                meta.gid(),
                if meta.is_dir() { 0 } else { meta.ino() },
            )
            .as_bytes(),
        );
    }
    let digest = hash.finalize();
    let key: String = digest[..12].iter().map(|b| format!("{b:02x}")).collect();

    let cache = cache::dir()?;
    let _lock = cache::lock(&cache)?;
    let image = cache.join(format!("hot-{key}.erofs"));
    if let Ok(file) = fs::File::options().append(true).open(&image) {
        // Recently used, so that others go first; a failure costs one rebuild.
        let _ = file.set_modified(std::time::SystemTime::now());
        return Ok(Some(image));
    }
    let scratch = cache::Scratch::new(&cache)?;
    let tree = scratch.path().join("tree");
    for path in &all {
        copy(path, &tree).map_err(io_step(format!("copy {}", path.display())))?;
    }
    let made = scratch.path().join("image");
    let args = [
        "-T0",
        "-x-1",
        "-U",
        "6b1f7c1e-0000-4000-8000-000000000001",
        &made.to_string_lossy(),
        &tree.to_string_lossy(),
    ];
    tool("mkfs.erofs", &args, scratch.path())?;
    fs::rename(&made, &image).map_err(io_step("move the image to the cache"))?;
    prune(&cache);
    Ok(Some(image))
}

/// Adds `path`, what lies below it, what it points to, and all parents, each
/// by its real name.
fn collect(path: &Path, all: &mut BTreeSet<PathBuf>) -> io::Result<()> {
    let real = fs::canonicalize(path)?;
    add_parents(&real, all);
    if !all.insert(real.clone()) {
        return Ok(());
    }
    // The link itself, where its own directory is a real one.
    if let (Some(parent), Some(name)) = (path.parent(), path.file_name()) {
        let link = fs::canonicalize(parent)?.join(name);
        if link != real && fs::symlink_metadata(&link)?.is_symlink() {
            add_parents(&link, all);
            all.insert(link);
        }
    }
    if fs::metadata(&real)?.is_dir() {
        for entry in fs::read_dir(&real)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_symlink() {
                all.insert(entry.path());
            } else if kind.is_dir() || kind.is_file() {
                collect(&entry.path(), all)?;
            }
        }
    }
    Ok(())
}

fn add_parents(path: &Path, all: &mut BTreeSet<PathBuf>) {
    for parent in path.ancestors().skip(1) {
        if parent != Path::new("/") {
            all.insert(parent.to_owned());
        }
    }
}

/// Copies one entry below `tree` with its owner and mode.
fn copy(path: &Path, tree: &Path) -> io::Result<()> {
    let to = tree.join(path.strip_prefix("/").unwrap_or(path));
    let meta = fs::symlink_metadata(path)?;
    if meta.is_dir() {
        fs::create_dir_all(&to)?;
    } else if meta.is_symlink() {
        symlink(fs::read_link(path)?, &to)?;
    } else {
        fs::copy(path, &to)?;
    }
    give(&to, &meta)
}

fn give(to: &Path, meta: &Metadata) -> io::Result<()> {
    lchown(to, Some(meta.uid()), Some(meta.gid()))?;
    if !meta.is_symlink() {
        fs::set_permissions(to, Permissions::from_mode(meta.mode() & 0o7777))?;
    }
    Ok(())
}

/// Removes the images used longest ago. A box that uses one has it open.
fn prune(cache: &Path) {
    let Ok(entries) = fs::read_dir(cache) else {
        return;
    };
    let mut images: Vec<_> = entries
        .filter_map(|e| e.ok())
        .filter(|e| e.file_name().to_string_lossy().starts_with("hot-"))
        .filter_map(|e| Some((e.metadata().ok()?.modified().ok()?, e.path())))
        .collect();
    images.sort();
    let surplus = images.len().saturating_sub(KEEP);
    for (_, path) in &images[..surplus] {
        // Only disk space is at stake.
        let _ = fs::remove_file(path);
    }
}

/// The files a program needs to start: itself, its interpreter and the
/// libraries that `ldd` finds. A static program needs only itself.
///
/// # Errors
/// When the program or `ldd` is missing.
pub fn with_libraries(program: &Path) -> Result<Vec<PathBuf>, BoxError> {
    let output = std::process::Command::new("ldd")
        .arg(program)
        .env("LC_ALL", "C")
        .output()
        .map_err(io_step("run ldd"))?;
    let mut files = vec![program.to_owned()];
    files.extend(parse_ldd(&String::from_utf8_lossy(&output.stdout)));
    Ok(files)
}

/// The absolute paths in what ldd prints.
fn parse_ldd(text: &str) -> Vec<PathBuf> {
    text.lines()
        .filter_map(|line| {
            let target = line.rsplit("=>").next()?.trim();
            let path = target.split(" (0x").next()?.trim();
            path.starts_with('/').then(|| PathBuf::from(path))
        })
        .filter(|path| !path.as_os_str().to_string_lossy().contains(": "))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_what_ldd_names() {
        let text = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(
            parse_ldd(text),
            [
                PathBuf::from("/lib/x86_64-linux-gnu/libc.so.6"),
                PathBuf::from("/lib64/ld-linux-x86-64.so.2")
            ]
        );
        assert!(parse_ldd("\tstatically linked\n").is_empty());
        assert!(parse_ldd("\tnot a dynamic executable\n").is_empty());
    }

    #[test]
    fn links_come_with_their_targets_and_parents() {
        let dir = std::env::temp_dir().join(format!("bulkhead-hot-{}", std::process::id()));
        fs::create_dir_all(dir.join("real/deep")).unwrap();
        let dir = fs::canonicalize(dir).unwrap();
        fs::write(dir.join("real/deep/file"), "x").unwrap();
        symlink("real/deep/file", dir.join("link")).unwrap();
        let mut all = BTreeSet::new();
        collect(&dir.join("link"), &mut all).unwrap();
        for name in ["link", "real", "real/deep", "real/deep/file"] {
            assert!(all.contains(&dir.join(name)), "{name}");
        }
        assert!(all.contains(dir.parent().unwrap()));
        fs::remove_dir_all(dir).unwrap();
    }
}
