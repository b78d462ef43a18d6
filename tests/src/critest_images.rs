// SPDX-License-Identifier: Apache-2.0
//! Images that critest runs under names of its own, made here: what its cases
//! look for is in them, for no registry is asked.

use std::path::Path;

use anyhow::Result;
use serde_json::json;
use tar::{Builder, EntryType};

use crate::image::{self, header, Image};

/// A web server that logs how it was called.
const HTTPD: &str = "registry.k8s.io/e2e-test-images/httpd:2.4.39-4";
/// Runs a program of root's with the set-user-id bit, which says its effective
/// user.
const NO_NEW_PRIVS: &str = "registry.k8s.io/e2e-test-images/nonewprivs:1.3";
/// Has a user that belongs to a further group.
const PREDEFINED_GROUP: &str = "gcr.io/k8s-staging-cri-tools/test-image-predefined-group:latest";

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nmember:x:1000:1000::/:/bin/sh\n";
const GROUP: &str = "root:x:0:\nmember:x:1000:\nfurther:x:50000:member\n";

/// geteuid, a line for 0, for 1000 and for any other, write, exit.
const CODE: [u8; 75] = [
    0xb8, 107, 0, 0, 0, // mov eax, geteuid
    0x0f, 0x05, // syscall
    0xba, 21, 0, 0, 0, // mov edx, length of OTHER
    0x48, 0x8d, 0x35, 56, 0, 0, 0, // lea rsi, OTHER
    0x85, 0xc0, // test eax, eax
    0x75, 12, // jne over two
    0xba, 17, 0, 0, 0, // mov edx, length of ROOT
    0x48, 0x8d, 0x35, 61, 0, 0, 0, // lea rsi, ROOT
    0x3d, 0xe8, 0x03, 0, 0, // cmp eax, 1000
    0x75, 12, // jne over two
    0xba, 20, 0, 0, 0, // mov edx, length of USER
    0x48, 0x8d, 0x35, 59, 0, 0, 0, // lea rsi, USER
    0xbf, 1, 0, 0, 0, // mov edi, standard output
    0xb8, 1, 0, 0, 0, // mov eax, write
    0x0f, 0x05, // syscall
    0xb8, 60, 0, 0, 0, // mov eax, exit
    0x31, 0xff, // xor edi, edi
    0x0f, 0x05, // syscall
];
const OTHER: &[u8] = b"Effective uid: other\n";
const ROOT: &[u8] = b"Effective uid: 0\n";
const USER: &[u8] = b"Effective uid: 1000\n";

/// Where it is loaded, and the bytes of its two headers (elf(5)).
const ADDRESS: u64 = 0x40_0000;
const HEADERS: u64 = 64 + 56;

/// A static x86-64 program.
fn whoami() -> Vec<u8> {
    let body = [&CODE[..], OTHER, ROOT, USER].concat();
    let size = HEADERS + body.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    // ET_EXEC, EM_X86_64, version 1.
    for half in [2_u16, 62, 1, 0] {
        file.extend(half.to_le_bytes());
    }
    // Entry, program headers, no section headers.
    for word in [ADDRESS + HEADERS, 64, 0] {
        file.extend(word.to_le_bytes());
    }
    // Flags, then sizes and counts: one program header.
    for half in [0_u16, 0, 64, 56, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    // PT_LOAD, read and execute: the whole file.
    for half in [1_u32, 5] {
        file.extend(half.to_le_bytes());
    }
    for word in [0, ADDRESS, ADDRESS, size, size, 0x1000] {
        file.extend(word.to_le_bytes());
    }
    file.extend(body);
    file
}

fn layer(files: &[(&str, u32, &[u8])]) -> Result<Vec<u8>> {
    let mut tar = Builder::new(Vec::new());
    for (name, mode, content) in files {
        let mut header = header(EntryType::Regular, *mode, (0, 0), content.len());
        tar.append_data(&mut header, name, *content)?;
    }
    Ok(tar.into_inner()?)
}

/// Their names.
pub const NAMES: [&str; 3] = [HTTPD, NO_NEW_PRIVS, PREDEFINED_GROUP];

/// Writes them as one OCI archive for `ctr image import`.
///
/// # Errors
/// As [`image::write`].
pub fn write(path: &Path) -> Result<()> {
    let environment = ["PATH=/bin"];
    let serve = "echo \"called as 'httpd -D FOREGROUND'\"; exec httpd -f -p 80 -h /www";
    image::write_images(
        path,
        vec![
            Image {
                name: HTTPD,
                config: json!({ "Cmd": ["sh", "-c", serve], "Env": environment }),
                over: None,
            },
            Image {
                name: NO_NEW_PRIVS,
                config: json!({ "Cmd": ["whoami-effectively"], "Env": environment }),
                over: Some(layer(&[("bin/whoami-effectively", 0o4755, &whoami())])?),
            },
            Image {
                name: PREDEFINED_GROUP,
                config: json!({ "Cmd": ["sh"], "Env": environment, "User": "1000" }),
                over: Some(layer(&[
                    ("etc/passwd", 0o644, PASSWD.as_bytes()),
                    ("etc/group", 0o644, GROUP.as_bytes()),
                ])?),
            },
        ],
    )
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    use super::*;

    #[test]
    fn the_program_says_who_runs_it() {
        let path = std::env::temp_dir().join(format!("bh-whoami-{}", std::process::id()));
        fs::write(&path, whoami()).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let expected = match nix::unistd::geteuid().as_raw() {
            0 => ROOT,
            1000 => USER,
            _ => OTHER,
        };
        let said = Command::new(&path).output().unwrap();
        fs::remove_file(&path).unwrap();
        assert!(said.status.success());
        assert_eq!(said.stdout, expected);
    }
}
