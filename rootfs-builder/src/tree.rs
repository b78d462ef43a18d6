// SPDX-License-Identifier: Apache-2.0
//! What the guest's root file system holds.

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// A directory, mode 755.
    Directory(&'static str),
    /// A regular file.
    File {
        /// Path, without a leading slash.
        path: &'static str,
        /// Permission bits.
        mode: u32,
        /// Its bytes.
        content: Vec<u8>,
    },
    /// A character device.
    Character {
        /// Path, without a leading slash.
        path: &'static str,
        /// Permission bits.
        mode: u32,
        /// Device number.
        number: (u32, u32),
    },
}

/// The tree around the agent's binary, parents before children.
pub fn entries(agent: Vec<u8>) -> Vec<Entry> {
    let text = |path, content: &str| Entry::File {
        path,
        mode: 0o644,
        content: content.into(),
    };
    let mut entries = Vec::new();
    // Mount points for the agent, and where the kernel looks for its console
    // before anything is mounted.
    for path in [
        "dev", "etc", "proc", "root", "run", "sbin", "sys", "tmp", "var",
    ] {
        entries.push(Entry::Directory(path));
    }
    entries.push(Entry::Character {
        path: "dev/console",
        mode: 0o600,
        number: (5, 1),
    });
    entries.push(Entry::File {
        path: "sbin/init",
        mode: 0o755,
        content: agent,
    });
    entries.push(text("etc/passwd", "root:x:0:0:root:/root:/sbin/init\n"));
    entries.push(text("etc/group", "root:x:0:\ntty:x:5:\n"));
    entries.push(text("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"));
    // The agent mounts the pod's over it.
    entries.push(text("etc/resolv.conf", ""));
    entries
}
