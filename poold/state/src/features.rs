//! Feature levels: what a daemon of an older version could not read, or would do otherwise.
//!
//! ```text
//!  daemons at 1,1,1 ─▶ upgraded one by one: 2,1,1 ─▶ 2,2,1 ─▶ 2,2,2 ──one entry──▶ the pool is at 2
//! ```
//! A pool works at one level, which all of its daemons support. New versions run side by side with old ones at the old level; the
//! leader raises it by one entry as soon as every member has reported the new one. It never goes back.
//!
//! A feature is asked for in `apply`, where the entry is committed, so no host ever sees an entry that it does not know.

/// The newest level that this version supports.
pub const NEWEST: u32 = 2;

/// The oldest one.
pub const OLDEST: u32 = 1;

/// How far a daemon may be ahead of its pool: versions are upgraded one after the other.
pub const SKEW_MAX: u32 = 1;

/// What a level has brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Feature {
    /// Settings that can be changed while the pool runs.
    PoolSettings,
    /// Another certificate authority in place of the pool's first one.
    CaRotation,
    /// Access by tokens.
    AccessTokens,
}

impl Feature {
    /// The level that it came with.
    #[must_use]
    pub fn level(self) -> u32 {
        match self {
            Self::PoolSettings | Self::CaRotation | Self::AccessTokens => 2,
        }
    }
}

const _: () = assert!(OLDEST <= NEWEST && NEWEST - OLDEST <= SKEW_MAX);
