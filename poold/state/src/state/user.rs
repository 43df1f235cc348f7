//! Who may use the API.

use proto::TokenId;
use serde::{Deserialize, Serialize};

/// The user that a pool is founded with; it needs no record until somebody changes it.
pub const FOUNDER: &str = "admin";

/// A user, known by the key of a client certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// Unique among users.
    pub name: String,
    /// What it may do; none: it was deleted, and what was signed for it is void.
    pub role: Option<Role>,
    /// blake3 of the SubjectPublicKeyInfo of its key; none: the key that the pool was founded with.
    pub key_hash: Option<[u8; 32]>,
    /// Unix time of its creation.
    pub created_ms: u64,
}

/// A secret with which a program acts for a user, without a certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessToken {
    /// Index of the entry that created it.
    pub id: TokenId,
    /// The user.
    pub user: String,
    /// What it may do, at most as much as its user at that time.
    pub role: Role,
    /// blake3 of the secret; the secret itself is stored nowhere.
    pub secret_hash: [u8; 32],
    /// Unix time of its creation.
    pub created_ms: u64,
    /// Unix time after which it is void.
    pub expires_ms: u64,
}

/// What a user may do; each role may do what the ones before it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Role {
    /// Look.
    Viewer,
    /// Work with VMs, volumes and hosts in service.
    Operator,
    /// Change the pool itself: members, users, backup.
    Admin,
}

impl Role {
    /// All roles, weakest first.
    pub const ALL: [Self; 3] = [Self::Viewer, Self::Operator, Self::Admin];

    /// The word that operators see and write.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }
}
