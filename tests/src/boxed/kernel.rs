// SPDX-License-Identifier: Apache-2.0
//! The distribution's kernels, taken out of their packages: the box's own, and
//! one that guests are measured with.
//!
//! Nothing is installed and the machine's package sources stay as they are.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::cache;
use super::error::{io_step, BoxError};

/// Which of the distribution's kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// The one for all machines, which the box has: it needs 9p.
    Generic,
    /// The one for virtual machines, smaller and without 9p.
    Cloud,
}

impl Flavour {
    /// The package that always depends on the newest one.
    fn meta_package(self) -> &'static str {
        match self {
            Self::Generic => "linux-image-amd64",
            Self::Cloud => "linux-image-cloud-amd64",
        }
    }

    /// Whether a kernel of that release is one.
    fn has(self, release: &str) -> bool {
        release.contains("-cloud-") == (self == Self::Cloud)
    }
}

/// A kernel ready to boot.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Its release, such as `6.1.0-56-amd64`.
    pub release: String,
    /// What QEMU loads: the ELF image where it could be unpacked (which saves
    /// the emulated machine the unpacking), the bzImage otherwise.
    pub image: PathBuf,
    /// Its modules, `.../lib/modules/RELEASE`.
    pub modules: PathBuf,
}

/// Finds the kernel in the cache, or fetches it.
///
/// # Errors
/// [`BoxError::Tool`] when apt or dpkg cannot do it, with what they said.
pub fn fetch(flavour: Flavour) -> Result<Kernel, BoxError> {
    let cache = cache::dir()?;
    let _lock = cache::lock(&cache)?;
    if let Some(kernel) = newest(&cache, flavour)? {
        return Ok(kernel);
    }
    let package = match candidate(flavour)? {
        Some(package) => package,
        None => {
            tool("apt-get", &["-q", "update"], &cache)?;
            candidate(flavour)?.ok_or_else(|| BoxError::Tool {
                tool: "apt-cache".into(),
                detail: format!(
                    "{} names no kernel; is this Debian?",
                    flavour.meta_package()
                ),
            })?
        }
    };
    eprintln!("box: fetching {package}");
    let scratch = cache::Scratch::new(&cache)?;
    let download = ["-q", "-o", "APT::Sandbox::User=root", "download", &package];
    if tool("apt-get", &download, scratch.path()).is_err() {
        // Old lists name packages that are gone from the archive.
        tool("apt-get", &["-q", "update"], scratch.path())?;
        let package = candidate(flavour)?.unwrap_or_else(|| package.clone());
        let again = ["-q", "-o", "APT::Sandbox::User=root", "download", &package];
        tool("apt-get", &again, scratch.path())?;
    }
    let deb = entries(scratch.path())?
        .into_iter()
        .find(|path| path.extension().is_some_and(|e| e == "deb"))
        .ok_or_else(|| BoxError::Tool {
            tool: "apt-get download".into(),
            detail: "left no package".into(),
        })?;
    let tree = scratch.path().join("tree");
    let (deb, tree_arg) = (deb.to_string_lossy(), tree.to_string_lossy());
    tool("dpkg", &["-x", &deb, &tree_arg], scratch.path())?;
    let kernel = open(&tree)?;
    // For modprobe in the box; what the box itself needs it resolves itself.
    if let Err(error) = tool(
        "depmod",
        &["-b", &tree_arg, &kernel.release],
        scratch.path(),
    ) {
        eprintln!("box: modules will not load on demand: {error}");
    }
    unpack_vmlinux(&tree, &kernel.release);
    let place = cache.join(format!("kernel-{}", kernel.release));
    fs::rename(&tree, &place).map_err(io_step("move the kernel to the cache"))?;
    open(&place)
}

/// The newest kernel of that flavour in the cache.
fn newest(cache: &Path, flavour: Flavour) -> Result<Option<Kernel>, BoxError> {
    let mut found: Vec<PathBuf> = entries(cache)?
        .into_iter()
        .filter(|p| {
            p.file_name()
                .and_then(|n| n.to_str()?.strip_prefix("kernel-"))
                .is_some_and(|release| flavour.has(release))
        })
        .collect();
    found.sort_by_key(|path| {
        let name = path.to_string_lossy().into_owned();
        name.split(|c: char| !c.is_ascii_digit())
            .filter_map(|n| n.parse::<u64>().ok())
            .collect::<Vec<_>>()
    });
    found.pop().map(|path| open(&path)).transpose()
}

/// The kernel in an unpacked package.
fn open(tree: &Path) -> Result<Kernel, BoxError> {
    let modules = entries(&tree.join("lib/modules"))?
        .pop()
        .ok_or_else(|| BoxError::Tool {
            tool: "dpkg -x".into(),
            detail: format!("no modules in {}", tree.display()),
        })?;
    let release = modules
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let elf = tree.join("boot/vmlinux");
    let image = if elf.exists() {
        elf
    } else {
        tree.join("boot").join(format!("vmlinuz-{release}"))
    };
    Ok(Kernel {
        release,
        image,
        modules,
    })
}

