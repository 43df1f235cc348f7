//! Which version of each block a replica holds, and where: copy-on-write trees of 4 KiB pages, in the log.
//!
//! ```text
//!  root ─▶ node (level 4) ─▶ … ─▶ node (level 1) ─▶ leaf (level 0) ─▶ blocks in the log
//!          256 children: place, newest sequence below        128 blocks: version, place, checksum
//! ```
//! A page is changed in memory and put to a new place in the log by the next checkpoint; until then the log's records repeat the
//! change after a crash. Pages of all trees share one budget; a clean page may be dropped at any time and is read again.
//!
//! Invariants: a dirty page is in memory, and so are all pages above it; a page is written after its children; a page and a
//! block of data belong to one tree, so that a segment's live count is the number of blocks and pages in it that are needed.
//! A block that is voided stays in its tree until a copy or a write takes its place.
//! Deliberately absent: I/O. Pages come from a [`PageReader`] and go to whoever takes a checkpoint.

mod cache;
mod page;
mod tree;
mod walk;

#[cfg(test)]
mod tests;

pub use cache::{CHECKPOINT_PAGES_MAX, LiveCounts, MapError, Maps, PageReader, Root};
pub use page::{BlockVersion, Content, Entry, LEAF_BLOCKS, PAGE_BYTES, PageKey, Place, TreeId};
