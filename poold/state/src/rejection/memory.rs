//! Refusals about what guest memory is made of.

use super::RejectionClass;
use proto::{ByteCount, limits::HUGE_PAGE_BYTES};
use serde::{Deserialize, Serialize};

/// Why memory can't be in huge pages there, or not so. Fields hold names.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum MemoryRejection {
    /// Memory is not a number of whole huge pages.
    #[error("{memory} of memory are not a number of huge pages of {}", ByteCount(HUGE_PAGE_BYTES))]
    NotWholeHugePages {
        /// As given.
        memory: ByteCount,
    },
    /// The host has not so many huge pages that no VM has reserved.
    #[error("host {host} has {free} of {total} in huge pages free, vm {vm} needs {needed}")]
    HugePagesShort {
        /// The VM.
        vm: String,
        /// The host.
        host: String,
        /// What its kernel keeps.
        total: ByteCount,
        /// Not reserved by VMs.
        free: ByteCount,
        /// Needed.
        needed: ByteCount,
    },
    /// Pages on demand come in 4 KiB; one that is missing would keep 2 MiB from the guest.
    #[error("vm {vm} has its memory in huge pages, which can't come on demand")]
    HugePagesOnDemand {
        /// The VM.
        vm: String,
    },
}

impl MemoryRejection {
    /// Stable upper-case code.
    #[must_use]
    pub fn reason_code(&self) -> &'static str {
        match self {
            Self::NotWholeHugePages { .. } => "NOT_WHOLE_HUGE_PAGES",
            Self::HugePagesShort { .. } => "NOT_ENOUGH_HUGE_PAGES",
            Self::HugePagesOnDemand { .. } => "HUGE_PAGES_ON_DEMAND",
        }
    }

    /// What kind of refusal it is.
    #[must_use]
    pub fn class(&self) -> RejectionClass {
        match self {
            Self::NotWholeHugePages { .. } => RejectionClass::Invalid,
            Self::HugePagesShort { .. } | Self::HugePagesOnDemand { .. } => RejectionClass::Precondition,
        }
    }

    /// The object that it is about.
    #[must_use]
    pub fn object(&self) -> String {
        match self {
            Self::NotWholeHugePages { .. } => "field memory".into(),
            Self::HugePagesShort { host, .. } => format!("host {host}"),
            Self::HugePagesOnDemand { vm } => format!("vm {vm}"),
        }
    }

    /// What to do next: one sentence or a command.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::NotWholeHugePages { .. } => {
                format!("use a multiple of {}, or no --hugepages", ByteCount(HUGE_PAGE_BYTES))
            }
            Self::HugePagesShort { host, total, free, needed, .. } => {
                let short = needed.0.saturating_sub(free.0).div_ceil(HUGE_PAGE_BYTES);
                let pages = total.0 / HUGE_PAGE_BYTES + short;
                format!(
                    "on {host} `sysctl vm.nr_hugepages={pages}`, which counts within seconds; or choose another host"
                )
            }
            Self::HugePagesOnDemand { .. } => "choose another policy, such as must-finish".into(),
        }
    }
}
