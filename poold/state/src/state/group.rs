//! Rules about where VMs run.

use proto::{GroupId, HostId, VmId};
use serde::{Deserialize, Serialize};

/// A rule and the VMs that it is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Index of the entry that created it.
    pub id: GroupId,
    /// Unique among groups.
    pub name: String,
    /// What it says.
    pub rule: GroupRule,
    /// Whether it may be broken.
    pub strength: GroupStrength,
    /// The VMs, ascending.
    pub vms: Vec<VmId>,
    /// The hosts, ascending; only rules about hosts have any.
    pub hosts: Vec<HostId>,
}

/// What a group says about its VMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum GroupRule {
    /// All on one host.
    Together,
    /// No two on one host.
    Apart,
    /// Only on the group's hosts.
    OnHosts,
    /// Never on the group's hosts.
    NotOnHosts,
}

/// Whether a rule may be broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum GroupStrength {
    /// A VM stays down rather than break it.
    Must,
    /// Kept when there is a choice.
    Should,
}

impl GroupRule {
    /// The word that operators see and write.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Together => "together",
            Self::Apart => "apart",
            Self::OnHosts => "on-hosts",
            Self::NotOnHosts => "not-on-hosts",
        }
    }
}

impl GroupStrength {
    /// The word that operators see and write.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Must => "must",
            Self::Should => "should",
        }
    }
}
