//! The record of a migration: one flat object, while it runs and after it has ended.

use super::{bytes, words};
use crate::output::Object;
use proto::{MigrationId, TaskId, v1};
use serde::Serialize;

/// A migration and what it did so far.
#[derive(Debug, Serialize)]
pub struct MigrationView {
    id: String,
    vm: String,
    source: String,
    target: String,
    outcome: String,
    phase: String,
    waits_for: String,
    error: String,
    policy: String,
    task: String,
    total_ms: f64,
    blackout_ms: f64,
    blackout_parts: BlackoutView,
    rounds: u32,
    bytes_sent: u64,
    pages: PagesView,
    memory_bytes: u64,
    memory_proved: bool,
    memory_hash: String,
    per_round: Vec<RoundView>,
    pages_remaining: u64,
    bytes_per_s: u64,
    dirty_bytes_per_s: u64,
    source_cpu_ms: f64,
    target_cpu_ms: f64,
    blackout_expected_ms: f64,
    throttle_percent: u32,
    eta_ms: Option<f64>,
    eta_error_percent: u32,
    fault_mean_ms: f64,
    connections: u32,
    huge_pages: bool,
}

#[derive(Debug, Serialize)]
struct BlackoutView {
    pause: f64,
    drain: f64,
    last_pages: f64,
    state: f64,
    proof: f64,
    commit: f64,
    activate: f64,
    resume: f64,
}

#[derive(Debug, Serialize)]
struct PagesView {
    zero: u64,
    raw: u64,
    compressed: u64,
    delta: u64,
    reference: u64,
    faulted: u64,
}

#[derive(Debug, Serialize)]
struct RoundView {
    round: u32,
    bytes: u64,
    pages: PagesView,
    ms: f64,
    dirty_pages_after: u64,
}

impl From<v1::PageCounts> for PagesView {
    fn from(pages: v1::PageCounts) -> Self {
        let v1::PageCounts { zero, raw, compressed, delta, reference, faulted } = pages;
        Self { zero, raw, compressed, delta, reference, faulted }
    }
}

impl From<v1::BlackoutParts> for BlackoutView {
    fn from(parts: v1::BlackoutParts) -> Self {
        let v1::BlackoutParts { pause, drain, last_pages, state, proof, commit, activate, resume } = parts;
        Self { pause, drain, last_pages, state, proof, commit, activate, resume }
    }
}

impl From<v1::Migration> for MigrationView {
    fn from(migration: v1::Migration) -> Self {
        let record = migration.record.unwrap_or_default();
        let round = |round: v1::RoundRecord| RoundView {
            round: round.round,
            bytes: round.bytes,
            pages: round.pages.unwrap_or_default().into(),
            ms: round.ms,
            dirty_pages_after: round.dirty_pages_after,
        };
        Self {
            id: MigrationId(migration.id).to_string(),
            vm: migration.vm,
            source: migration.source,
            target: migration.target,
            outcome: migration.outcome,
            phase: migration.phase,
            waits_for: migration.waits_for,
            error: migration.error,
            policy: migration.policy,
            task: TaskId(migration.task).to_string(),
            total_ms: record.total_ms,
            blackout_ms: record.blackout_ms,
            blackout_parts: record.blackout_parts.unwrap_or_default().into(),
            rounds: record.rounds,
            bytes_sent: record.bytes_sent,
            pages: record.pages.unwrap_or_default().into(),
            memory_bytes: migration.memory_bytes,
            memory_proved: record.memory_proved,
            memory_hash: record.memory_hash,
            per_round: record.per_round.into_iter().map(round).collect(),
            pages_remaining: record.pages_remaining,
            bytes_per_s: record.bytes_per_s,
            dirty_bytes_per_s: record.dirty_bytes_per_s,
            source_cpu_ms: record.source_cpu_ms,
            target_cpu_ms: record.target_cpu_ms,
            blackout_expected_ms: record.blackout_expected_ms,
            throttle_percent: record.throttle_percent,
            eta_ms: record.eta_ms,
            eta_error_percent: record.eta_error_percent,
            fault_mean_ms: record.fault_mean_ms,
            connections: record.connections,
            huge_pages: record.huge_pages,
        }
    }
}

