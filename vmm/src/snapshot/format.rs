// SPDX-License-Identifier: Apache-2.0
//! The state file: a header that can be read without knowing what follows,
//! and sections.
//!
//! ```text
//! header, 64 bytes, little-endian
//!   0  magic          "BULKHEAD"
//!   8  format         u16, of the header and the framing of sections
//!  10  architecture   u16, 1: x86_64
//!  12  sections       u32, how many
//!  16  body           u64, bytes after the header
//!  24  memory         u64, bytes of guest memory
//!  32  checksum       u64, CRC-64/XZ of the body
//!  40  build          24 bytes, version of the VMM that wrote it, NUL-padded
//! section, 16 bytes and its content
//!   0  kind           u32
//!   4  version        u32, of the content
//!   8  length         u64, bytes of content
//! ```
//!
//! The content of a section is postcard's encoding of a type of [`super::state`].
//! A type that changes gets a new version; older ones stay readable.

use std::borrow::Cow;

use crc64fast::Digest;

/// First bytes of a state file.
pub const MAGIC: [u8; 8] = *b"BULKHEAD";
/// Version of header and framing.
pub const FORMAT: u16 = 1;
/// x86_64.
pub const ARCHITECTURE: u16 = 1;
/// Bytes of the header.
pub const HEADER: usize = 64;
/// Bytes before a section's content.
const SECTION: usize = 16;
/// Largest file: far more than 64 vCPUs and 31 devices take.
pub const MAX_FILE: u64 = 16 << 20;
/// Most sections.
const MAX_SECTIONS: u32 = 1024;
/// Bytes for the build's version.
const BUILD: usize = 24;

/// Why bytes are not a state file that this VMM can use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Not one at all.
    #[error("this is not a snapshot's state file")]
    NotOne,
    /// Another format.
    #[error("format {found}; this VMM reads format {FORMAT}")]
    Format {
        /// The file's.
        found: u16,
    },
    /// Another architecture.
    #[error("architecture {found}; this VMM is for {ARCHITECTURE} (x86_64)")]
    Architecture {
        /// The file's.
        found: u16,
    },
    /// Too large to be one.
    #[error("more than {MAX_FILE} bytes")]
    TooLarge,
    /// Cut off, or bytes too many.
    #[error("{found} bytes where {wanted} should be: cut off or added to")]
    Length {
        /// Bytes in the file after the header.
        found: u64,
        /// Bytes that the header says.
        wanted: u64,
    },
    /// Bytes have changed.
    #[error("its checksum does not match: it is damaged")]
    Checksum,
    /// Sections do not fit the body.
    #[error("its sections do not fit together")]
    Sections,
    /// A section of this VMM's that is missing, or there too often.
    #[error("{count} sections of kind {kind}")]
    Missing {
        /// Which.
        kind: u32,
        /// How many there are.
        count: usize,
    },
    /// A section this VMM does not know.
    #[error("section of unknown kind {kind}, version {version}")]
    Unknown {
        /// Its kind.
        kind: u32,
        /// Its version.
        version: u32,
    },
    /// Not a size that a machine can have.
    #[error("{size} bytes of memory, which no machine has")]
    Memory {
        /// The file's.
        size: u64,
    },
    /// A section's content.
    #[error("section of kind {kind} cannot be read")]
    Content {
        /// Its kind.
        kind: u32,
    },
}

/// A section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section<'a> {
    /// What it is about.
    pub kind: u32,
    /// Of its content.
    pub version: u32,
    /// Its content.
    pub content: Cow<'a, [u8]>,
}

/// A state file, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateFile<'a> {
    /// Bytes of guest memory.
    pub memory_size: u64,
    /// Version of the VMM that wrote it.
    pub build: String,
    /// In the order of the file.
    pub sections: Vec<Section<'a>>,
}

