//! Clusters: hosts whose VMs see one CPU profile, and that VMs are placed on and moved among.

use proto::{ClusterId, CpuProfile};
use serde::{Deserialize, Serialize};

/// Name of the cluster that hosts and VMs are in which were put into no other. It is as old as the pool, and its profile is the
/// pool's.
pub const DEFAULT_CLUSTER: &str = "default";

/// A cluster that an operator made. Who is in it is said by its hosts and VMs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// Index of the entry that created it.
    pub id: ClusterId,
    /// Unique among clusters.
    pub name: String,
    /// What guests see in it whose VM names no profile of its own; each of its hosts supports it.
    pub cpu_profile: CpuProfile,
}