impl MigrationView {
    /// What happened, for people.
    #[must_use]
    pub fn sentence(&self) -> String {
        let Self { id, vm, source, target, .. } = self;
        match self.outcome.as_str() {
            "done" => format!(
                "{vm} moved from {source} to {target} in {:.0} ms: blackout {:.1} ms, {} sent in {} rounds{} ({id})",
                self.total_ms,
                self.blackout_ms,
                bytes(self.bytes_sent),
                self.rounds,
                if self.memory_proved { ", memory proved equal" } else { "" },
            ),
            "running" if self.phase == "queued" => {
                format!("{vm} waits to move from {source} to {target}: {} ({id})", self.waits_for)
            }
            "running" => format!("{vm} moves from {source} to {target}: {} ({id})", self.phase),
            outcome => format!("{vm} stayed at {source}: {outcome} ({id})"),
        }
    }
}

impl Object for MigrationView {
    const KIND: &'static str = "Migration";
    const COLUMNS: &'static [&'static str] =
        &["ID", "VM", "FROM", "TO", "OUTCOME", "PHASE", "TOTAL", "BLACKOUT", "SENT"];
    const WIDE: &'static [&'static str] =
        &["POLICY", "ROUNDS", "MEMORY", "PROVED", "TASK", "WAITS FOR", "ERROR"];

    fn name(&self) -> String {
        self.id.clone()
    }

    fn cells(&self) -> Vec<String> {
        vec![
            self.id.clone(),
            self.vm.clone(),
            self.source.clone(),
            self.target.clone(),
            self.outcome.clone(),
            self.phase.clone(),
            format!("{:.0} ms", self.total_ms),
            format!("{:.1} ms", self.blackout_ms),
            bytes(self.bytes_sent),
            self.policy.clone(),
            self.rounds.to_string(),
            bytes(self.memory_bytes),
            if self.memory_proved { "yes" } else { "no" }.to_owned(),
            self.task.clone(),
            self.waits_for.clone(),
            self.error.clone(),
        ]
    }
}

/// What a migration would do.
#[derive(Debug, Serialize)]
pub struct PlanView {
    vm: String,
    source: String,
    target: String,
    blockers: Vec<String>,
    waits_for: String,
    memory_bytes: u64,
    predicted_ms: f64,
    predicted_blackout_ms: f64,
    predicted_bytes: u64,
}

impl PlanView {
    /// Everything that forbids it.
    #[must_use]
    pub fn blockers(&self) -> &[String] {
        &self.blockers
    }
}

impl From<v1::MigrationPlan> for PlanView {
    fn from(plan: v1::MigrationPlan) -> Self {
        Self {
            vm: plan.vm,
            source: plan.source,
            target: plan.target,
            blockers: plan.blockers,
            waits_for: plan.waits_for,
            memory_bytes: plan.memory_bytes,
            predicted_ms: plan.predicted_ms,
            predicted_blackout_ms: plan.predicted_blackout_ms,
            predicted_bytes: plan.predicted_bytes,
        }
    }
}

impl Object for PlanView {
    const KIND: &'static str = "MigrationPlan";
    const COLUMNS: &'static [&'static str] =
        &["VM", "FROM", "TO", "BLOCKERS", "WAITS FOR", "TAKES", "BLACKOUT"];
    const WIDE: &'static [&'static str] = &["MEMORY", "SENDS"];

    fn name(&self) -> String {
        self.vm.clone()
    }

    fn cells(&self) -> Vec<String> {
        let blockers = if self.blockers.is_empty() { "none".to_owned() } else { words(&self.blockers) };
        let known = |text: String| if self.predicted_ms > 0.0 { text } else { "not known yet".to_owned() };
        vec![
            self.vm.clone(),
            self.source.clone(),
            self.target.clone(),
            blockers,
            if self.waits_for.is_empty() { "nothing".to_owned() } else { self.waits_for.clone() },
            known(format!("about {:.0} ms", self.predicted_ms)),
            known(format!("about {:.1} ms", self.predicted_blackout_ms)),
            bytes(self.memory_bytes),
            known(format!("about {}", bytes(self.predicted_bytes))),
        ]
    }
}
