//! Batches as the network brings them.

use bytes::{Buf, Bytes};
use migrate::wire::batch::BATCH_PREFIX_BYTES;

/// Of one packet; no part of a page.
const PIECE_BYTES: usize = 6413;

/// A batch without the length before it, in pieces.
pub fn in_packets(mut batch: Bytes) -> Vec<Bytes> {
    batch.advance(BATCH_PREFIX_BYTES);
    let mut pieces = Vec::new();
    while !batch.is_empty() {
        pieces.push(batch.split_to(PIECE_BYTES.min(batch.len())));
    }
    pieces
}
