//! One volume under faults, from a seed: the real owner, the real replica and log, everything else simulated.
//!
//! ```text
//!  Process: guest ⇄ core::Owner ──frames──▶ World: delays, cuts, partitions ──▶ Host: server::work, Engine ──▶ SimDisk
//!                      ▲ epochs                                                   │ proposals
//!                      └──────────────────────────── Pool ◀────────────────────────┘            Oracle watches all
//! ```
//! Faults: owners killed, paused and going on beside a newer one, hand-overs that are broken off; daemons restarted and paused;
//! power cuts of one or all (what was not synced is lost, reordered or torn); disks replaced, full and slow; connections cut,
//! with frames that still arrive afterwards; partitions; proposals that are lost, late, or committed without an answer.
//!
//! Guests write, trim, flush, read, take, read and delete snapshots and go back to them. At the end one disk is damaged: bits turned,
//! pages unreadable, writes lost or misdirected; then everything is verified and must come out equal.
//!
//! A failing seed is printed; `SIM_SEED` runs it alone, `SIM_SEEDS` sets how many are run.

pub(crate) mod disk;
mod exhaustive;
mod faults;
mod host;
mod oracle;
mod pool;
mod process;
pub(crate) mod random;
mod snapshots;
mod tests;
mod world;
