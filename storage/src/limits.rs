//! Bounds that owner and replica both rely on.

use crate::wire::DATA_BYTES_MAX;
use proto::limits::BLOCK_BYTES;

/// Cost in bytes of the writes that an owner may have in flight: bounds its memory while a replica is slow or away, and how
/// far the members of an in-sync set can be apart. Small in unit tests and the simulation, so that what it bounds is let go there.
pub const WINDOW_BYTES: usize = if cfg!(test) { 1 << 20 } else { 16 << 20 };

/// Snapshots of a volume: a read of a block that was never written looks at the layer of each, and their list fits in a frame.
pub const SNAPSHOTS_MAX: usize = 128;

const _: () = assert!(WINDOW_BYTES >= DATA_BYTES_MAX);

/// What a write takes of the window: its data; one without data costs a block, so that their number is bounded too.
#[must_use]
pub fn write_cost(data_bytes: usize) -> usize {
    data_bytes.max(BLOCK_BYTES)
}
