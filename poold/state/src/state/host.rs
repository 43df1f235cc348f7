//! Hosts and the tokens with which they join.

use crate::form::is_default;
use crate::limits::STORE_REPLICAS_PERCENT_MAX;
use proto::{ByteCount, CertificateFingerprint, ClusterId, HostCpu, HostId, Incarnation, TaskId, TokenId};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt};

/// The first host's id, which is needed before there is a log that could give one. Log entry 1 creates no object.
pub const FIRST_HOST: HostId = HostId(1);

/// A member of the pool, or what is kept of a removed one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Index of the entry that let it join; also its Raft node id.
    pub id: HostId,
    /// Unique among hosts that are not removed.
    pub name: String,
    /// `IP:PORT`: TCP for gRPC, UDP for the block store.
    pub address: String,
    /// Memory that VMs may use.
    pub vm_memory: ByteCount,
    /// SubjectPublicKeyInfo in DER.
    pub public_key: Vec<u8>,
    /// CPU vendor and feature summary; VMs move only between equal ones.
    pub cpu_vendor: String,
    /// Highest feature level that its daemon supports.
    pub feature_level: u32,
    /// Version of its daemon; empty: not known yet.
    pub version: String,
    /// blake3 of the certificate (PEM) of the CA whose certificate it shows; none: not known yet.
    pub shows_ca: Option<[u8; 32]>,
    /// Life of its replica store; none before it served for the first time.
    pub incarnation: Option<Incarnation>,
    /// Certificate that its replica server shows.
    pub replica_fingerprint: Option<CertificateFingerprint>,
    /// Boot id of its kernel.
    pub boot_id: String,
    /// Membership and liveness.
    pub state: HostState,
    /// Unix time of the join.
    pub joined_ms: u64,
    /// Unix time at which it was declared lost, while it is.
    pub lost_ms: Option<u64>,
    /// What may come to it.
    pub duty: HostDuty,
    /// Words of the operator, such as `zone=a`.
    pub labels: BTreeMap<String, String>,
    /// Logical CPUs; 0: not known yet.
    pub cpus: u32,
    /// What its processor can be to guests; not known before it has served.
    pub cpu: HostCpu,
    /// Its cluster; none: the default one.
    #[serde(default, skip_serializing_if = "is_default")]
    pub cluster: Option<ClusterId>,
    /// Disk of its block store; not known before it has served.
    #[serde(default, skip_serializing_if = "is_default")]
    pub store: Option<StoreSpace>,
    /// Memory that its kernel keeps in huge pages.
    #[serde(default, skip_serializing_if = "is_default")]
    pub huge_memory: ByteCount,
}

/// The disk of a block store, as its host last told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreSpace {
    /// Used, by whomever.
    pub used: ByteCount,
    /// All of it.
    pub capacity: ByteCount,
}

impl StoreSpace {
    /// Used share.
    #[must_use]
    pub fn percent(&self) -> u64 {
        self.used.0.saturating_mul(100) / self.capacity.0.max(1)
    }

    /// Whether one more replica may come to it.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.percent() < STORE_REPLICAS_PERCENT_MAX
    }
}

/// The label that names a host's zone: what fails together.
pub const ZONE_LABEL: &str = "zone";

/// What an operator lets a host do.
///
/// ```text
///            cordon                 drain               the last VM has gone
///  Active ─────────▶ Cordoned ────────────▶ Draining ─────────────────────▶ Maintenance
///    ▲                   │ uncordon             │ cancelled                        │ restore
///    └───────────────────┴──────────────────────┴──────────────────────────────────┘
/// ```
/// A drain that fails ends in `Cordoned`. A host with any duty votes and keeps its replicas, unless it is to leave the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum HostDuty {
    /// VMs and replicas come to it.
    #[default]
    Active,
    /// No VM comes to it.
    Cordoned,
    /// Its VMs are being moved away.
    Draining {
        /// By this task.
        task: TaskId,
    },
    /// It has no VM and gets neither VMs nor replicas.
    Maintenance,
}

impl HostDuty {
    /// The word that operators see.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Cordoned => "cordoned",
            Self::Draining { .. } => "draining",
            Self::Maintenance => "maintenance",
        }
    }
}

/// `Joining → Up ⇄ Lost`, and from each of them `→ Removed`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostState {
    /// Has its certificate but has not served yet.
    Joining,
    /// Renews its lease.
    Up,
    /// Declared lost by the leader: nothing may run there.
    Lost,
    /// No member any more; its certificate is void.
    Removed,
}

impl HostState {
    /// The word that operators see.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Joining => "joining",
            Self::Up => "up",
            Self::Lost => "lost",
            Self::Removed => "removed",
        }
    }
}

impl fmt::Display for HostState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Host {
    /// Whether VMs may run there.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.state == HostState::Up
    }

    /// Whether VMs may come to it.
    #[must_use]
    pub fn takes_vms(&self) -> bool {
        self.is_up() && self.duty == HostDuty::Active
    }

    /// Whether it may get a replica that it does not have, if its disk has room.
    #[must_use]
    pub fn may_have_replicas(&self) -> bool {
        let stays = matches!(self.duty, HostDuty::Active | HostDuty::Cordoned);
        self.is_up() && self.incarnation.is_some() && stays
    }

    /// Whether its disk has room for one more replica; one that nothing is known of does.
    #[must_use]
    pub fn has_store_room(&self) -> bool {
        self.store.is_none_or(|store| store.has_room())
    }

    /// Whether it may get a replica that it does not have.
    #[must_use]
    pub fn takes_replicas(&self) -> bool {
        self.may_have_replicas() && self.has_store_room()
    }

    /// Its zone; hosts without one are in a common zone of their own.
    #[must_use]
    pub fn zone(&self) -> &str {
        self.labels.get(ZONE_LABEL).map_or("", String::as_str)
    }

    /// The state as operators see it: what they have asked of a host that is up comes first.
    #[must_use]
    pub fn state_word(&self) -> &'static str {
        match (self.state, self.duty) {
            (HostState::Up, HostDuty::Active) => self.state.as_str(),
            (HostState::Up, duty) => duty.as_str(),
            (state, _) => state.as_str(),
        }
    }

    /// Whether it is still a member.
    #[must_use]
    pub fn is_member(&self) -> bool {
        self.state != HostState::Removed
    }
}

/// A single-use permission to join, or to come with another key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// Index of the entry that created it.
    pub id: TokenId,
    /// blake3 of the secret; the secret itself is stored nowhere.
    pub secret_hash: [u8; 32],
    /// Unix time after which it admits nobody new.
    pub expires_ms: u64,
    /// Whether it was used or revoked.
    pub state: TokenState,
    /// The member that may show another key with it; none: it admits a new host.
    #[serde(default, skip_serializing_if = "is_default")]
    pub rekeys: Option<HostId>,
}

/// `Unused → Used | Revoked`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TokenState {
    /// Admits the first host that shows the secret.
    Unused,
    /// Bound to this host, and for it still good: a join that was interrupted repeats.
    Used {
        /// The host that it admitted.
        host: HostId,
    },
    /// Withdrawn by an operator.
    Revoked,
}

impl Token {
    /// The word that operators see.
    #[must_use]
    pub fn state_at(&self, now_ms: u64) -> &'static str {
        match self.state {
            TokenState::Used { .. } => "used",
            TokenState::Revoked => "revoked",
            TokenState::Unused if now_ms >= self.expires_ms => "expired",
            TokenState::Unused => "unused",
        }
    }
}
