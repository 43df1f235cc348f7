//! Versions and access tokens.

use super::utc;
use crate::output::Object;
use proto::{TokenId, v1};
use serde::Serialize;

/// The version of a host's daemon.
#[derive(Debug, Serialize)]
pub struct VersionView {
    host: String,
    version: String,
    feature_level: u32,
    state: String,
}

impl From<v1::Host> for VersionView {
    fn from(host: v1::Host) -> Self {
        let v1::Host { name: host, version, feature_level, state, .. } = host;
        Self { host, version, feature_level, state }
    }
}

impl Object for VersionView {
    const KIND: &'static str = "HostVersion";
    const COLUMNS: &'static [&'static str] = &["HOST", "STATE", "VERSION", "SUPPORTS LEVEL"];
    const WIDE: &'static [&'static str] = &[];

    fn name(&self) -> String {
        self.host.clone()
    }

    fn cells(&self) -> Vec<String> {
        let version = if self.version.is_empty() { "unknown" } else { &self.version };
        vec![self.host.clone(), self.state.clone(), version.to_owned(), self.feature_level.to_string()]
    }
}

/// How far an upgrade has come.
#[derive(Debug, Serialize)]
pub struct UpgradeView {
    pool: String,
    feature_level: u32,
    feature_level_supported: u32,
    hosts: Vec<VersionView>,
}

impl UpgradeView {
    /// Of a pool and its hosts.
    #[must_use]
    pub fn new(pool: &v1::Pool, hosts: Vec<VersionView>) -> Self {
        Self {
            pool: pool.name.clone(),
            feature_level: pool.feature_level,
            feature_level_supported: pool.feature_level_supported,
            hosts,
        }
    }
}

impl Object for UpgradeView {
    const KIND: &'static str = "Upgrade";
    const COLUMNS: &'static [&'static str] = &["POOL", "LEVEL", "SUPPORTED"];
    const WIDE: &'static [&'static str] = &[];

    fn name(&self) -> String {
        self.pool.clone()
    }

    fn cells(&self) -> Vec<String> {
        let (level, supported) = (self.feature_level, self.feature_level_supported);
        vec![self.pool.clone(), level.to_string(), supported.to_string()]
    }
}

/// An access token.
#[derive(Debug, Serialize)]
pub struct AccessTokenView {
    id: String,
    user: String,
    role: String,
    state: String,
    created_ms: u64,
    expires_ms: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    token: String,
}

impl AccessTokenView {
    /// Its secret; empty in a list.
    #[must_use]
    pub fn token(&self) -> &str {
        &self.token
    }

    /// When it becomes void.
    #[must_use]
    pub fn expires(&self) -> String {
        utc(self.expires_ms)
    }
}

impl From<v1::AccessToken> for AccessTokenView {
    fn from(token: v1::AccessToken) -> Self {
        Self {
            id: TokenId(token.id).to_string(),
            user: token.user,
            role: token.role,
            state: token.state,
            created_ms: token.created_ms,
            expires_ms: token.expires_ms,
            token: token.token,
        }
    }
}

impl Object for AccessTokenView {
    const KIND: &'static str = "AccessToken";
    const COLUMNS: &'static [&'static str] = &["ID", "USER", "ROLE", "STATE", "EXPIRES"];
    const WIDE: &'static [&'static str] = &["CREATED"];

    fn name(&self) -> String {
        self.id.clone()
    }

    fn cells(&self) -> Vec<String> {
        vec![
            self.id.clone(),
            self.user.clone(),
            self.role.clone(),
            self.state.clone(),
            self.expires(),
            utc(self.created_ms),
        ]
    }
}
