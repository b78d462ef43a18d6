// SPDX-License-Identifier: Apache-2.0
//! The guest's PCI devices: found when the host has plugged some, let go of
//! before it unplugs one.
//!
//! The kernel does both within a write to a file, and calls drivers meanwhile;
//! the host's devices answer them, so that it takes milliseconds.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use bulkhead_agent_protocol::agent;
use nix::errno::Errno;

use crate::error::{errno_of, AgentError, Context, Result};

const BUS: &str = "/sys/bus/pci";
const FILE_SYSTEMS: &str = "/sys/fs/virtiofs";
/// How far below a device its disks and interfaces are: pmem's lie at
/// `virtio<n>/ndbus<n>/region<n>/namespace<n>/block/<name>`.
const DEPTH: usize = 6;

/// Looks at the bus again; what is there, with a driver or without.
///
/// # Errors
/// The kernel's files cannot be used.
pub fn rescan(in_guest: bool) -> Result<agent::DevicesReply> {
    only_in_guest(in_guest)?;
    write_one(&Path::new(BUS).join("rescan"))?;
    let all = Path::new(BUS).join("devices");
    let mut devices = Vec::new();
    for entry in fs::read_dir(&all).step(|| format!("list {}", all.display()))? {
        let entry = entry.step(|| format!("list {}", all.display()))?;
        let Ok(address) = entry.file_name().into_string() else {
            continue;
        };
        devices.push(describe(&entry.path(), address));
    }
    devices.sort_by(|a, b| a.address.cmp(&b.address));
    Ok(agent::DevicesReply {
        devices,
        ..Default::default()
    })
}

/// Makes the kernel let go of a device that nobody uses.
///
/// # Errors
/// [`AgentError::Precondition`] when it is mounted, or held otherwise.
pub fn remove(request: &agent::RemoveDeviceRequest, in_guest: bool) -> Result<()> {
    only_in_guest(in_guest)?;
    let address = &request.address;
    if !is_address(address) {
        return Err(AgentError::Invalid(format!(
            "address: {address:?} is not like 0000:00:1f.0"
        )));
    }
    let device = Path::new(BUS).join("devices").join(address);
    if !device.exists() {
        return Err(AgentError::NotFound(format!("PCI device {address}")));
    }
    if let Some(use_) = user(&device)? {
        return Err(AgentError::Precondition(format!(
            "PCI device {address} is in use: {use_}"
        )));
    }
    write_one(&device.join("remove"))
}

fn only_in_guest(in_guest: bool) -> Result<()> {
    if in_guest {
        return Ok(());
    }
    Err(AgentError::Precondition(
        "outside a guest the machine's devices are not the agent's".into(),
    ))
}

fn write_one(path: &Path) -> Result<()> {
    OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| file.write_all(b"1"))
        .step(|| format!("write {}", path.display()))
}

/// Domain, bus, device and function, as the kernel writes them.
pub fn is_address(text: &str) -> bool {
    let form = b"xxxx:xx:xx.x";
    text.len() == form.len()
        && text.bytes().zip(form).all(|(byte, form)| match form {
            b'x' => byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte),
            form => byte == *form,
        })
}

fn describe(device: &Path, address: String) -> agent::PciDevice {
    let driver = |device: &Path| {
        let link = fs::read_link(device.join("driver")).ok()?;
        Some(link.file_name()?.to_string_lossy().into_owned())
    };
    let functions = children(device);
    let virtio = functions.iter().find(|path| {
        let name = path.file_name().unwrap_or_default();
        name.to_string_lossy().starts_with("virtio")
    });
    let mut found = Vec::new();
    if let Some(virtio) = virtio {
        below(virtio, DEPTH, &mut found);
    }
    found.retain(|(class, path)| class != "block" || is_there(path));
    let nodes = found.into_iter().map(|(class, path)| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let number = fs::read_to_string(path.join("dev")).unwrap_or_default();
        let (major, minor) = number.trim().split_once(':').unwrap_or_default();
        agent::DeviceNode {
            name: name.into_owned(),
            class,
            major: major.parse().unwrap_or(0),
            minor: minor.parse().unwrap_or(0),
            ..Default::default()
        }
    });
    agent::PciDevice {
        address,
        driver: virtio.and_then(|path| driver(path)).unwrap_or_default(),
        nodes: nodes.collect(),
        ..Default::default()
    }
}

/// Whether a disk can be opened. The kernel shows one before that: of a
/// persistent memory it is added by a thread of its own.
fn is_there(path: &Path) -> bool {
    let node = Path::new("/dev").join(path.file_name().unwrap_or_default());
    let opened = File::options()
        .read(true)
        .custom_flags(libc::O_CLOEXEC)
        .open(node);
    !opened.is_err_and(|error| matches!(errno_of(&error), Errno::ENOENT | Errno::ENXIO))
}

/// Directories in a directory, without what links to elsewhere.
fn children(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    directories.map(|entry| entry.path()).collect()
}

