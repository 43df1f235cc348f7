//! Pool, hosts and join tokens.

use super::{bytes, utc, words};
use crate::output::Object;
use proto::{HostId, TokenId, v1};
use serde::Serialize;
use std::collections::BTreeMap;

/// The pool.
#[derive(Debug, Serialize)]
pub struct PoolView {
    id: String,
    name: String,
    leader: String,
    hosts: u32,
    voters: Vec<String>,
    revision: u64,
    ha_braked: bool,
    ca_fingerprint: String,
    ha_disarmed: bool,
    feature_level: u32,
    replicas_default: u32,
    cpu_overcommit: u32,
    ca_rotating: bool,
    ca_pending: Vec<String>,
    cpu_profile: String,
    /// 0: never.
    scrub_interval_ms: u64,
    scrub_bytes_per_s: u64,
}

impl From<v1::Pool> for PoolView {
    fn from(pool: v1::Pool) -> Self {
        Self {
            id: pool.id,
            name: pool.name,
            leader: pool.leader,
            hosts: pool.hosts,
            voters: pool.voters,
            revision: pool.revision,
            ha_braked: pool.ha_braked,
            ca_fingerprint: pool.ca_fingerprint,
            ha_disarmed: pool.ha_disarmed,
            feature_level: pool.feature_level,
            replicas_default: pool.replicas_default,
            cpu_overcommit: pool.cpu_overcommit,
            ca_rotating: pool.ca_rotating,
            ca_pending: pool.ca_pending,
            cpu_profile: pool.cpu_profile,
            scrub_interval_ms: pool.scrub_interval_ms,
            scrub_bytes_per_s: pool.scrub_bytes_per_s,
        }
    }
}

impl Object for PoolView {
    const KIND: &'static str = "Pool";
    const COLUMNS: &'static [&'static str] = &["NAME", "LEADER", "HOSTS", "VOTERS", "RECOVERY", "REVISION"];
    const WIDE: &'static [&'static str] =
        &["ID", "CA", "FEATURE LEVEL", "REPLICAS", "CPU OVERCOMMIT", "OLD CERTIFICATES", "CPU PROFILE"];

    fn name(&self) -> String {
        self.name.clone()
    }

    fn cells(&self) -> Vec<String> {
        let leader = if self.leader.is_empty() { "none (no quorum?)" } else { &self.leader };
        let recovery = match (self.ha_braked, self.ha_disarmed) {
            (true, _) => "halted; see `poolctl ha resume`",
            (false, true) => "off; see `poolctl ha arm`",
            (false, false) => "on",
        };
        vec![
            self.name.clone(),
            leader.to_owned(),
            self.hosts.to_string(),
            words(&self.voters),
            recovery.to_owned(),
            self.revision.to_string(),
            self.id.clone(),
            self.ca_fingerprint.clone(),
            self.feature_level.to_string(),
            self.replicas_default.to_string(),
            self.cpu_overcommit.to_string(),
            words(&self.ca_pending),
            self.cpu_profile.clone(),
        ]
    }
}

/// A host.
#[derive(Debug, Serialize)]
pub struct HostView {
    id: String,
    name: String,
    state: String,
    role: String,
    address: String,
    vm_memory_bytes: u64,
    vm_memory_reserved_bytes: u64,
    lease_age_ms: u64,
    vms: Vec<String>,
    // Ordered, so that equal hosts print equally.
    labels: BTreeMap<String, String>,
    duty: String,
    cpus: u32,
    vcpus_reserved: u32,
    version: String,
    feature_level: u32,
    store_used_bytes: u64,
    store_capacity_bytes: u64,
    cluster: String,
    huge_memory_bytes: u64,
    huge_memory_reserved_bytes: u64,
}

impl From<v1::Host> for HostView {
    fn from(host: v1::Host) -> Self {
        Self {
            id: HostId(host.id).to_string(),
            name: host.name,
            state: host.state,
            role: host.role,
            address: host.address,
            vm_memory_bytes: host.vm_memory_bytes,
            vm_memory_reserved_bytes: host.vm_memory_reserved_bytes,
            lease_age_ms: host.lease_age_ms,
            vms: host.vms,
            labels: host.labels.into_iter().collect(),
            duty: host.duty,
            cpus: host.cpus,
            vcpus_reserved: host.vcpus_reserved,
            version: host.version,
            feature_level: host.feature_level,
            store_used_bytes: host.store_used_bytes,
            store_capacity_bytes: host.store_capacity_bytes,
            cluster: host.cluster,
            huge_memory_bytes: host.huge_memory_bytes,
            huge_memory_reserved_bytes: host.huge_memory_reserved_bytes,
        }
    }
}

impl Object for HostView {
    const KIND: &'static str = "Host";
    const COLUMNS: &'static [&'static str] = &["NAME", "STATE", "ROLE", "ADDRESS", "VMS"];
    const WIDE: &'static [&'static str] = &[
        "ID",
        "VM MEMORY",
        "RESERVED",
        "CPUS",
        "VCPUS",
        "LABELS",
        "LEASE AGE",
        "VERSION",
        "STORE",
        "CLUSTER",
        "HUGE PAGES",
    ];

    fn name(&self) -> String {
        self.name.clone()
    }

    fn cells(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            self.state.clone(),
            self.role.clone(),
            self.address.clone(),
            words(&self.vms),
            self.id.clone(),
            bytes(self.vm_memory_bytes),
            bytes(self.vm_memory_reserved_bytes),
            self.cpus.to_string(),
            self.vcpus_reserved.to_string(),
            words(&self.labels.iter().map(|(label, value)| format!("{label}={value}")).collect::<Vec<_>>()),
            format!("{} ms", self.lease_age_ms),
            self.version.clone(),
            format!("{}/{}", bytes(self.store_used_bytes), bytes(self.store_capacity_bytes)),
            self.cluster.clone(),
            format!("{}/{}", bytes(self.huge_memory_reserved_bytes), bytes(self.huge_memory_bytes)),
        ]
    }
}

/// A join token.
#[derive(Debug, Serialize)]
pub struct TokenView {
    id: String,
    token: String,
    expires_ms: u64,
    state: String,
}

impl TokenView {
    /// The text for `poold join`; empty in a list.
    #[must_use]
    pub fn token(&self) -> &str {
        &self.token
    }

    /// When it becomes useless.
    #[must_use]
    pub fn expires(&self) -> String {
        utc(self.expires_ms)
    }
}

impl From<v1::JoinToken> for TokenView {
    fn from(token: v1::JoinToken) -> Self {
        let id = TokenId(token.id).to_string();
        Self { id, token: token.token, expires_ms: token.expires_ms, state: token.state }
    }
}

impl Object for TokenView {
    const KIND: &'static str = "JoinToken";
    const COLUMNS: &'static [&'static str] = &["ID", "STATE", "EXPIRES"];
    const WIDE: &'static [&'static str] = &[];

    fn name(&self) -> String {
        self.id.clone()
    }

    fn cells(&self) -> Vec<String> {
        vec![self.id.clone(), self.state.clone(), self.expires()]
    }
}
