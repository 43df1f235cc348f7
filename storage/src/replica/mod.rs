//! The disk side of a volume: one [`Replica`] per volume, all on one [`Store`].
//!
//! ```text
//!  connections ──Op──▶ [worker] ────── Engine ── LogWriter ──▶ segments
//!                        │   └── Replica: may it?            Catalog: volumes, layers, maps (shared with readers)
//!                        └── small files: promises, one per volume, durable before the promise is spoken; checkpoints
//! ```
//! Everything but [`Store`] is without threads, so that the simulation runs the same code. Where to look: [`worker`] says on which thread,
//! [`engine`] writes,
//! [`catalog`] says what records mean, [`layers`] how snapshots work, [`views`] what readers see of them, [`gc`] and [`upkeep`]
//! give space back, [`checkpoint`] bounds a restart, [`space`] is about full disks.

mod catalog;
mod checkpoint;
mod engine;
mod files;
mod gc;
mod later;
mod layers;
mod live;
mod op;
mod promise;
mod reader;
mod recent;
mod space;
mod state;
mod store;
mod upkeep;
mod views;
mod volume;
mod worker;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use crate::map::BlockVersion;
pub use checkpoint::{CheckpointError, Checkpoints};
pub use engine::{Engine, MAP_PAGES_MAX, OpenError};
pub use files::{Folder, SmallFiles};
pub use later::{Blocks, Detail, Found, ReadResult};
pub use op::{Attached, CopiedRun, Op, OpError, OpKind, ReadBlock, Refused, Told, Watermark};
pub use promise::Promises;
pub use reader::{Reader, RepairCounts, Usage, Verified};
pub use recent::{RecentWrite, What};
pub use space::{FULL_PERCENT, NO_NEW_VOLUMES_PERCENT, Pressure, THROTTLE_PERCENT, WARN_PERCENT};
pub use state::{Replica, Session, WriteRefused};
pub use store::{Store, StoreError, WatermarkSink};
pub use views::Changes;
