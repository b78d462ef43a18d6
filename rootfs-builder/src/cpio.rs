// SPDX-License-Identifier: Apache-2.0
//! A deterministic writer of cpio archives in the "newc" form, which is what
//! the kernel unpacks as its initramfs
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

/// An archive in the making. Entries appear in the order they are added;
/// every time is 0 and every owner root, so equal content gives equal bytes.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory. Parents must have been added before.
    pub fn dir(&mut self, path: &str) {
        self.entry(path, 0o040755, (0, 0), &[]);
    }

    /// Adds a regular file; `mode` holds the permission bits.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entry(path, 0o100000 | mode, (0, 0), content);
    }

    /// Adds a character device.
    pub fn char_dev(&mut self, path: &str, mode: u32, major: u32, minor: u32) {
        self.entry(path, 0o020000 | mode, (major, minor), &[]);
    }

    /// The finished archive, with its trailer.
    pub fn finish(mut self) -> Vec<u8> {
        self.inode = u32::MAX;
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, rdev: (u32, u32), content: &[u8]) {
        let path = path.trim_start_matches('/');
        self.inode = self.inode.wrapping_add(1);
        let nlink = if mode & 0o170000 == 0o040000 { 2 } else { 1 };
        self.bytes.extend_from_slice(b"070701");
        let fields = [
            self.inode,
            mode,
            0,
            0,
            nlink,
            0,
            content.len() as u32,
            0,
            0,
            rdev.0,
            rdev.1,
            path.len() as u32 + 1,
            0,
        ];
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_and_padding_are_as_specified() {
        let mut archive = Archive::new();
        archive.dir("/a");
        archive.file("a/b", 0o755, b"hello");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(&bytes[..6], b"070701");
        // 110 bytes of header, "a\0" fills up to a multiple of four.
        assert_eq!(&bytes[110..112], b"a\0");
        let second = &bytes[112..];
        assert_eq!(&second[..6], b"070701");
        assert_eq!(&second[14..22], b"000081ed");
        assert_eq!(&second[54..62], b"00000005");
        assert_eq!(&second[110..114], b"a/b\0");
        assert_eq!(&second[116..121], b"hello");
        assert!(bytes.windows(10).any(|w| w == b"TRAILER!!!"));
    }

    #[test]
    fn equal_content_gives_equal_bytes() {
        let make = || {
            let mut a = Archive::new();
            a.char_dev("dev/console", 0o600, 5, 1);
            a.finish()
        };
        assert_eq!(make(), make());
    }
}
