//! Changes of what governs the pool: versions of its daemons, its settings, its certificate authority, tokens of its users.

use crate::state::Role;
use proto::{CpuProfile, HostId, TokenId};
use serde::{Deserialize, Serialize};

/// A change of what governs the pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Govern {
    /// Report: the version of a host's daemon.
    SetHostVersion {
        /// The host.
        host: HostId,
        /// Version of the program.
        version: String,
        /// The highest feature level that it supports.
        feature_level: u32,
    },
    /// The leader raises the pool's feature level: every member supports it.
    RaiseFeatureLevel {
        /// The new level.
        level: u32,
    },
    /// Changes settings of the pool.
    SetPool(PoolChange),
    /// Begins to replace the certificate authority: the new one signs from now on, the present one is still trusted.
    RotateCa(Box<NewCa>),
    /// Report: a host shows a certificate of this authority and trusts it.
    HostTrusts {
        /// The host.
        host: HostId,
        /// blake3 of the authority's certificate in PEM.
        ca: [u8; 32],
    },
    /// Ends the replacement: the old authority is trusted no more.
    FinishCaRotation,
    /// Makes an access token of a user. → `Outcome::Token`. A proposer that must be able to repeat its answer derives the
    /// secret from the request id.
    CreateAccessToken {
        /// Whose.
        user: String,
        /// What it may do, at most as much as its user.
        role: Role,
        /// blake3 of its secret.
        secret_hash: [u8; 32],
        /// Lifetime in milliseconds from the entry's time.
        ttl_ms: u64,
    },
    /// Makes an access token void.
    DeleteAccessToken {
        /// Which.
        token: TokenId,
    },
    /// Creates a token with which a member may come with another key. → `Outcome::Token`
    CreateKeyToken {
        /// The member.
        host: HostId,
        /// blake3 of the secret.
        secret_hash: [u8; 32],
        /// Lifetime in milliseconds from the entry's time.
        ttl_ms: u64,
    },
    /// Redeems it; again with the same key changes nothing. → `Outcome::Host`
    ReplaceHostKey {
        /// The member, which must be the token's.
        host: HostId,
        /// blake3 of the secret.
        secret_hash: [u8; 32],
        /// SubjectPublicKeyInfo in DER.
        public_key: Vec<u8>,
    },
    /// Whoever serves a request refuses it without an entry of its own, e.g. since a name means nothing: the entry's request id is
    /// refused from now on. An id whose request was done is refused as one that was used.
    RefuseRequest,
}

/// Settings to change; none leaves one as it is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PoolChange {
    /// Name of the pool.
    pub name: Option<String>,
    /// Replicas of a volume whose creator names no number.
    pub replicas_default: Option<u32>,
    /// vCPUs that a logical CPU is counted for.
    pub cpu_overcommit: Option<u32>,
    /// Which features guests see whose VM names no profile of its own; takes effect at their next boot.
    pub cpu_profile: Option<CpuProfile>,
    /// A volume is scrubbed this long after its last scrub; 0: never.
    pub scrub_interval_ms: Option<u64>,
    /// Bytes per second that this reads of each replica.
    pub scrub_bytes_per_s: Option<u64>,
}

/// A certificate authority that takes the present one's place.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewCa {
    /// Its certificate.
    pub cert_pem: String,
    /// Its key.
    pub key_pem: String,
    /// Its certificate once more, signed by the present authority.
    pub cross_pem: String,
}

impl std::fmt::Debug for NewCa {
    /// Leaves the key out, so that it can't reach a log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NewCa").field("cert_pem", &self.cert_pem).finish_non_exhaustive()
    }
}
