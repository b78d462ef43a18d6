// SPDX-License-Identifier: Apache-2.0
//! Numbers that the guest's kernel has given to devices and drivers.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path};

/// The number of the device that the kernel calls `name` (below /dev). None: it
/// has no such device.
pub fn device(name: &str, block: bool) -> Option<libc::dev_t> {
    let path = Path::new(name);
    let plain = path
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    if !plain {
        return None;
    }
    let meta = fs::symlink_metadata(Path::new("/dev").join(path)).ok()?;
    let kind = meta.file_type();
    let fits = if block {
        kind.is_block_device()
    } else {
        kind.is_char_device()
    };
    fits.then(|| meta.rdev())
}

/// The major number of a driver, by the name that it has in /proc/devices.
pub fn major(driver: &str, block: bool) -> Option<u32> {
    let text = fs::read_to_string("/proc/devices").ok()?;
    major_in(&text, driver, block)
}

fn major_in(text: &str, driver: &str, block: bool) -> Option<u32> {
    let (characters, blocks) = text.split_once("Block devices:")?;
    let section = if block { blocks } else { characters };
    section.lines().find_map(|line| {
        let (number, name) = line.trim().split_once(' ')?;
        (name.trim() == driver).then(|| number.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_by_their_names() {
        assert_eq!(device("null", false), Some(libc::makedev(1, 3)));
        for (name, block) in [
            ("null", true),
            ("nosuch", false),
            ("../dev/null", false),
            ("/dev/null", false),
            ("", false),
        ] {
            assert_eq!(device(name, block), None, "{name}");
        }
    }

    #[test]
    fn majors_by_their_drivers() {
        let text = "Character devices:\n  1 mem\n  4 tty\n 10 misc\n\nBlock devices:\n  7 loop\n";
        assert_eq!(major_in(text, "misc", false), Some(10));
        assert_eq!(major_in(text, "misc", true), None);
        assert_eq!(major_in(text, "loop", true), Some(7));
        assert_eq!(major("mem", false), Some(1));
    }
}