/// Disks and interfaces below a device, with their class.
fn below(directory: &Path, depth: usize, found: &mut Vec<(String, PathBuf)>) {
    if depth == 0 {
        return;
    }
    for child in children(directory) {
        match child.file_name().and_then(|name| name.to_str()) {
            Some(class @ ("block" | "net")) => {
                found.extend(
                    children(&child)
                        .into_iter()
                        .map(|path| (class.into(), path)),
                );
            }
            _ => below(&child, depth - 1, found),
        }
    }
}

/// Who uses a device; none: nobody who would notice.
fn user(device: &Path) -> Result<Option<String>> {
    let mut found = Vec::new();
    below(device, DEPTH + 1, &mut found);
    for (class, path) in found {
        if class != "block" {
            continue;
        }
        let node = Path::new("/dev").join(path.file_name().unwrap_or_default());
        // What is mounted, or part of another device, has it to itself.
        let opened = File::options()
            .read(true)
            .custom_flags(libc::O_EXCL | libc::O_CLOEXEC)
            .open(&node);
        match opened.map_err(|error| errno_of(&error)) {
            Ok(_) => {}
            Err(Errno::EBUSY) => return Ok(Some(format!("{} is mounted or held", node.display()))),
            // Without medium or node: nobody can have opened it.
            Err(Errno::ENOENT | Errno::ENXIO) => {}
            Err(errno) => {
                return Err(AgentError::Step {
                    step: format!("open {}", node.display()),
                    errno,
                })
            }
        }
    }
    let Some(tag) = tag(device) else {
        return Ok(None);
    };
    Ok(anybody_mounts(&tag)?.then(|| format!("the shared directory {tag:?} is mounted")))
}

/// Whether a process sees a virtio-fs tag mounted: a container has a mount
/// namespace, and a root directory, of its own.
fn anybody_mounts(tag: &str) -> Result<bool> {
    let processes = fs::read_dir("/proc").step(|| "list /proc")?;
    let ids = processes.flatten().filter(|entry| {
        let name = entry.file_name();
        name.as_encoded_bytes().iter().all(u8::is_ascii_digit)
    });
    // What cannot be read is of a process that has ended.
    let mut mounts = ids.filter_map(|entry| fs::read(entry.path().join("mountinfo")).ok());
    Ok(mounts.any(|text| is_mounted(&String::from_utf8_lossy(&text), tag)))
}

/// The tag of a virtio-fs device.
fn tag(device: &Path) -> Option<String> {
    let device = fs::canonicalize(device).ok()?;
    children(Path::new(FILE_SYSTEMS))
        .into_iter()
        .find_map(|fs_dir| {
            let own = fs::canonicalize(fs_dir.join("device")).ok()?;
            let tag = fs::read_to_string(fs_dir.join("tag")).ok()?;
            own.starts_with(&device).then(|| tag.trim_end().to_owned())
        })
}

/// Whether a virtio-fs tag is mounted (proc_pid_mountinfo(5): type and source
/// follow the hyphen).
fn is_mounted(mountinfo: &str, tag: &str) -> bool {
    mountinfo.lines().any(|line| {
        let Some((_, rest)) = line.split_once(" - ") else {
            return false;
        };
        let mut fields = rest.split(' ');
        fields.next() == Some("virtiofs") && fields.next() == Some(tag)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_the_kernels() {
        assert!(is_address("0000:00:1f.0"));
        for wrong in [
            "",
            "..",
            "0000:00:1F.0",
            "0000:00:1f.0/..",
            "0000:00:1f_0",
            "000:00:1f.00",
        ] {
            assert!(!is_address(wrong), "{wrong}");
        }
    }

    #[test]
    fn mounts_are_found_by_their_tag() {
        let text = "21 1 0:19 / /run/shared rw shared:2 - virtiofs pod rw\n\
                    22 1 0:20 / / rw - erofs extra ro\n";
        assert!(is_mounted(text, "pod"));
        assert!(!is_mounted(text, "extra"));
        assert!(!is_mounted(text, "po"));
    }

    #[test]
    fn what_lies_below_is_found() {
        let root = tempfile::tempdir().unwrap();
        for path in ["a/b/block/pmem0/queue", "net/eth0", "c/d/e/f/g/block/deep"] {
            fs::create_dir_all(root.path().join(path)).unwrap();
        }
        let mut found = Vec::new();
        below(root.path(), 5, &mut found);
        let mut names: Vec<_> = found
            .iter()
            .map(|(class, path)| format!("{class} {}", path.file_name().unwrap().display()))
            .collect();
        names.sort();
        assert_eq!(names, ["block pmem0", "net eth0"]);
    }

    #[test]
    fn outside_a_guest_nothing_is_touched() {
        assert!(matches!(rescan(false), Err(AgentError::Precondition(_))));
        let request = agent::RemoveDeviceRequest::default();
        let refused = remove(&request, false);
        assert!(matches!(refused, Err(AgentError::Precondition(_))));
    }
}
