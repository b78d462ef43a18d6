// SPDX-License-Identifier: Apache-2.0
//! Guest memory: private and anonymous, so that KSM, free page return and
//! copy-on-write templates work on it.

mod windows;

use std::{fs::File, io, ops::Range};

use bulkhead_vmm_api::Pages;
use vm_memory::{
    mmap::MmapRegionError, Address, FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

pub use self::windows::WindowAllocator;
use crate::arch::x86_64::layout;

const PAGE: usize = 4096;
/// Stack of a thread. A mapping of 2 MiB that happens to be aligned, as Rust's
/// own choice is, would be a huge page at the first touch where the host gives
/// those to all.
pub const THREAD_STACK: usize = 1 << 20;
/// A huge page. A guest has one as such only where its guest-physical address
/// and the host's are multiples of this.
const HUGE_PAGE: usize = 2 << 20;
/// How they are asked for, by themselves.
const HUGE_FLAGS: libc::c_int = libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;

/// Why guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host refused the mapping.
    #[error("guest memory of {size} bytes could not be mapped")]
    Map {
        /// Bytes asked for.
        size: u64,
        /// Why.
        #[source]
        source: MmapRegionError,
    },
    /// The host keeps too few huge pages, or none.
    #[error("pages: guest memory takes {count} huge pages of 2 MiB, and the host has not so many left: raise /proc/sys/vm/nr_hugepages")]
    HugePages {
        /// Pages asked for.
        count: u64,
        /// Why.
        #[source]
        source: MmapRegionError,
    },
    /// The regions do not fit together.
    #[error("guest memory regions do not fit together")]
    Layout(#[source] vm_memory::GuestRegionCollectionError),
    /// A snapshot's memory file is not as long as it must be.
    #[error("memory file of {found} bytes; the snapshot's guest has {wanted}")]
    Size {
        /// Bytes of the file.
        found: u64,
        /// Bytes of memory.
        wanted: u64,
    },
    /// A snapshot's memory file.
    #[error("memory file")]
    File(#[source] io::Error),
    /// A region's end wraps around.
    #[error("guest memory region wraps around")]
    Wraps,
}

/// The ranges that `size` bytes of memory take: one below the 32-bit hole,
/// and what does not fit there above 4 GiB.
pub fn ranges(size: u64) -> Vec<(u64, u64)> {
    let low = size.min(layout::MMIO_START);
    let mut ranges = vec![(0, low)];
    if size > low {
        ranges.push((layout::HIGH_RAM, size - low));
    }
    ranges
}

/// Maps `size` bytes of guest memory. Nothing is populated; huge pages are
/// reserved.
pub fn allocate(size: u64, pages: Pages) -> Result<GuestMemoryMmap, MemoryError> {
    map(size, flags(pages), |_| Ok(None)).map_err(|error| match error {
        // All of it, not the region that was one too many.
        MemoryError::HugePages { source, .. } => MemoryError::HugePages {
            count: huge_pages(size),
            source,
        },
        other => other,
    })
}

fn flags(pages: Pages) -> libc::c_int {
    match pages {
        Pages::Small | Pages::Transparent => libc::MAP_ANONYMOUS,
        Pages::Huge => HUGE_FLAGS,
    }
}

/// How many huge pages so many bytes take.
fn huge_pages(size: u64) -> u64 {
    size.div_ceil(HUGE_PAGE as u64)
}

/// Whether memory is in pages that are its own for good.
pub fn is_reserved(memory: &GuestMemoryMmap) -> bool {
    memory.iter().any(region_is_reserved)
}

fn region_is_reserved(region: &GuestRegionMmap) -> bool {
    region.flags() & libc::MAP_HUGETLB != 0
}

/// Says how the host is to back guest memory, before it is touched: by small
/// pages, but for the guest-physical ranges in `huge`, which are used as a whole.
/// Advice: a host without huge pages has nothing to follow.
///
/// Of reserved huge pages there is nothing to say.
pub fn advise(memory: &GuestMemoryMmap, huge: &[Range<u64>]) {
    memory.iter().for_each(|region| advise_region(region, huge));
}

/// As [`advise`], of one region.
pub fn advise_region(region: &GuestRegionMmap, huge: &[Range<u64>]) {
    if region_is_reserved(region) {
        return;
    }
    let start = region.start_addr().raw_value();
    let whole = start..start + region.len();
    let parts: Vec<Range<u64>> = huge
        .iter()
        .map(|part| part.start.max(whole.start)..part.end.min(whole.end))
        .filter(|part| part.start < part.end)
        .collect();
    if !parts.contains(&whole) {
        madvise(region, 0..region.len(), libc::MADV_NOHUGEPAGE);
    }
    for part in parts {
        let range = part.start - start..part.end - start;
        madvise(region, range, libc::MADV_HUGEPAGE);
    }
}

/// Lets the host keep one copy of pages that are the same (KSM).
///
/// # Errors
/// EINVAL: this kernel has no KSM.
pub fn merge(memory: &GuestMemoryMmap) -> io::Result<()> {
    memory.iter().try_for_each(merge_region)
}

/// As [`merge`], of one region.
///
/// # Errors
/// EINVAL: this kernel has no KSM.
pub fn merge_region(region: &GuestRegionMmap) -> io::Result<()> {
    try_madvise(region, 0..region.len(), libc::MADV_MERGEABLE)
}

fn madvise(region: &GuestRegionMmap, range: Range<u64>, advice: libc::c_int) {
    // Only a matter of speed.
    let _ = try_madvise(region, range, advice);
}

fn try_madvise(region: &GuestRegionMmap, range: Range<u64>, advice: libc::c_int) -> io::Result<()> {
    // Whole pages: the range may begin and end anywhere.
    let start = (region.as_ptr() as usize + range.start as usize) & !(PAGE - 1);
    let end = (region.as_ptr() as usize + range.end as usize).next_multiple_of(PAGE);
    // SAFETY: the pages are of this region, which the caller holds, and the
    // advice does not change what they contain.
    match unsafe { libc::madvise(start as *mut libc::c_void, end - start, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives the whole pages of a guest-physical range back to the host; the guest
/// finds zeros there from now on. Returns how many bytes: what is not memory is
/// left alone, and so is what the host refuses to take, and what is in reserved
/// huge pages: one that was given back would be anybody's, and the guest that
/// touches it again would end when none is left.
pub fn discard(memory: &GuestMemoryMmap, range: Range<u64>) -> u64 {
    let mut discarded = 0;
    for region in memory.iter() {
        let base = region.start_addr().raw_value();
        let start = range.start.max(base).next_multiple_of(PAGE as u64);
        let end = range.end.min(base + region.len()) & !(PAGE as u64 - 1);
        if start < end && discard_in(region, start - base..end - base) {
            discarded += end - start;
        }
    }
    discarded
}

/// Whole pages of one region.
fn discard_in(region: &GuestRegionMmap, range: Range<u64>) -> bool {
    if region_is_reserved(region) {
        return false;
    }
    let length = (range.end - range.start) as usize;
    // SAFETY: the caller's range is of this region, which it holds.
    let start = unsafe { region.as_ptr().add(range.start as usize) }.cast();
    if region.file_offset().is_none() {
        // SAFETY: the pages are of this region. Nothing but the guest relies on
        // what they contain, and it has given them up.
        return unsafe { libc::madvise(start, length, libc::MADV_DONTNEED) } == 0;
    }
    // Without its copy of a page, a private mapping shows the file's: what the
    // guest's template had there. So memory takes the file's place.
    // SAFETY: the range is of this region's mapping, which stays one with the
    // same protection; its contents are the guest's to lose, as above.
    let mapped = unsafe {
        libc::mmap(
            start,
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED,
            -1,
            0,
        )
    };
    if mapped == libc::MAP_FAILED {
        return false;
    }
    madvise(region, range, libc::MADV_NOHUGEPAGE);
    true
}

/// Maps a snapshot's memory file as guest memory of `size` bytes: pages are
/// the file's until the guest writes them. The file has `more` bytes after them.
pub fn map_snapshot(size: u64, more: u64, file: &File) -> Result<GuestMemoryMmap, MemoryError> {
    let found = file.metadata().map_err(MemoryError::File)?.len();
    let wanted = size.saturating_add(more);
    if found != wanted {
        return Err(MemoryError::Size { found, wanted });
    }
    let memory = map(size, 0, |offset| {
        let file = file.try_clone().map_err(MemoryError::File)?;
        Ok(Some(FileOffset::new(file, offset)))
    })?;
    // By this advice `smaps` shows which memory is the guest's.
    advise(&memory, &[]);
    Ok(memory)
}

/// Maps the regions, each of what `backing` gives for its offset.
fn map(
    size: u64,
    flags: libc::c_int,
    backing: impl Fn(u64) -> Result<Option<FileOffset>, MemoryError>,
) -> Result<GuestMemoryMmap, MemoryError> {
    let mut regions = Vec::new();
    let mut offset = 0;
    for (base, length) in ranges(size) {
        regions.push(map_region(base..base + length, flags, backing(offset)?)?);
        offset += length;
    }
    GuestMemoryMmap::from_regions(regions).map_err(MemoryError::Layout)
}

/// Maps one region at guest-physical addresses: of a snapshot's memory file
/// from an offset on, or new, in such pages.
pub fn region(
    addresses: Range<u64>,
    file: Option<FileOffset>,
    pages: Pages,
) -> Result<GuestRegionMmap, MemoryError> {
    let flags = match file {
        Some(_) => 0,
        None => flags(pages),
    };
    map_region(addresses, flags, file)
}

fn map_region(
    addresses: Range<u64>,
    flags: libc::c_int,
    backing: Option<FileOffset>,
) -> Result<GuestRegionMmap, MemoryError> {
    let size = addresses.end - addresses.start;
    let huge = flags & libc::MAP_HUGETLB != 0;
    // The host answers for huge pages now, or the guest would find out.
    let unreserved = if huge { 0 } else { libc::MAP_NORESERVE };
    let flags = libc::MAP_PRIVATE | unreserved | flags;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let build = |file| {
        MmapRegion::build(file, size as usize, protection, flags).map_err(|source| match huge {
            true => MemoryError::HugePages {
                count: huge_pages(size),
                source,
            },
            false => MemoryError::Map { size, source },
        })
    };
    // Reserved huge pages are aligned in any case; a file's are small.
    let gap = (backing.is_none() && !huge).then(|| AlignedGap::open(size as usize));
    let mapping = build(backing)?;
    drop(gap);
    GuestRegionMmap::new(mapping, GuestAddress(addresses.start)).ok_or(MemoryError::Wraps)
}

/// A gap in this process' addresses that begins at a multiple of a huge page and
/// is as long as a mapping to come, which the kernel puts there: into the highest
/// gap that it fits into. Linux before 6.7 does not align mappings itself. What
/// keeps the gap apart goes with the value.
struct AlignedGap([(usize, usize); 2]);

impl AlignedGap {
    /// Opens one. Without one the mapping is only slower.
    fn open(size: usize) -> Option<Self> {
        let room = size.checked_add(HUGE_PAGE)?;
        // SAFETY: a new mapping that nothing can access, at a place of the
        // kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                room,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return None;
        }
        let start = start as usize;
        let aligned = start.next_multiple_of(HUGE_PAGE);
        let gap = Self([(start, aligned), (aligned + size, start + room)]);
        unmap(aligned, aligned + size);
        Some(gap)
    }
}

impl Drop for AlignedGap {
    fn drop(&mut self) {
        for (start, end) in self.0 {
            unmap(start, end);
        }
    }
}

/// Unmaps a part of what [`AlignedGap::open`] has mapped.
fn unmap(start: usize, end: usize) {
    if start < end {
        // SAFETY: the caller's range is of a mapping of its own, which nothing
        // refers to.
        let _ = unsafe { libc::munmap(start as *mut libc::c_void, end - start) };
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn large_memory_is_split_around_the_hole() {
        let gib = 1 << 30;
        assert_eq!(ranges(gib), [(0, gib)]);
        assert_eq!(ranges(3 * gib), [(0, 3 * gib)]);
        assert_eq!(ranges(5 * gib), [(0, 3 * gib), (4 * gib, 2 * gib)]);
    }

    fn fill(memory: &GuestMemoryMmap, range: Range<u64>, byte: u8) {
        let bytes = vec![byte; (range.end - range.start) as usize];
        memory
            .write_slice(&bytes, GuestAddress(range.start))
            .unwrap();
    }

    fn byte(memory: &GuestMemoryMmap, at: u64) -> u8 {
        memory.read_obj(GuestAddress(at)).unwrap()
    }

    #[test]
    fn memory_begins_where_a_huge_page_can() {
        // As large as a mapping that Linux does not align by itself.
        let size = (8 << 20) + PAGE as u64;
        let aligned = (0..16).filter(|_| {
            let memory = allocate(size, Pages::Small).unwrap();
            let region = memory.iter().next().unwrap();
            region.as_ptr() as usize % HUGE_PAGE == 0
        });
        // Another thread may take the gap, now and then.
        assert!(aligned.count() > 8);
    }

    #[test]
    fn whole_pages_that_are_discarded_are_zero() {
        let memory = allocate(4 << 20, Pages::Small).unwrap();
        fill(&memory, 0..0x5000, 7);
        assert_eq!(discard(&memory, 0x1001..0x3fff), 0x1000);
        assert_eq!(byte(&memory, 0x1fff), 7);
        assert_eq!(byte(&memory, 0x2000), 0);
        assert_eq!(byte(&memory, 0x3000), 7);
        // What is not there stays out of it.
        assert_eq!(discard(&memory, (4 << 20) - 0x1000..u64::MAX), 0x1000);
        assert_eq!(discard(&memory, u64::MAX - 0x2000..u64::MAX), 0);
        assert_eq!(discard(&memory, 0x3000..0x3000), 0);
        assert_eq!(byte(&memory, 0x3000), 7);
    }

    #[test]
    fn a_clone_never_sees_again_what_its_template_had() {
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        file.set_len(4 << 20).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[9; 0x4000], 0).unwrap();
        let clone = map_snapshot(4 << 20, 0, &file).unwrap();
        let other = map_snapshot(4 << 20, 0, &file).unwrap();
        fill(&clone, 0x1000..0x2000, 7);
        // A page of its own and one of the file's.
        assert_eq!(discard(&clone, 0x1000..0x3000), 0x2000);
        let seen = [0, 0x1000, 0x2000, 0x3000].map(|at| byte(&clone, at));
        assert_eq!(seen, [9, 0, 0, 9]);
        fill(&clone, 0x1000..0x2000, 8);
        assert_eq!(discard(&clone, 0x1000..0x2000), 0x1000);
        assert_eq!(byte(&clone, 0x1000), 0);
        assert_eq!(byte(&other, 0x1000), 9);
    }

    #[test]
    fn reserved_pages_are_there_or_the_error_tells_how() {
        let size = 1 << 40;
        let error = allocate(size, Pages::Huge).unwrap_err().to_string();
        for word in ["524288 huge pages", "/proc/sys/vm/nr_hugepages"] {
            assert!(error.contains(word), "{error}");
        }
        let Ok(memory) = allocate(4 << 20, Pages::Huge) else {
            println!("SKIPPED: reserved_pages_are_there_or_the_error_tells_how: this host has no huge pages: the end-to-end tests reserve some");
            return;
        };
        assert!(is_reserved(&memory));
        fill(&memory, 0..4 << 20, 7);
        assert_eq!(discard(&memory, 0..4 << 20), 0);
        assert_eq!(byte(&memory, 1 << 20), 7);
    }

    /// Whether the kernel says of the mapping at `address` that it has `flag`.
    fn has_flag(address: usize, flag: &str) -> bool {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let start = format!("{address:x}-");
        let mapping = smaps.lines().skip_while(|line| !line.starts_with(&start));
        let mut flags = mapping.filter_map(|line| line.strip_prefix("VmFlags:"));
        flags.next().unwrap().split_whitespace().any(|f| f == flag)
    }

    #[test]
    fn memory_is_mergeable_only_when_told() {
        let memory = allocate(4 << 20, Pages::Small).unwrap();
        let region = memory.iter().next().unwrap();
        advise(&memory, &[]);
        let address = region.as_ptr() as usize;
        assert!(!has_flag(address, "mg"));
        match merge(&memory) {
            Ok(()) => assert!(has_flag(address, "mg")),
            // A kernel without KSM.
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::InvalidInput),
        }
    }

    #[test]
    fn memory_is_mapped() {
        let memory = allocate(64 << 20, Pages::Small).unwrap();
        assert_eq!(memory.num_regions(), 1);
    }
}
