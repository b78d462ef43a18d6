// SPDX-License-Identifier: Apache-2.0
//! A program for x86-64 that tells when its first instructions were executed,
//! and then becomes another one if it is given one.

/// What it writes to standard output first: seconds and nanoseconds of
/// CLOCK_MONOTONIC as two numbers of 64 bits.
pub const STAMP: usize = 16;

/// Where the program is loaded.
const BASE: u64 = 0x40_0000;

#[rustfmt::skip]
const CODE: &[u8] = &[
    0x48, 0x89, 0xe3,             // mov rbx, rsp       argc, argv
    0x48, 0x83, 0xec, 0x20,       // sub rsp, 32
    0xb8, 0xe4, 0x00, 0x00, 0x00, // mov eax, 228       clock_gettime
    0xbf, 0x01, 0x00, 0x00, 0x00, // mov edi, 1         CLOCK_MONOTONIC
    0x48, 0x89, 0xe6,             // mov rsi, rsp
    0x0f, 0x05,                   // syscall
    0xb8, 0x01, 0x00, 0x00, 0x00, // mov eax, 1         write
    0xbf, 0x01, 0x00, 0x00, 0x00, // mov edi, 1
    0x48, 0x89, 0xe6,             // mov rsi, rsp
    0xba, 0x10, 0x00, 0x00, 0x00, // mov edx, 16
    0x0f, 0x05,                   // syscall
    0x48, 0x83, 0x3b, 0x02,       // cmp qword [rbx], 2
    0x72, 0x1e,                   // jb exit
    0x48, 0x8b, 0x7b, 0x10,       // mov rdi, [rbx+16]  argv[1]
    0x48, 0x8d, 0x73, 0x10,       // lea rsi, [rbx+16]
    0x48, 0x8b, 0x03,             // mov rax, [rbx]
    0x48, 0x8d, 0x54, 0xc3, 0x10, // lea rdx, [rbx+rax*8+16]  environment
    0xb8, 0x3b, 0x00, 0x00, 0x00, // mov eax, 59        execve
    0x0f, 0x05,                   // syscall
    0xbf, 0x7f, 0x00, 0x00, 0x00, // mov edi, 127
    0xeb, 0x02,                   // jmp end
    0x31, 0xff,                   // exit: xor edi, edi
    0xb8, 0xe7, 0x00, 0x00, 0x00, // end: mov eax, 231  exit_group
    0x0f, 0x05,                   // syscall
];

/// The program as an ELF file.
pub fn program() -> Vec<u8> {
    const HEADERS: u64 = 64 + 56;
    let size = HEADERS + CODE.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // ET_EXEC, EM_X86_64, version 1.
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for number in [BASE + HEADERS, 64, 0] {
        file.extend(number.to_le_bytes());
    }
    // Flags; sizes of this header and of one program header; one of these, no
    // sections.
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
    // PT_LOAD, readable and executable.
    file.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for number in [0, BASE, BASE, size, size, 4096] {
        file.extend(number.to_le_bytes());
    }
    file.extend(CODE);
    file
}

/// The stamps at the beginning of `output`, in nanoseconds.
pub fn stamps(output: &[u8]) -> Vec<u64> {
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b));
    output
        .chunks_exact(STAMP)
        .map(|stamp| number(&stamp[..8]) * 1_000_000_000 + number(&stamp[8..]))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    use super::*;

    #[test]
    fn it_tells_the_time_and_becomes_another() {
        let name = format!("bulkhead-stamp-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::write(&path, program()).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let path = path.to_str().unwrap();
        let begin = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap();
        let begin = begin.tv_sec() as u64 * 1_000_000_000 + begin.tv_nsec() as u64;
        // Itself, and itself again; and what is no program.
        let twice = Command::new(path).arg(path).output().unwrap();
        let wrong = Command::new(path).arg("/nonexistent").output().unwrap();
        fs::remove_file(path).unwrap();
        assert!(twice.status.success());
        assert_eq!(wrong.status.code(), Some(127));
        let told = stamps(&twice.stdout);
        assert_eq!((told.len(), twice.stdout.len()), (2, 2 * STAMP));
        assert!(begin < told[0] && told[0] < told[1], "{begin} {told:?}");
    }
}
