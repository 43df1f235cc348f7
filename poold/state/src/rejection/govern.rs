//! Refusals of what governs the pool: levels, authority, access tokens.

use super::RejectionClass;
use serde::{Deserialize, Serialize};

/// Why a change of what governs the pool was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum GovernRejection {
    /// A daemon of the pool might be too old for it.
    #[error("this needs feature level {needed}, and the pool is at {present}")]
    LevelTooLow {
        /// What it needs.
        needed: u32,
        /// The pool's.
        present: u32,
    },
    /// A member does not support the level.
    #[error("host {host} supports feature level {supported} at most, not {level}")]
    LevelUnsupported {
        /// The host.
        host: String,
        /// What it supports.
        supported: u32,
        /// What was wanted.
        level: u32,
    },
    /// Levels only rise.
    #[error("the pool is at feature level {present} already")]
    LevelReached {
        /// The pool's.
        present: u32,
    },
    /// One replacement at a time.
    #[error("the certificate authority is being replaced already")]
    CaRotationRuns,
    /// There is nothing to end.
    #[error("the certificate authority is not being replaced")]
    NoCaRotation,
    /// A member would be locked out.
    #[error("host {host} still shows a certificate of the old authority")]
    OldCertificate {
        /// The host.
        host: String,
    },
    /// A token can't do more than its user.
    #[error("user {user} has the role {role}, so its token can't have more")]
    RoleTooHigh {
        /// The user.
        user: String,
        /// Its role.
        role: String,
    },
    /// A token for another key admits no new host.
    #[error("this token is for another key of host {host}, and for nothing else")]
    TokenRekeys {
        /// The host.
        host: String,
    },
    /// A token for a new host replaces no key.
    #[error("this token is for a new host, not for another key")]
    TokenAdmits,
    /// One key is one host.
    #[error("this key is or was that of host {host}")]
    KeyInUse {
        /// The host.
        host: String,
    },
    /// Somebody was told no: what would be possible now must not be done behind his back.
    #[error("request `{request_id}` was refused before, and stays refused")]
    RefusedBefore {
        /// The id.
        request_id: String,
    },
}

impl GovernRejection {
    /// Stable upper-case code.
    #[must_use]
    pub fn reason_code(&self) -> &'static str {
        match self {
            Self::LevelTooLow { .. } => "LEVEL_TOO_LOW",
            Self::LevelUnsupported { .. } => "LEVEL_UNSUPPORTED",
            Self::LevelReached { .. } => "LEVEL_REACHED",
            Self::CaRotationRuns => "CA_ROTATION_RUNS",
            Self::NoCaRotation => "NO_CA_ROTATION",
            Self::OldCertificate { .. } => "OLD_CERTIFICATE",
            Self::RoleTooHigh { .. } => "ROLE_TOO_HIGH",
            Self::TokenRekeys { .. } => "TOKEN_FOR_KEY",
            Self::TokenAdmits => "TOKEN_FOR_NEW_HOST",
            Self::KeyInUse { .. } => "KEY_IN_USE",
            Self::RefusedBefore { .. } => "REQUEST_REFUSED_BEFORE",
        }
    }

    /// What kind of refusal it is.
    #[must_use]
    pub fn class(&self) -> RejectionClass {
        match self {
            Self::RoleTooHigh { .. } => RejectionClass::Invalid,
            Self::LevelReached { .. } | Self::RefusedBefore { .. } => RejectionClass::Conflict,
            Self::TokenRekeys { .. } | Self::TokenAdmits => RejectionClass::Denied,
            _ => RejectionClass::Precondition,
        }
    }

    /// The object that it is about; empty when it is about the pool.
    #[must_use]
    pub fn object(&self) -> String {
        match self {
            Self::LevelUnsupported { host, .. }
            | Self::OldCertificate { host }
            | Self::TokenRekeys { host }
            | Self::KeyInUse { host } => format!("host {host}"),
            Self::RoleTooHigh { user, .. } => format!("user {user}"),
            Self::RefusedBefore { request_id } => format!("request {request_id}"),
            _ => String::new(),
        }
    }

    /// What to do next: one sentence or a command.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::LevelTooLow { .. } => {
                "upgrade the daemons of all hosts: `poolctl upgrade status` shows which are behind".into()
            }
            Self::LevelUnsupported { host, .. } => format!("upgrade the daemon of {host}"),
            Self::LevelReached { .. } => "see `poolctl upgrade status`".into(),
            Self::CaRotationRuns => "end it first: `poolctl pool ca finish`".into(),
            Self::NoCaRotation => "begin one with `poolctl pool ca rotate`".into(),
            Self::OldCertificate { host } => {
                format!("start poold on {host}, or take it out with `poolctl host forget {host}`")
            }
            Self::RoleTooHigh { role, .. } => format!("choose {role} or less"),
            Self::TokenRekeys { host } => {
                format!("run `poold rekey` at {host}, or make another token with `poolctl host token create`")
            }
            Self::TokenAdmits => "make a token with `poolctl host rekey HOST`".into(),
            Self::KeyInUse { .. } => "let `poold rekey` make a new one".into(),
            Self::RefusedBefore { .. } => "give the command again: it is another request then".into(),
        }
    }
}