/// The package that the meta package stands for at the moment.
fn candidate(flavour: Flavour) -> Result<Option<String>, BoxError> {
    let output = Command::new("apt-cache")
        .args(["depends", flavour.meta_package()])
        .env("LC_ALL", "C")
        .output()
        .map_err(io_step("run apt-cache"))?;
    Ok(parse_depends(&String::from_utf8_lossy(&output.stdout)))
}

/// The first dependency in what `apt-cache depends` prints.
fn parse_depends(text: &str) -> Option<String> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("Depends:"))
        .map(|name| name.trim().to_owned())
        .find(|name| name.starts_with("linux-image-"))
}

/// What kernels are packed with: how the payload begins, and who unpacks it.
const UNPACKERS: &[(&[u8], &[&str])] = &[
    (b"\xfd7zXZ\0", &["xz", "-dc", "--single-stream"]),
    (b"\x02\x21\x4c\x18", &["lz4", "-dc"]),
];

/// Unpacks the ELF image from the bzImage, where there is the tool for it. A
/// failure only costs boot time.
fn unpack_vmlinux(tree: &Path, release: &str) {
    let boot = tree.join("boot");
    let Ok(bz) = fs::read(boot.join(format!("vmlinuz-{release}"))) else {
        return;
    };
    let Some(payload) = payload(&bz) else {
        return;
    };
    let unpacker = UNPACKERS
        .iter()
        .find(|(magic, _)| payload.starts_with(magic));
    let Some((_, [tool, args @ ..])) = unpacker else {
        eprintln!("box: nothing is known that unpacks the kernel of {release}");
        return;
    };
    let packed = boot.join("payload");
    let made = fs::write(&packed, payload).is_ok()
        && Command::new(tool)
            .args(args)
            .arg(&packed)
            .output()
            .is_ok_and(|out| {
                out.stdout.starts_with(b"\x7fELF")
                    && fs::write(boot.join("vmlinux"), out.stdout).is_ok()
            });
    if !made {
        eprintln!("box: {tool} could not unpack the kernel; it unpacks itself at each boot");
    }
    // Scratch data; what remains of it does no harm.
    let _ = fs::remove_file(packed);
}

/// The compressed kernel inside a bzImage: the boot protocol's header gives
/// its place (Documentation/arch/x86/boot.rst, payload_offset and
/// payload_length). The last four bytes hold the unpacked size.
fn payload(bz: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| super::proto::word(bz, at) as usize;
    if bz.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let setup_sectors = usize::from(*bz.get(0x1f1)?);
    let start = (setup_sectors + 1) * 512 + word(0x248);
    let payload = bz.get(start..start.checked_add(word(0x24c))?)?;
    Some(&payload[..payload.len().saturating_sub(4)])
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>, BoxError> {
    let list = fs::read_dir(dir).map_err(io_step(format!("list {}", dir.display())))?;
    let mut paths: Vec<PathBuf> = list.filter_map(|e| Some(e.ok()?.path())).collect();
    paths.sort();
    Ok(paths)
}

/// Runs a tool; what it said is in the error.
pub(super) fn tool(name: &str, args: &[&str], cwd: &Path) -> Result<(), BoxError> {
    let output = Command::new(name)
        .args(args)
        .current_dir(cwd)
        .env("LC_ALL", "C")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .output()
        .map_err(io_step(format!("run {name}")))?;
    if output.status.success() {
        return Ok(());
    }
    let mut detail = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if detail.is_empty() {
        detail = output.status.to_string();
    }
    Err(BoxError::Tool {
        tool: format!("{name} {}", args.join(" ")),
        detail,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_behind_the_meta_package() {
        let text = "linux-image-amd64\n  Depends: linux-image-6.1.0-56-amd64\n  Suggests: x\n";
        assert_eq!(
            parse_depends(text).as_deref(),
            Some("linux-image-6.1.0-56-amd64")
        );
        assert_eq!(parse_depends("linux-image-amd64\n"), None);
    }

    #[test]
    fn flavours_are_told_apart_by_their_release() {
        for (release, flavour, other) in [
            ("6.1.0-56-amd64", Flavour::Generic, Flavour::Cloud),
            ("6.1.0-56-cloud-amd64", Flavour::Cloud, Flavour::Generic),
        ] {
            assert!(flavour.has(release));
            assert!(!other.has(release));
        }
    }

    #[test]
    fn the_payload_is_where_the_header_says() {
        let mut bz = vec![0; 1024 + 32];
        bz[0x1f1] = 1;
        bz[0x202..0x206].copy_from_slice(b"HdrS");
        bz[0x248..0x24c].copy_from_slice(&8u32.to_le_bytes());
        bz[0x24c..0x250].copy_from_slice(&16u32.to_le_bytes());
        assert_eq!(payload(&bz).map(<[u8]>::len), Some(12));
        bz[0x24c..0x250].copy_from_slice(&999u32.to_le_bytes());
        assert_eq!(payload(&bz), None);
        assert_eq!(payload(b"short"), None);
    }
}
