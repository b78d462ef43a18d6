// SPDX-License-Identifier: Apache-2.0
//! `/proc/PID/smaps`, summed up by whose memory it is.

/// Flags that only guest memory has: the VMM gives advice about huge pages and
/// merging for nothing else, nor reserves any.
const GUEST_FLAGS: [&str; 4] = ["nh", "hg", "mg", "ht"];

/// Bytes of one process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sums {
    /// Its own memory, guest memory aside.
    pub private: u64,
    /// Guest memory that is nobody else's.
    pub guest_private: u64,
    /// Guest memory in all.
    pub guest_resident: u64,
    /// Pages of files that others map too.
    pub file_shared: u64,
    /// What it would take more if it had those pages for itself.
    pub file_saved: u64,
    /// Guest memory that is still its template's, the memory file it was cloned
    /// from, and that others have too.
    pub template_shared: u64,
    /// What it would take more if it had those pages for itself.
    pub template_saved: u64,
}

/// One mapping.
#[derive(Debug, Default)]
struct Mapping {
    anonymous: bool,
    guest: bool,
    resident: u64,
    proportional: u64,
    shared: u64,
    private: u64,
}

/// Sums up a whole file. Lines that are not understood count for nothing.
pub fn sum(text: &str) -> Sums {
    let mut sums = Sums::default();
    let mut mapping = Mapping::default();
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':').filter(|(key, _)| is_key(key)) else {
            sums.add(&std::mem::take(&mut mapping));
            // Addresses, rights, offset, device, inode: 0 without a file.
            mapping.anonymous = line.split_ascii_whitespace().nth(4) == Some("0");
            continue;
        };
        if key == "VmFlags" {
            let mut flags = value.split_ascii_whitespace();
            mapping.guest = flags.any(|flag| GUEST_FLAGS.contains(&flag));
            continue;
        }
        let Some(bytes) = kib(value) else { continue };
        match key {
            "Rss" => mapping.resident += bytes,
            "Pss" => mapping.proportional += bytes,
            // In none of the others.
            "Private_Hugetlb" => {
                mapping.resident += bytes;
                mapping.proportional += bytes;
                mapping.private += bytes;
            }
            "Shared_Clean" | "Shared_Dirty" => mapping.shared += bytes,
            "Private_Clean" | "Private_Dirty" => mapping.private += bytes,
            _ => {}
        }
    }
    sums.add(&mapping);
    sums
}

impl Sums {
    fn add(&mut self, mapping: &Mapping) {
        let saved = mapping.resident.saturating_sub(mapping.proportional);
        if mapping.guest {
            self.guest_private += mapping.private;
            self.guest_resident += mapping.resident;
            // Shared pages without a file are KSM's, which tells of them itself.
            if !mapping.anonymous {
                self.template_shared += mapping.shared;
                self.template_saved += saved;
            }
            return;
        }
        self.private += mapping.private;
        if !mapping.anonymous {
            self.file_shared += mapping.shared;
            self.file_saved += saved;
        }
    }
}

/// A mapping's first line has its first colon in the device's number.
fn is_key(text: &str) -> bool {
    text.bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// `  123 kB` in bytes.
pub fn kib(value: &str) -> Option<u64> {
    let number = value.trim().strip_suffix("kB")?.trim_end();
    number.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
7f0000000000-7f0001000000 rw-p 00000000 00:00 0
Size:              16384 kB
Rss:                1000 kB
Pss:                 900 kB
Shared_Clean:          0 kB
Shared_Dirty:        200 kB
Private_Clean:         0 kB
Private_Dirty:       800 kB
VmFlags: rd wr mr mw me nr sd hg mg
7f0001000000-7f0010000000 rw-p 00000000 00:00 0
Rss:                 100 kB
Pss:                 100 kB
Private_Dirty:       100 kB
VmFlags: rd wr mr mw me nr sd nh
7f0010000000-7f0020000000 rw-p 00000000 fe:01 99     /var/lib/template.memory
Rss:                 500 kB
Pss:                 300 kB
Shared_Clean:        400 kB
Private_Clean:        30 kB
Private_Dirty:        70 kB
VmFlags: rd wr mr mw me nr sd nh
7f0020000000-7f0020100000 r-xp 00000000 fe:01 1234   /usr/bin/a: b
Rss:                  60 kB
Pss:                  30 kB
Shared_Clean:         40 kB
Private_Clean:        20 kB
VmFlags: rd ex mr mw me sd
7f0028000000-7f0029000000 rw-p 00000000 00:0f 77     /anon_hugepage (deleted)
Rss:                   0 kB
Pss:                   0 kB
Shared_Hugetlb:        0 kB
Private_Hugetlb:    4096 kB
VmFlags: rd wr mr mw me de ht sd
7f0030000000-7f0030100000 rw-p 00000000 00:00 0      [heap]
Rss:                   7 kB
Pss:                   7 kB
Private_Dirty:         7 kB
VmFlags: rd wr mr mw me ac sd
";

    #[test]
    fn guest_memory_is_told_by_its_advice() {
        let expected = Sums {
            private: 27 << 10,
            guest_private: (1000 + 4096) << 10,
            guest_resident: (1600 + 4096) << 10,
            file_shared: 40 << 10,
            file_saved: 30 << 10,
            template_shared: 400 << 10,
            template_saved: 200 << 10,
        };
        assert_eq!(sum(TEXT), expected);
    }

    #[test]
    fn this_process_has_memory_and_no_guest() {
        let sums = sum(&std::fs::read_to_string("/proc/self/smaps").unwrap());
        assert!(sums.private > 0, "{sums:?}");
        assert!(sums.file_shared + sums.private > 100 << 10, "{sums:?}");
    }

    #[test]
    fn nonsense_counts_for_nothing() {
        assert_eq!(
            sum("x\nRss: many kB\nPss: 99999999999999999999 kB\n::\n"),
            Sums::default()
        );
        assert_eq!(kib(" 18446744073709551615 kB"), None);
        assert_eq!(kib("12"), None);
    }
}
