// SPDX-License-Identifier: Apache-2.0
//! A kernel's file, read in few system calls: small pieces, such as headers and
//! notes, by the page that they are in; large ones at once, to where they go.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::{fd::AsFd, unix::fs::FileExt},
};

use vm_memory::{bitmap::BitmapSlice, ReadVolatile, VolatileMemoryError, VolatileSlice};

/// What is shorter is read by the page.
const PAGE: usize = 4096;

/// A file with a position of its own.
pub struct Image<'a> {
    file: &'a File,
    position: u64,
    /// A page of the file, shorter at its end, and where it begins.
    page: Vec<u8>,
    page_at: u64,
}

impl<'a> Image<'a> {
    /// At the beginning of `file`.
    pub fn new(file: &'a File) -> Self {
        Self {
            file,
            position: 0,
            page: Vec::new(),
            page_at: 0,
        }
    }

    /// What is left of the page at the position; nothing at the end of the file.
    fn in_page(&mut self) -> io::Result<&[u8]> {
        let start = self.position & !(PAGE as u64 - 1);
        if self.page.is_empty() || self.page_at != start {
            let mut page = vec![0; PAGE];
            let mut length = 0;
            while length < PAGE {
                match self
                    .file
                    .read_at(&mut page[length..], start + length as u64)
                {
                    Ok(0) => break,
                    Ok(more) => length += more,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            page.truncate(length);
            (self.page, self.page_at) = (page, start);
        }
        let offset = (self.position - start) as usize;
        Ok(self.page.get(offset..).unwrap_or_default())
    }

    fn advance(&mut self, length: usize) -> io::Result<usize> {
        let next = self.position.checked_add(length as u64);
        self.position = next.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(length)
    }
}

impl Read for Image<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = if buffer.len() < PAGE {
            let page = self.in_page()?;
            let length = page.len().min(buffer.len());
            buffer[..length].copy_from_slice(&page[..length]);
            length
        } else {
            self.file.read_at(buffer, self.position)?
        };
        self.advance(length)
    }
}

impl Seek for Image<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
            SeekFrom::End(by) => self.file.metadata()?.len().checked_add_signed(by),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

impl ReadVolatile for Image<'_> {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buffer: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        let length = if buffer.len() < PAGE {
            let page = self.in_page().map_err(VolatileMemoryError::IOError)?;
            let length = page.len().min(buffer.len());
            buffer.copy_from(&page[..length]);
            length
        } else {
            // Its position is this one's for as long as it takes.
            let mut file = self.file;
            let at = SeekFrom::Start(self.position);
            file.seek(at).map_err(VolatileMemoryError::IOError)?;
            self.file.as_fd().read_volatile(buffer)?
        };
        self.advance(length).map_err(VolatileMemoryError::IOError)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vmm_sys_util::tempfile::TempFile;

    use super::*;

    fn file(length: usize) -> (TempFile, Vec<u8>) {
        let content: Vec<u8> = (0..length).map(|at| (at / 7) as u8).collect();
        let file = TempFile::new().unwrap();
        file.as_file().write_all(&content).unwrap();
        (file, content)
    }

    #[test]
    fn pieces_are_as_in_the_file_wherever_they_begin() {
        let (file, content) = file(3 * PAGE + 100);
        let mut image = Image::new(file.as_file());
        for (at, length) in [
            (0, 64),
            (64, 56),
            (PAGE - 10, 20),
            (2 * PAGE, PAGE),
            (5, 3 * PAGE),
            (3 * PAGE + 90, 10),
            (3, 0),
        ] {
            image.seek(SeekFrom::Start(at as u64)).unwrap();
            let mut read = vec![0; length];
            image.read_exact(&mut read).unwrap();
            assert_eq!(read, content[at..at + length], "{at} {length}");
            assert_eq!(image.stream_position().unwrap(), (at + length) as u64);

            image.seek(SeekFrom::Start(at as u64)).unwrap();
            let mut read = vec![0; length];
            let mut slice = VolatileSlice::from(&mut read[..]);
            image.read_exact_volatile(&mut slice).unwrap();
            assert_eq!(read, content[at..at + length], "{at} {length}");
        }
    }

    #[test]
    fn the_end_is_the_files() {
        let (file, content) = file(PAGE + 10);
        let mut image = Image::new(file.as_file());
        let mut all = Vec::new();
        image.read_to_end(&mut all).unwrap();
        assert_eq!(all, content);
        assert_eq!(image.read(&mut [0; 8]).unwrap(), 0);
        image.seek(SeekFrom::End(-4)).unwrap();
        assert_eq!(image.read(&mut [0; 8]).unwrap(), 4);
        image.seek(SeekFrom::Start(PAGE as u64 * 9)).unwrap();
        assert!(image.read_exact(&mut [0; 8]).is_err());
        assert!(image.read_exact(&mut [0; 2 * PAGE]).is_err());
        assert!(image.seek(SeekFrom::Current(i64::MIN)).is_err());
    }
}
