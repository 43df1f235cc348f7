//! The disk side of a volume: one [`Replica`] per volume, all on one [`Store`].
//!
//! ```text
//!  connections ──Op──▶ store thread ── Engine ── LogWriter ──▶ segments
//!                        │   └── Replica: may it?            volumes (shared, read-locked by readers)
//!                        └── promises: one small file per volume, durable before the promise is spoken
//! ```
//! Everything but [`Store`] is without threads, so that the simulation runs the same code.

mod compact;
mod engine;
mod files;
mod later;
mod live;
mod map;
mod op;
mod promise;
mod reader;
mod recent;
mod state;
mod store;
mod volume;

pub use engine::{Engine, FULL_PERCENT, OpenError};
pub use files::{Folder, SmallFiles};
pub use later::ReadResult;
pub use map::BlockVersion;
pub use op::{Attached, Op, OpError, OpKind, ReadBlock, Refused, Told, Watermark};
pub use promise::Promises;
pub use reader::{Reader, Usage};
pub use state::{Replica, Session, WriteRefused};
pub use store::{Store, StoreError, WatermarkSink};
