//! Hosts and the tokens with which they join.

use proto::{ByteCount, CertificateFingerprint, HostId, Incarnation, TokenId};
use serde::{Deserialize, Serialize};
use std::fmt;

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
    /// Feature level of its daemon.
    pub feature_level: u32,
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

    /// Whether it is still a member.
    #[must_use]
    pub fn is_member(&self) -> bool {
        self.state != HostState::Removed
    }
}

/// A single-use permission to join.
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
