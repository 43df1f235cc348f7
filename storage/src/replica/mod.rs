//! The disk side of a volume: one [`Replica`] per volume, all on one [`Store`].
//!
//! ```text
//!  connections ──Op──▶ store thread ── LogWriter ──▶ segments
//!                        │ owns: replicas, log          map (shared, read-locked by readers)
//!                        └── promises: one small file per volume, durable before the promise is spoken
//! ```

mod map;
mod promise;
mod state;
mod store;

pub use map::{BlockMap, BlockVersion, Entry};
pub use state::{Replica, WriteRefused};
pub use store::{Op, OpError, ReadBlock, Refused, Store, StoreError, Usage, Watermark, WatermarkSink};
