//! Groups, clusters, users, audit records, and plans.

use super::{utc, words};
use crate::output::Object;
use proto::{ClusterId, GroupId, v1};
use serde::Serialize;

/// A rule about where VMs run.
#[derive(Debug, Serialize)]
pub struct GroupView {
    id: String,
    name: String,
    rule: String,
    strength: String,
    vms: Vec<String>,
    hosts: Vec<String>,
    revision: u64,
}

impl From<v1::Group> for GroupView {
    fn from(group: v1::Group) -> Self {
        Self {
            id: GroupId(group.id).to_string(),
            name: group.name,
            rule: group.rule,
            strength: group.strength,
            vms: group.vms,
            hosts: group.hosts,
            revision: group.revision,
        }
    }
}

impl Object for GroupView {
    const KIND: &'static str = "Group";
    const COLUMNS: &'static [&'static str] = &["NAME", "RULE", "STRENGTH", "VMS", "HOSTS"];
    const WIDE: &'static [&'static str] = &["ID"];

    fn name(&self) -> String {
        self.name.clone()
    }

    fn cells(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            self.rule.clone(),
            self.strength.clone(),
            words(&self.vms),
            words(&self.hosts),
            self.id.clone(),
        ]
    }
}

/// Hosts with one CPU profile.
#[derive(Debug, Serialize)]
pub struct ClusterView {
    /// Empty: the default one.
    id: String,
    name: String,
    cpu_profile: String,
    hosts: Vec<String>,
    vms: Vec<String>,
    revision: u64,
}

impl From<v1::Cluster> for ClusterView {
    fn from(cluster: v1::Cluster) -> Self {
        let v1::Cluster { id, name, cpu_profile, hosts, vms, revision } = cluster;
        let id = if id == 0 { String::new() } else { ClusterId(id).to_string() };
        Self { id, name, cpu_profile, hosts, vms, revision }
    }
}

impl Object for ClusterView {
    const KIND: &'static str = "Cluster";
    const COLUMNS: &'static [&'static str] = &["NAME", "CPU PROFILE", "HOSTS", "VMS"];
    const WIDE: &'static [&'static str] = &["ID"];

    fn name(&self) -> String {
        self.name.clone()
    }

    fn cells(&self) -> Vec<String> {
        let vms = self.vms.len().to_string();
        vec![self.name.clone(), self.cpu_profile.clone(), words(&self.hosts), vms, self.id.clone()]
    }
}

/// Who may use the pool.
#[derive(Debug, Serialize)]
pub struct UserView {
    name: String,
    role: String,
    created_ms: u64,
    tokens: u32,
}

impl From<v1::User> for UserView {
    fn from(user: v1::User) -> Self {
        Self { name: user.name, role: user.role, created_ms: user.created_ms, tokens: user.tokens }
    }
}

impl Object for UserView {
    const KIND: &'static str = "User";
    const COLUMNS: &'static [&'static str] = &["NAME", "ROLE", "CREATED"];
    const WIDE: &'static [&'static str] = &["TOKENS"];

    fn name(&self) -> String {
        self.name.clone()
    }

    fn cells(&self) -> Vec<String> {
        vec![self.name.clone(), self.role.clone(), utc(self.created_ms), self.tokens.to_string()]
    }
}

/// Who changed what.
#[derive(Debug, Serialize)]
pub struct AuditView {
    revision: u64,
    time_ms: u64,
    principal: String,
    action: String,
    object: String,
    request_id: String,
}

impl From<v1::AuditRecord> for AuditView {
    fn from(record: v1::AuditRecord) -> Self {
        Self {
            revision: record.revision,
            time_ms: record.time_ms,
            principal: record.principal,
            action: record.action,
            object: record.object,
            request_id: record.request_id,
        }
    }
}

impl Object for AuditView {
    const KIND: &'static str = "AuditRecord";
    const COLUMNS: &'static [&'static str] = &["TIME", "BY", "ACTION", "OBJECT"];
    const WIDE: &'static [&'static str] = &["REVISION", "REQUEST"];

    fn name(&self) -> String {
        self.revision.to_string()
    }

    fn cells(&self) -> Vec<String> {
        vec![
            utc(self.time_ms),
            self.principal.clone(),
            self.action.clone(),
            self.object.clone(),
            self.revision.to_string(),
            self.request_id.clone(),
        ]
    }
}

/// A move of a balance plan.
#[derive(Debug, Serialize)]
pub struct PlannedMoveView {
    vm: String,
    source: String,
    target: String,
    reason: String,
}

impl From<v1::PlannedMove> for PlannedMoveView {
    fn from(next: v1::PlannedMove) -> Self {
        Self { vm: next.vm, source: next.source, target: next.target, reason: next.reason }
    }
}

impl Object for PlannedMoveView {
    const KIND: &'static str = "PlannedMove";
    const COLUMNS: &'static [&'static str] = &["VM", "FROM", "TO", "REASON"];
    const WIDE: &'static [&'static str] = &[];

    fn name(&self) -> String {
        self.vm.clone()
    }

    fn cells(&self) -> Vec<String> {
        vec![self.vm.clone(), self.source.clone(), self.target.clone(), self.reason.clone()]
    }
}

/// What failing hosts would mean.
#[derive(Debug, Serialize)]
pub struct HaPlanView {
    fail: u32,
    worst: Vec<String>,
    vms: u32,
    unplaced: Vec<String>,
    revision: u64,
}

impl HaPlanView {
    /// The answer for this many hosts.
    #[must_use]
    pub fn new(fail: u32, plan: v1::HaPlanResponse) -> Self {
        let v1::HaPlanResponse { vms, unplaced, worst, revision } = plan;
        Self { fail, worst, vms, unplaced, revision }
    }

    /// VMs that would find no place.
    #[must_use]
    pub fn unplaced(&self) -> &[String] {
        &self.unplaced
    }
}

impl Object for HaPlanView {
    const KIND: &'static str = "HaPlan";
    const COLUMNS: &'static [&'static str] = &["FAIL", "WORST CASE", "VMS TO RESTART", "WITHOUT A PLACE"];
    const WIDE: &'static [&'static str] = &[];

    fn name(&self) -> String {
        self.fail.to_string()
    }

    fn cells(&self) -> Vec<String> {
        let unplaced = if self.unplaced.is_empty() { "none".to_owned() } else { words(&self.unplaced) };
        vec![self.fail.to_string(), words(&self.worst), self.vms.to_string(), unplaced]
    }
}
