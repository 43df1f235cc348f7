//! The hashes of a memory image that a host has kept, so that a machine that comes back brings only what has changed.
//!
//! ```text
//! u32 "PGHX" │ u16 version 1 │ u64 pages of memory │ run … run │ u32 0
//! run = u32 pages │ u64 first page │ pages × blake3 hash          pages with content only, ascending
//! ```
//! All numbers are little-endian. The same bytes lie beside the kept image and go over the wire, from the target to the
//! source. An index says what its owner holds; that the memory is right in the end is the proof's business.

use crate::{
    proof::{MemoryHash, PageHashes, ZERO_MARK},
    wire::WireError,
};
use proto::PageIndex;

const MAGIC: &[u8; 4] = b"PGHX";

/// 1: the first.
const VERSION: u16 = 1;

const HEAD_BYTES: usize = 4 + 2 + 8;
const RUN_HEAD_BYTES: usize = 4 + 8;
const HASH_BYTES: usize = size_of::<MemoryHash>();

/// Largest index in bytes: the content of 8 GiB. A larger guest comes back whole.
pub const INDEX_BYTES_MAX: usize = 64 << 20;

/// Pages that fit in at most.
pub const PAGES_MAX: u64 = (INDEX_BYTES_MAX / size_of::<MemoryHash>()) as u64;

/// The index of an image; `None` when it would be over [`INDEX_BYTES_MAX`].
#[must_use]
pub fn encode(hashes: &PageHashes) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&hashes.page_count().to_le_bytes());
    let mut page = 0;
    while page < hashes.page_count() {
        let is_full = |page: &u64| hashes.get(PageIndex(*page)) != &ZERO_MARK;
        let run = (page..hashes.page_count()).take_while(is_full).count() as u64;
        if run > 0 {
            if out.len() as u64 + RUN_HEAD_BYTES as u64 + run * HASH_BYTES as u64 > INDEX_BYTES_MAX as u64 {
                return None;
            }
            out.extend_from_slice(&u32::try_from(run).ok()?.to_le_bytes());
            out.extend_from_slice(&page.to_le_bytes());
            (page..page + run).for_each(|page| out.extend_from_slice(hashes.get(PageIndex(page))));
        }
        page += run + 1;
    }
    out.extend_from_slice(&0_u32.to_le_bytes());
    Some(out)
}

/// The hashes of an index of a memory of `page_count` pages.
///
/// # Errors
/// [`WireError::Index`] for anything else.
pub fn decode(bytes: &[u8], page_count: u64) -> Result<PageHashes, WireError> {
    let mut rest = bytes;
    let mut take = |count: usize| {
        let (head, tail) = rest.split_at_checked(count).ok_or(WireError::Index)?;
        rest = tail;
        Ok(head)
    };
    let head: &[u8] = take(HEAD_BYTES)?;
    let mut wanted = MAGIC.to_vec();
    wanted.extend_from_slice(&VERSION.to_le_bytes());
    wanted.extend_from_slice(&page_count.to_le_bytes());
    if head != wanted {
        return Err(WireError::Index);
    }
    let mut hashes = PageHashes::new(page_count);
    let mut next = 0_u64;
    loop {
        let run = u32::from_le_bytes(take(4)?.try_into().expect("cut to this length"));
        if run == 0 {
            break;
        }
        let first = u64::from_le_bytes(take(8)?.try_into().expect("cut to this length"));
        let end = first.checked_add(u64::from(run)).filter(|end| first >= next && *end <= page_count);
        let end = end.ok_or(WireError::Index)?;
        let of_run = take(run as usize * HASH_BYTES)?;
        for (page, hash) in (first..end).zip(of_run.chunks_exact(HASH_BYTES)) {
            hashes.set_hash(PageIndex(page), hash.try_into().expect("cut to this length"));
        }
        next = end;
    }
    if rest.is_empty() { Ok(hashes) } else { Err(WireError::Index) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hashes(pages: &[u64]) -> PageHashes {
        let mut hashes = PageHashes::new(1000);
        pages.iter().for_each(|page| hashes.set_hash(PageIndex(*page), [*page as u8 + 1; HASH_BYTES]));
        hashes
    }

    #[test]
    fn an_index_comes_back_as_it_was() {
        for pages in [&[][..], &[0], &[0, 1, 2, 500, 501, 999]] {
            let bytes = encode(&hashes(pages)).unwrap();
            let back = decode(&bytes, 1000).unwrap();
            for page in (0..1000).map(PageIndex) {
                assert_eq!(back.get(page), hashes(pages).get(page), "{page}");
            }
        }
    }

    #[test]
    fn what_is_no_index_of_this_memory_is_refused() {
        let bytes = encode(&hashes(&[3, 4, 900])).unwrap();
        assert_eq!(decode(&bytes, 999).err(), Some(WireError::Index));
        for length in 0..bytes.len() {
            assert_eq!(decode(&bytes[..length], 1000).err(), Some(WireError::Index), "cut at {length}");
        }
        let longer = [&bytes[..], &[0]].concat();
        assert_eq!(decode(&longer, 1000).err(), Some(WireError::Index));
        // A run that goes back, and one that ends behind the memory.
        for (at, value) in [(HEAD_BYTES + 4, 999_u64), (HEAD_BYTES + 4, u64::MAX)] {
            let mut wrong = bytes.clone();
            wrong[at..at + 8].copy_from_slice(&value.to_le_bytes());
            assert_eq!(decode(&wrong, 1000).err(), Some(WireError::Index));
        }
    }
}
