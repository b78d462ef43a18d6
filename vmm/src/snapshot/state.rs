// SPDX-License-Identifier: Apache-2.0
//! What the sections of a state file hold.

use std::{
    fs::File,
    io::{Read, Seek, Write},
};

use serde::{de::DeserializeOwned, Deserialize, Serialize};

use super::{
    format::{FormatError, Section, StateFile, MAX_FILE},
    SnapshotError,
};
use crate::{
    arch::x86_64::layout,
    config::{MAX_VCPUS, MEMORY_MIB},
    kvm::state::{VcpuState, VmState},
    pci::SLOTS,
    serial::SerialRegisters,
    virtio::transport::FunctionState,
};

/// Kinds of sections.
mod kind {
    pub const MACHINE: u32 = 1;
    pub const VCPU: u32 = 2;
    pub const SERIAL: u32 = 3;
    pub const FUNCTION: u32 = 4;
    pub const SLOTS: u32 = 5;
    pub const WINDOWS: u32 = 6;
}

/// Version of each section's content.
const VERSION: u32 = 1;

/// All of a machine but its memory.
#[derive(Clone, Serialize, Deserialize)]
pub struct MachineState {
    /// Bytes of memory.
    pub memory_size: u64,
    /// Interrupt controllers and clock.
    pub vm: VmState,
    /// In the order of their numbers.
    pub vcpus: Vec<VcpuState>,
    /// The serial port.
    pub serial: SerialRegisters,
    /// The device numbers on the PCI bus, ascending from 1.
    pub slots: Vec<u8>,
    /// What is there, in the same order.
    pub functions: Vec<FunctionState>,
    /// Where the guest has found registers that are memory; none, where a former
    /// VMM booted it, which had none. Those know nothing of this one's.
    pub windows: Vec<u64>,
}

/// Where they are: interrupt tables, and devices' own configuration.
pub const WINDOWS: [u64; 2] = [layout::TABLE_WINDOW, layout::CONFIG_WINDOW];

impl MachineState {
    /// The state file.
    pub fn to_file(&self) -> StateFile<'static> {
        let mut sections = vec![
            section(kind::MACHINE, &self.vm),
            section(kind::SERIAL, &self.serial),
        ];
        sections.extend(self.vcpus.iter().map(|vcpu| section(kind::VCPU, vcpu)));
        let functions = self.functions.iter();
        sections.extend(functions.map(|function| section(kind::FUNCTION, function)));
        // Where devices have come and gone.
        if self.slots != without_gaps(self.functions.len()) {
            sections.push(section(kind::SLOTS, &self.slots));
        }
        if !self.windows.is_empty() {
            sections.push(section(kind::WINDOWS, &self.windows));
        }
        StateFile {
            memory_size: self.memory_size,
            build: env!("CARGO_PKG_VERSION").into(),
            sections,
        }
    }

    /// Reads a state file.
    ///
    /// # Errors
    /// A section is missing, unknown, or cannot be read.
    pub fn from_file(file: &StateFile<'_>) -> Result<Self, FormatError> {
        let known = kind::MACHINE..=kind::WINDOWS;
        let unknown = file
            .sections
            .iter()
            .find(|section| !known.contains(&section.kind) || section.version != VERSION);
        if let Some(Section { kind, version, .. }) = unknown {
            return Err(FormatError::Unknown {
                kind: *kind,
                version: *version,
            });
        }
        let vcpus: Vec<VcpuState> = all(file, kind::VCPU)?;
        if !(1..=usize::from(MAX_VCPUS)).contains(&vcpus.len()) {
            return Err(FormatError::Missing {
                kind: kind::VCPU,
                count: vcpus.len(),
            });
        }
        let mib = u32::try_from(file.memory_size >> 20).unwrap_or(u32::MAX);
        if file.memory_size % (1 << 20) != 0 || !MEMORY_MIB.contains(&mib) {
            return Err(FormatError::Memory {
                size: file.memory_size,
            });
        }
        let functions: Vec<FunctionState> = all(file, kind::FUNCTION)?;
        let mut slots: Vec<Vec<u8>> = all(file, kind::SLOTS)?;
        let slots = match (slots.pop(), slots.len()) {
            (None, _) => without_gaps(functions.len()),
            (Some(slots), 0) => slots,
            (Some(_), others) => {
                return Err(FormatError::Missing {
                    kind: kind::SLOTS,
                    count: others + 1,
                });
            }
        };
        let ascending = slots.windows(2).all(|pair| pair[0] < pair[1]);
        let on_the_bus = slots
            .iter()
            .all(|slot| (1..SLOTS).contains(&usize::from(*slot)));
        if slots.len() != functions.len() || !ascending || !on_the_bus {
            return Err(FormatError::Content { kind: kind::SLOTS });
        }
        let windows: Vec<Vec<u64>> = all(file, kind::WINDOWS)?;
        let windows = match &windows[..] {
            [] => Vec::new(),
            [windows] if windows[..] == WINDOWS => windows.clone(),
            _ => {
                return Err(FormatError::Content {
                    kind: kind::WINDOWS,
                })
            }
        };
        Ok(Self {
            windows,
            memory_size: file.memory_size,
            vm: one(file, kind::MACHINE)?,
            serial: one(file, kind::SERIAL)?,
            vcpus,
            slots,
            functions,
        })
    }
}

/// Where so many devices are that were all there from the start. More than the
/// bus holds are not told apart.
fn without_gaps(count: usize) -> Vec<u8> {
    (1..=count)
        .map(|slot| u8::try_from(slot).unwrap_or(u8::MAX))
        .collect()
}

/// Writes a state file, from its start.
///
/// # Errors
/// The file cannot be written.
pub fn write(state: &MachineState, mut file: &File) -> Result<(), SnapshotError> {
    let bytes = state.to_file().encode();
    file.set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| file.write_all(&bytes))
        .map_err(|source| SnapshotError::File {
            what: "write the state file",
            source,
        })
}

/// Reads one, from its start.
///
/// # Errors
/// It cannot be read, or is not one that fits.
pub fn read(mut file: &File) -> Result<MachineState, SnapshotError> {
    let mut bytes = Vec::new();
    file.rewind()
        .and_then(|()| file.metadata())
        .and_then(|found| {
            // In one go, and a look for more.
            bytes.reserve_exact(found.len().min(MAX_FILE) as usize + 1);
            file.take(MAX_FILE + 1).read_to_end(&mut bytes)
        })
        .map_err(|source| SnapshotError::File {
            what: "read the state file",
            source,
        })?;
    Ok(MachineState::from_file(&StateFile::decode(&bytes)?)?)
}

fn section<T: Serialize>(kind: u32, content: &T) -> Section<'static> {
    Section {
        kind,
        version: VERSION,
        content: postcard::to_stdvec(content)
            .expect("a vector grows, and the types have nothing that cannot be written")
            .into(),
    }
}

fn all<T: DeserializeOwned>(file: &StateFile<'_>, kind: u32) -> Result<Vec<T>, FormatError> {
    let sections = file.sections.iter().filter(|section| section.kind == kind);
    sections
        .map(
            |section| match postcard::take_from_bytes(&section.content) {
                Ok((content, [])) => Ok(content),
                _ => Err(FormatError::Content { kind }),
            },
        )
        .collect()
}

fn one<T: DeserializeOwned>(file: &StateFile<'_>, kind: u32) -> Result<T, FormatError> {
    let mut found = all(file, kind)?;
    match (found.pop(), found.len()) {
        (Some(content), 0) => Ok(content),
        (last, others) => Err(FormatError::Missing {
            kind,
            count: others + usize::from(last.is_some()),
        }),
    }
}