impl<'a> StateFile<'a> {
    /// The bytes of the file.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        for section in &self.sections {
            body.extend(section.kind.to_le_bytes());
            body.extend(section.version.to_le_bytes());
            body.extend((section.content.len() as u64).to_le_bytes());
            body.extend(&*section.content);
        }
        let mut build = [0; BUILD];
        for (to, from) in build.iter_mut().zip(self.build.bytes()) {
            *to = from;
        }
        let mut file = Vec::with_capacity(HEADER + body.len());
        file.extend(MAGIC);
        file.extend(FORMAT.to_le_bytes());
        file.extend(ARCHITECTURE.to_le_bytes());
        file.extend((self.sections.len() as u32).to_le_bytes());
        file.extend((body.len() as u64).to_le_bytes());
        file.extend(self.memory_size.to_le_bytes());
        file.extend(checksum(&body).to_le_bytes());
        file.extend(build);
        file.extend(body);
        file
    }

    /// Takes a file's bytes apart.
    ///
    /// # Errors
    /// They are not a whole, undamaged file of this format and architecture.
    pub fn decode(file: &'a [u8]) -> Result<Self, FormatError> {
        if file.len() as u64 > MAX_FILE {
            return Err(FormatError::TooLarge);
        }
        if !file.starts_with(&MAGIC) || file.len() < HEADER {
            return Err(FormatError::NotOne);
        }
        let (header, body) = file.split_at(HEADER);
        let (format, architecture) = (u16_at(header, 8), u16_at(header, 10));
        if format != FORMAT {
            return Err(FormatError::Format { found: format });
        }
        if architecture != ARCHITECTURE {
            return Err(FormatError::Architecture {
                found: architecture,
            });
        }
        let (found, wanted) = (body.len() as u64, u64_at(header, 16));
        if found != wanted {
            return Err(FormatError::Length { found, wanted });
        }
        if checksum(body) != u64_at(header, 32) {
            return Err(FormatError::Checksum);
        }
        let build = header[40..].split(|byte| *byte == 0).next();
        Ok(Self {
            memory_size: u64_at(header, 24),
            build: String::from_utf8_lossy(build.unwrap_or_default()).into_owned(),
            sections: sections(body, u32_at(header, 12))?,
        })
    }
}

fn checksum(body: &[u8]) -> u64 {
    let mut digest = Digest::new();
    digest.write(body);
    digest.sum64()
}

fn sections(mut body: &[u8], count: u32) -> Result<Vec<Section<'_>>, FormatError> {
    if count > MAX_SECTIONS {
        return Err(FormatError::Sections);
    }
    let mut all = Vec::new();
    for _ in 0..count {
        let (head, rest) = body
            .split_at_checked(SECTION)
            .ok_or(FormatError::Sections)?;
        let (content, rest) = usize::try_from(u64_at(head, 8))
            .ok()
            .and_then(|length| rest.split_at_checked(length))
            .ok_or(FormatError::Sections)?;
        all.push(Section {
            kind: u32_at(head, 0),
            version: u32_at(head, 4),
            content: content.into(),
        });
        body = rest;
    }
    body.is_empty().then_some(all).ok_or(FormatError::Sections)
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    // Callers stay within a header whose length was checked.
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file() -> StateFile<'static> {
        let section = |kind, content: &'static [u8]| Section {
            kind,
            version: 1,
            content: content.into(),
        };
        StateFile {
            memory_size: 1 << 30,
            build: "1.2.3".into(),
            sections: vec![section(1, b"one"), section(2, b""), section(1, b"three")],
        }
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(StateFile::decode(&file().encode()), Ok(file()));
    }

    #[test]
    fn the_checksum_is_the_one_that_the_header_names() {
        // The check value of CRC-64/XZ.
        assert_eq!(checksum(b"123456789"), 0x995d_c9bb_df19_39fa);
        // Long enough for whatever takes many bytes at a time.
        let long: Vec<u8> = (0..5000_u32).map(|i| ((i * i) >> 3) as u8).collect();
        let slowly = long.iter().fold(!0_u64, |sum, byte| {
            (0..8).fold(sum ^ u64::from(*byte), |sum, _| {
                sum >> 1 ^ (0xc96c_5795_d787_0f42 * (sum & 1))
            })
        });
        assert_eq!(checksum(&long), !slowly);
    }

    #[test]
    fn errors_tell_what_is_wrong() {
        let good = file().encode();
        let with = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = good.clone();
            change(&mut bytes);
            StateFile::decode(&bytes).unwrap_err()
        };
        assert_eq!(with(&|f| f[0] = b'X'), FormatError::NotOne);
        assert_eq!(with(&|f| f.truncate(63)), FormatError::NotOne);
        assert_eq!(with(&|f| f[8] = 9), FormatError::Format { found: 9 });
        assert_eq!(with(&|f| f[10] = 7), FormatError::Architecture { found: 7 });
        assert!(matches!(with(&|f| f.push(0)), FormatError::Length { .. }));
        assert!(matches!(
            with(&|f| f.truncate(f.len() - 1)),
            FormatError::Length { .. }
        ));
        assert_eq!(with(&|f| f[HEADER + 17] ^= 1), FormatError::Checksum);
        assert_eq!(with(&|f| f[12] = 4), FormatError::Sections);
        assert_eq!(with(&|f| f[12] = 2), FormatError::Sections);
        let large = vec![0; MAX_FILE as usize + 1];
        assert_eq!(StateFile::decode(&large), Err(FormatError::TooLarge));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..256), count: u32) {
            let _ = StateFile::decode(&bytes);
            // Past the checks of the header.
            let _ = sections(&bytes, count);
        }
    }
}
