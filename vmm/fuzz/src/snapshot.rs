// SPDX-License-Identifier: Apache-2.0
//! The loader of state files: any bytes, and any sections behind a header that
//! is right.
#![no_main]

use bulkhead_vmm::snapshot::{
    format::{Section, StateFile},
    state::MachineState,
};
use libfuzzer_sys::fuzz_target;

/// Sections with a kind, a version and a length each, where the header and its
/// checksum are no obstacle.
fn sections(mut data: &[u8]) -> Vec<Section<'_>> {
    let mut sections = Vec::new();
    while let [kind, version, low, high, rest @ ..] = data {
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (content, next) = rest.split_at(length);
        sections.push(Section {
            kind: u32::from(kind % 7),
            version: u32::from(version % 16 != 0),
            content: content.into(),
        });
        data = next;
    }
    sections
}

fuzz_target!(|data: &[u8]| {
    let file = StateFile {
        memory_size: 64 << 20,
        build: String::new(),
        sections: sections(data),
    };
    let _ = MachineState::from_file(&file);
    if let Ok(file) = StateFile::decode(data) {
        // What is read is written the same way.
        let written = file.encode();
        let again = StateFile::decode(&written);
        assert!(again.is_ok_and(|again| again == file));
        let _ = MachineState::from_file(&file);
    }
});
