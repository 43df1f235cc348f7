//! The replicated state of the pool. Each file holds one kind of object as plain data.
//!
//! - [`table`], [`event`], [`request`]: collections that are cheap to clone.
//! - [`view`]: what follows from the data (a VM's state, reserved memory, who may run what).
//! - [`resolve`]: from what an operator typed to an object.

pub mod audit;
pub mod cloning;
pub mod cluster;
pub mod event;
pub mod group;
pub mod host;
pub mod image;
mod index;
pub mod migration;
pub mod network;
pub mod record;
pub mod request;
pub mod resolve;
pub mod scrub;
pub mod service;
pub mod snapshot;
pub mod table;
pub mod task;
pub mod user;
pub mod view;
pub mod vm;
pub mod volume;

pub use audit::{AuditLog, AuditRecord};
pub use cloning::{ClonedDisk, DiskCloning, VmCloning};
pub use cluster::{Cluster, DEFAULT_CLUSTER};
pub use event::{Event, EventKind, EventLog};
pub use group::{Group, GroupRule, GroupStrength};
pub use host::{FIRST_HOST, Host, HostDuty, HostState, StoreSpace, Token, TokenState, ZONE_LABEL};
pub use image::{ContentHash, Image, ParseContentHashError};
pub use index::Index;
pub use migration::{
    HandedVolume, Migration, MigrationOptions, MigrationOutcome, MigrationPhase, MigrationPolicy, MoveCause,
    MoveDirection, TargetChoice, TargetEndpoint,
};
pub use network::{Network, NetworkAddressing, NetworkLink, Nic};
pub use proto::{AttachmentSecret, CertificateFingerprint};
pub use record::{BlackoutParts, MigrationRecord, PageCounts, RoundRecord};
pub use request::{Answer, RequestTable};
pub use scrub::{Scrub, ScrubCounts, ScrubRecord};
pub use service::{Loan, LoanKey, LoanPurpose, NbdExport, ServiceWanted, VolumeService};
pub use snapshot::{Position, Rewriting, Snapshot, SnapshotState, VolumeWork};
pub use table::Table;
pub use task::{Copies, RewriteKind, Task, TaskKind, TaskState};
pub use user::{AccessToken, FOUNDER, Role, User};
pub use vm::{Desired, HaPolicy, Intent, StartCause, StopMode, Vm, VmSpec, VmState};
pub use volume::{EpochStart, Holder, IsrMember, Volume, VolumeLimits, VolumeOwner};

use crate::form::is_default;
use crate::timing::Timing;
use proto::{
    ClusterId, CpuProfile, GroupId, HostId, ImageId, MigrationId, NetworkId, SnapshotId, TaskId, TokenId,
    VmId, VolumeId,
};
use serde::{Deserialize, Serialize};

/// Everything that the hosts of a pool agree on. Cloning costs a few reference counts.
///
/// Fields are public to be read; only [`apply`](PoolState::apply) changes a state that is replicated.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct PoolState {
    /// Identity and settings.
    pub settings: Settings,
    /// Index of the last entry seen, rejected ones included.
    pub revision: u64,
    /// Hosts, removed ones included.
    pub hosts: Table<HostId, Host>,
    /// Join tokens.
    pub tokens: Table<TokenId, Token>,
    /// VMs.
    pub vms: Table<VmId, Vm>,
    /// Volumes.
    pub volumes: Table<VolumeId, Volume>,
    /// Snapshots of volumes.
    #[serde(default, skip_serializing_if = "is_default")]
    pub snapshots: Table<SnapshotId, Snapshot>,
    /// VMs that are being copied, by their tasks.
    #[serde(default, skip_serializing_if = "is_default")]
    pub clonings: Table<TaskId, VmCloning>,
    /// Images.
    pub images: Table<ImageId, Image>,
    /// Tasks, the newest ended ones included.
    pub tasks: Table<TaskId, Task>,
    /// Migrations, the newest ended ones included.
    pub migrations: Table<MigrationId, Migration>,
    /// Clusters besides the default one.
    #[serde(default, skip_serializing_if = "is_default")]
    pub clusters: Table<ClusterId, Cluster>,
    /// Rules about where VMs run.
    pub groups: Table<GroupId, Group>,
    /// Networks.
    pub networks: Table<NetworkId, Network>,
    /// Users by name, deleted ones included.
    pub users: Table<String, User>,
    /// Access tokens of users.
    pub access_tokens: Table<TokenId, AccessToken>,
    /// What users changed lately.
    pub audit: AuditLog,
    /// What happened lately.
    pub events: EventLog,
    /// What was answered lately.
    pub requests: RequestTable,
    /// What the leader must look at; follows from the rest.
    #[serde(skip)]
    pub index: Index,
}

/// Identity and settings of the pool.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Settings {
    /// Random id; empty before the pool was founded.
    pub pool_id: String,
    /// Name.
    pub name: String,
    /// Timings.
    pub timing: Timing,
    /// Certificate of the pool's CA, which signs.
    pub ca_cert_pem: String,
    /// Its key.
    pub ca_key_pem: String,
    /// The CA before it, while it is being replaced.
    pub old_ca: Option<OldCa>,
    /// Feature level of all daemons.
    pub feature_level: u32,
    /// Recovery is halted until an operator permits it or the hosts return.
    pub ha_braked: bool,
    /// An operator has switched recovery off.
    pub ha_disarmed: bool,
    /// Replicas of a volume whose creator names no number, if the pool has as many hosts.
    pub replicas_default: u32,
    /// vCPUs that a logical CPU is counted for.
    pub cpu_overcommit: u32,
    /// Which features guests see whose VM names no profile of its own.
    pub cpu_profile: CpuProfile,
    /// A volume is scrubbed this long after its last scrub; 0: never.
    pub scrub_interval_ms: u64,
    /// Bytes per second that this reads of each replica.
    pub scrub_bytes_per_s: u64,
}

/// A CA that is trusted but signs no more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OldCa {
    /// Its certificate.
    pub cert_pem: String,
    /// The present CA's certificate signed by the old one, for those who trust only that.
    pub cross_pem: String,
}

impl std::fmt::Debug for Settings {
    /// Leaves the CA's key out, so that it can't reach a log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Settings")
            .field("pool_id", &self.pool_id)
            .field("name", &self.name)
            .field("timing", &self.timing)
            .field("feature_level", &self.feature_level)
            .field("ha_braked", &self.ha_braked)
            .finish_non_exhaustive()
    }
}

impl Settings {
    /// Certificates of all CAs that are trusted, the one that signs first.
    #[must_use]
    pub fn trusted_pem(&self) -> String {
        let old = self.old_ca.as_ref().map_or("", |old| old.cert_pem.as_str());
        format!("{}\n{old}", self.ca_cert_pem.trim_end())
    }

    /// By this a certificate's CA is named in reports.
    #[must_use]
    pub fn ca_hash(&self) -> [u8; 32] {
        *blake3::hash(self.ca_cert_pem.as_bytes()).as_bytes()
    }

    /// Whether the pool was founded.
    #[must_use]
    pub fn is_initialised(&self) -> bool {
        !self.pool_id.is_empty()
    }
}
