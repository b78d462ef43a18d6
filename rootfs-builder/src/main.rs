// SPDX-License-Identifier: Apache-2.0
//! Builds the guest image.
//!
//!     bulkhead-rootfs-builder --agent FILE --out DIR
//!
//! writes `rootfs.erofs` and `rootfs.cpio` to DIR. A file whose bytes would
//! not change is left alone. The initrd form boots with `rdinit=/sbin/init`.

#![forbid(unsafe_code)]

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{bail, Context, Result};
use bulkhead_rootfs_builder::{cpio::Archive, erofs, tree};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let ["--agent", agent, "--out", out] = words[..] else {
        bail!("usage: bulkhead-rootfs-builder --agent FILE --out DIR");
    };
    let out = PathBuf::from(out);
    fs::create_dir_all(&out).with_context(|| out.display().to_string())?;
    let agent = fs::read(agent).with_context(|| agent.to_owned())?;
    if !is_static_elf(&agent) {
        bail!("the agent must be a statically linked program: there is no loader in the guest");
    }
    let entries = tree::entries(agent);

    let fresh = out.join(".rootfs.erofs.new");
    let staging = out.join(".staging");
    // What an interrupted build left.
    let _ = fs::remove_dir_all(&staging);
    erofs::write(&entries, &staging, &fresh)?;
    let image = fs::read(&fresh).with_context(|| fresh.display().to_string())?;
    fs::remove_file(&fresh)?;
    replace(&out.join("rootfs.erofs"), &image)?;

    let mut archive = Archive::new();
    for entry in &entries {
        match entry {
            tree::Entry::Directory(path) => archive.dir(path),
            tree::Entry::File {
                path,
                mode,
                content,
            } => archive.file(path, *mode, content),
            tree::Entry::Character { path, mode, number } => {
                archive.char_dev(path, *mode, number.0, number.1);
            }
        }
    }
    replace(&out.join("rootfs.cpio"), &archive.finish())
}

/// Writes a file, by way of another, if its bytes change.
fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let fresh = path.with_extension("new");
    fs::write(&fresh, bytes).with_context(|| fresh.display().to_string())?;
    fs::rename(&fresh, path).with_context(|| path.display().to_string())
}

/// An ELF64 program without an interpreter.
fn is_static_elf(bytes: &[u8]) -> bool {
    const PT_INTERP: u32 = 3;
    let Some(header) = bytes.get(..64) else {
        return false;
    };
    if &header[..5] != b"\x7fELF\x02" {
        return false;
    }
    let u16_at = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
    let mut table = [0; 8];
    table.copy_from_slice(&header[32..40]);
    let table = u64::from_le_bytes(table) as usize;
    let (size, count) = (u16_at(54), u16_at(56));
    (0..count).all(|index| {
        let at = table.saturating_add(index * size);
        bytes
            .get(at..at.saturating_add(4))
            .is_some_and(|kind| kind != PT_INTERP.to_le_bytes())
    })
}
