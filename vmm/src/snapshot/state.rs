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

/// What a section holds. A type that changes gets a new version, and reads what
/// was written by older ones; other types keep theirs.
trait Content: Serialize + DeserializeOwned {
    /// Which sections hold it.
    const KIND: u32;
    /// The version that is written.
    const VERSION: u32 = 1;

    /// Reads content of a version.
    ///
    /// # Errors
    /// It is not one of those that are known, or the content is not of it.
    fn read(version: u32, content: &[u8]) -> Result<Self, Unreadable> {
        match version == Self::VERSION {
            true => decode(content),
            false => Err(Unreadable::Version),
        }
    }
}

/// Why a section cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unreadable {
    Version,
    Content,
}

/// All of some bytes as a type.
fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Unreadable> {
    match postcard::take_from_bytes(bytes) {
        Ok((content, [])) => Ok(content),
        _ => Err(Unreadable::Content),
    }
}

impl Content for VmState {
    const KIND: u32 = 1;
}

impl Content for VcpuState {
    const KIND: u32 = 2;
}

impl Content for SerialRegisters {
    const KIND: u32 = 3;
}

impl Content for FunctionState {
    const KIND: u32 = 4;
}

/// Device numbers, where there are gaps.
#[derive(Serialize, Deserialize)]
struct Slots(Vec<u8>);

impl Content for Slots {
    const KIND: u32 = 5;
}

/// Addresses of [`WINDOWS`].
#[derive(Serialize, Deserialize)]
struct Windows(Vec<u64>);

impl Content for Windows {
    const KIND: u32 = 6;
}

