//! What guest memory is made of.

use crate::{ByteCount, limits};
use serde::{Deserialize, Serialize};

/// Pages that a host gives to a guest. Dirty pages, proofs and migrations count in 4 KiB whatever they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum MemoryPages {
    /// 4 KiB, taken when they are touched.
    #[default]
    Small,
    /// 2 MiB out of those that the host's kernel keeps for it, all of them taken before the guest runs.
    Huge,
}

impl MemoryPages {
    /// What memory must be a multiple of.
    #[must_use]
    pub fn bytes(self) -> ByteCount {
        match self {
            Self::Small => ByteCount(limits::BLOCK_BYTES as u64),
            Self::Huge => ByteCount(limits::HUGE_PAGE_BYTES),
        }
    }

    /// As messages have it.
    #[must_use]
    pub fn of_flag(huge: bool) -> Self {
        if huge { Self::Huge } else { Self::Small }
    }

    /// As messages have it.
    #[must_use]
    pub fn is_huge(self) -> bool {
        self == Self::Huge
    }
}