/// All kinds of sections.
const KINDS: [u32; 6] = [
    VmState::KIND,
    VcpuState::KIND,
    SerialRegisters::KIND,
    FunctionState::KIND,
    Slots::KIND,
    Windows::KIND,
];

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
        let mut sections = vec![section(&self.vm), section(&self.serial)];
        sections.extend(self.vcpus.iter().map(section));
        sections.extend(self.functions.iter().map(section));
        // Where devices have come and gone.
        if self.slots != without_gaps(self.functions.len()) {
            sections.push(section(&Slots(self.slots.clone())));
        }
        if !self.windows.is_empty() {
            sections.push(section(&Windows(self.windows.clone())));
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
        let mut sections = file.sections.iter();
        if let Some(unknown) = sections.find(|section| !KINDS.contains(&section.kind)) {
            return Err(FormatError::Unknown {
                kind: unknown.kind,
                version: unknown.version,
            });
        }
        let vcpus: Vec<VcpuState> = all(file)?;
        if !(1..=usize::from(MAX_VCPUS)).contains(&vcpus.len()) {
            return Err(FormatError::Missing {
                kind: VcpuState::KIND,
                count: vcpus.len(),
            });
        }
        let mib = u32::try_from(file.memory_size >> 20).unwrap_or(u32::MAX);
        if file.memory_size % (1 << 20) != 0 || !MEMORY_MIB.contains(&mib) {
            return Err(FormatError::Memory {
                size: file.memory_size,
            });
        }
        let functions: Vec<FunctionState> = all(file)?;
        let slots = match at_most_one(file)? {
            None => without_gaps(functions.len()),
            Some(Slots(slots)) => slots,
        };
        let ascending = slots.windows(2).all(|pair| pair[0] < pair[1]);
        let on_the_bus = slots
            .iter()
            .all(|slot| (1..SLOTS).contains(&usize::from(*slot)));
        if slots.len() != functions.len() || !ascending || !on_the_bus {
            return Err(FormatError::Content { kind: Slots::KIND });
        }
        let windows = match at_most_one(file)? {
            None => Vec::new(),
            Some(Windows(windows)) if windows == WINDOWS => windows,
            Some(_) => {
                return Err(FormatError::Content {
                    kind: Windows::KIND,
                })
            }
        };
        Ok(Self {
            windows,
            memory_size: file.memory_size,
            vm: one(file)?,
            serial: one(file)?,
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

fn section<T: Content>(content: &T) -> Section<'static> {
    Section {
        kind: T::KIND,
        version: T::VERSION,
        content: postcard::to_stdvec(content)
            .expect("a vector grows, and the types have nothing that cannot be written")
            .into(),
    }
}

fn all<T: Content>(file: &StateFile<'_>) -> Result<Vec<T>, FormatError> {
    let kind = T::KIND;
    let sections = file.sections.iter().filter(|section| section.kind == kind);
    sections
        .map(|section| {
            let version = section.version;
            T::read(version, &section.content).map_err(|error| match error {
                Unreadable::Version => FormatError::Unknown { kind, version },
                Unreadable::Content => FormatError::Content { kind },
            })
        })
        .collect()
}

fn at_most_one<T: Content>(file: &StateFile<'_>) -> Result<Option<T>, FormatError> {
    let mut found = all(file)?;
    match (found.pop(), found.len()) {
        (last, 0) => Ok(last),
        (_, others) => Err(FormatError::Missing {
            kind: T::KIND,
            count: others + 1,
        }),
    }
}

fn one<T: Content>(file: &StateFile<'_>) -> Result<T, FormatError> {
    at_most_one(file)?.ok_or(FormatError::Missing {
        kind: T::KIND,
        count: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A type that had one field once.
    #[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
    struct Changed {
        kept: u32,
        added: u8,
    }

    impl Content for Changed {
        const KIND: u32 = 4;
        const VERSION: u32 = 2;

        fn read(version: u32, content: &[u8]) -> Result<Self, Unreadable> {
            match version {
                1 => decode(content).map(|kept| Self { kept, added: 7 }),
                2 => decode(content),
                _ => Err(Unreadable::Version),
            }
        }
    }

    fn file(sections: Vec<Section<'static>>) -> StateFile<'static> {
        StateFile {
            memory_size: 32 << 20,
            build: String::new(),
            sections,
        }
    }

    #[test]
    fn a_kind_of_section_changes_without_the_others() {
        let written = section(&Changed {
            kept: 300,
            added: 9,
        });
        assert_eq!((written.kind, written.version), (4, 2));
        assert_eq!(section(&Slots(vec![1])).version, 1);
        let with = |version, content: &[u8]| {
            let section = Section {
                kind: 4,
                version,
                content: content.to_vec().into(),
            };
            one::<Changed>(&file(vec![section]))
        };
        let read = |added| Ok(Changed { kept: 300, added });
        assert_eq!(with(2, &written.content), read(9));
        let old = postcard::to_stdvec(&300_u32).unwrap();
        assert_eq!(with(1, &old), read(7));
        let version = FormatError::Unknown {
            kind: 4,
            version: 3,
        };
        assert_eq!(with(3, &old), Err(version));
        assert_eq!(with(2, &old), Err(FormatError::Content { kind: 4 }));
    }

    #[test]
    fn a_newer_version_of_any_kind_is_told() {
        let windows = section(&Windows(WINDOWS.to_vec()));
        for kind in KINDS {
            let newer = Section {
                kind,
                version: 2,
                content: Vec::new().into(),
            };
            // Each by itself: others would be missing.
            let file = file(vec![windows.clone(), newer]);
            let found = match kind {
                VmState::KIND => one::<VmState>(&file).err(),
                VcpuState::KIND => one::<VcpuState>(&file).err(),
                SerialRegisters::KIND => one::<SerialRegisters>(&file).err(),
                FunctionState::KIND => one::<FunctionState>(&file).err(),
                Slots::KIND => one::<Slots>(&file).err(),
                _ => one::<Windows>(&file).err(),
            };
            assert_eq!(found, Some(FormatError::Unknown { kind, version: 2 }));
        }
        let stranger = Section {
            kind: 7,
            version: 1,
            content: Vec::new().into(),
        };
        let unknown = FormatError::Unknown {
            kind: 7,
            version: 1,
        };
        let found = MachineState::from_file(&file(vec![stranger])).err();
        assert_eq!(found, Some(unknown));
    }
}
