//! The metrics as text.

use super::volumes;
use pool_state::PoolState;
use pool_state::state::{Host, HostDuty, HostState, TaskState, VmState};
use proto::{HostId, v1::AgentFacts};
use std::fmt::Write as _;
use std::sync::Arc;

/// What the metrics are made from.
pub struct Observation {
    pub state: Arc<PoolState>,
    pub host: HostId,
    pub leads: bool,
    pub has_leader: bool,
    pub voters: usize,
    pub term: u64,
    pub vm_processes: usize,
    pub resident_bytes: u64,
    /// What this host knows of volumes.
    pub facts: AgentFacts,
    /// Clients over NBD here, and connections that were refused.
    pub nbd: (u64, u64),
}

/// Metrics with their samples.
#[derive(Default)]
pub(super) struct Page(String);

impl Page {
    #[cfg(test)]
    pub(super) fn into_text(self) -> String {
        self.0
    }

    pub(super) fn metric(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string can't fail.
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    pub(super) fn sample(&mut self, name: &str, labels: &str, value: u64) {
        let _ = writeln!(self.0, "{name}{labels} {value}");
    }

    pub(super) fn gauge(&mut self, name: &str, help: &str, value: u64) {
        self.metric(name, "gauge", help);
        self.sample(name, "", value);
    }
}

fn count(items: impl Iterator) -> u64 {
    items.count() as u64
}

/// All metrics.
pub fn render(seen: &Observation) -> String {
    let mut page = Page::default();
    daemon(&mut page, seen);
    hosts(&mut page, &seen.state);
    objects(&mut page, &seen.state);
    work(&mut page, &seen.state);
    volumes::render(&mut page, &seen.state, &seen.facts, seen.nbd);
    page.0
}

fn daemon(page: &mut Page, seen: &Observation) {
    page.gauge("pool_raft_is_leader", "Whether this host leads.", seen.leads.into());
    page.gauge("pool_raft_has_leader", "Whether this host knows a leader.", seen.has_leader.into());
    page.gauge("pool_raft_term", "Raft term at this host.", seen.term);
    page.gauge("pool_raft_voters", "Voters known at this host.", seen.voters as u64);
    page.gauge("pool_revision", "Last log entry applied at this host.", seen.state.revision);
    page.gauge("pool_host_vm_processes", "VM processes at this host.", seen.vm_processes as u64);
    page.gauge("pool_daemon_resident_bytes", "Memory of this daemon.", seen.resident_bytes);
    let here = seen.state.vms_on(seen.host);
    page.gauge("pool_host_vms_placed", "VMs that the pool has placed at this host.", count(here));
}

fn hosts(page: &mut Page, state: &PoolState) {
    let name = "pool_hosts";
    page.metric(name, "gauge", "Members by state.");
    for word in [HostState::Joining, HostState::Up, HostState::Lost] {
        let value = count(state.members().filter(|host| host.state == word));
        page.sample(name, &format!("{{state=\"{word}\"}}"), value);
    }
    let idle = |host: &&Host| host.duty != HostDuty::Active;
    page.gauge("pool_hosts_out_of_service", "Members that take no VMs.", count(state.members().filter(idle)));
    let reserved = state.reserved();
    let of = |host: &Host| reserved.get(&host.id).copied().unwrap_or_default();
    let labels = |host: &Host| format!("{{host=\"{}\"}}", host.name);
    page.metric("pool_host_memory_bytes", "gauge", "Memory that VMs may use, by host.");
    for host in state.members() {
        page.sample("pool_host_memory_bytes", &labels(host), host.vm_memory.0);
    }
    page.metric("pool_host_memory_reserved_bytes", "gauge", "Memory that VMs have reserved, by host.");
    for host in state.members() {
        page.sample("pool_host_memory_reserved_bytes", &labels(host), of(host).memory.0);
    }
    page.metric("pool_host_vcpus_reserved", "gauge", "vCPUs of the VMs, by host.");
    for host in state.members() {
        page.sample("pool_host_vcpus_reserved", &labels(host), of(host).vcpus);
    }
    page.gauge("pool_ha_braked", "Whether recovery is halted by the brake.", state.settings.ha_braked.into());
    page.gauge("pool_ha_disarmed", "Whether recovery is switched off.", state.settings.ha_disarmed.into());
}

fn objects(page: &mut Page, state: &PoolState) {
    let name = "pool_vms";
    page.metric(name, "gauge", "VMs by state.");
    let words = [
        VmState::Starting,
        VmState::Running,
        VmState::Stopping,
        VmState::Stopped,
        VmState::Paused,
        VmState::Migrating,
        VmState::Recovering,
        VmState::Failed,
    ];
    for word in words {
        let value = count(state.vms.values().filter(|vm| state.vm_state(vm) == word));
        page.sample(name, &format!("{{state=\"{word}\"}}"), value);
    }
    page.gauge("pool_volumes", "Volumes.", state.volumes.len() as u64);
    let degraded = state.volumes.values().filter(|volume| volume.isr.len() < volume.replicas.len());
    page.gauge("pool_volumes_degraded", "Volumes with a replica that is not in sync.", count(degraded));
    let stalled = state.volumes.values().filter(|volume| volume.isr.len() < volume.min_isr());
    page.gauge(
        "pool_volumes_below_min",
        "Volumes with fewer in-sync replicas than writes need.",
        count(stalled),
    );
    page.gauge("pool_images", "Images.", state.images.len() as u64);
}

fn work(page: &mut Page, state: &PoolState) {
    let name = "pool_tasks";
    page.metric(name, "gauge", "Tasks that the pool remembers, by state.");
    let words = ["running", "done", "failed", "cancelled"];
    for word in words {
        let value = count(state.tasks.values().filter(|task| task.state.as_str() == word));
        page.sample(name, &format!("{{state=\"{word}\"}}"), value);
    }
    let late = state.tasks.values().filter(|task| matches!(task.state, TaskState::Failed { .. }));
    page.gauge("pool_tasks_failed", "Tasks that failed and are still remembered.", count(late));
    let (queued, moving): (Vec<_>, Vec<_>) = state.running_migrations().partition(|it| it.is_queued());
    page.gauge("pool_migrations_running", "Moves under way.", count(moving.iter()));
    page.gauge("pool_migrations_queued", "Moves that wait for others to end.", count(queued.iter()));
    let records = || state.migrations.values().filter_map(|migration| migration.record.as_ref());
    let sent = records().map(|record| record.bytes_sent).sum();
    page.gauge("pool_migration_sent_bytes", "Bytes of the moves that the pool remembers.", sent);
    let worst = records().map(|record| record.blackout_ms).fold(0.0, f64::max);
    // Whole microseconds are finer than the measurement.
    page.gauge(
        "pool_migration_blackout_max_us",
        "Longest blackout of the remembered moves.",
        (worst * 1000.0) as u64,
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const DOCUMENTED: &str = include_str!("../../../docs/metrics.md");

    fn page() -> String {
        render(&Observation {
            state: Arc::new(PoolState::default()),
            host: HostId(1),
            leads: true,
            has_leader: true,
            voters: 1,
            term: 2,
            vm_processes: 0,
            resident_bytes: 4096,
            facts: AgentFacts::default(),
            nbd: (0, 0),
        })
    }

    #[test]
    fn every_metric_is_documented_and_every_documented_one_exists() {
        let page = page();
        let metrics: BTreeSet<&str> =
            page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
        let rows = DOCUMENTED.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
        assert_eq!(metrics, rows.collect::<BTreeSet<_>>());
    }

    #[test]
    fn each_sample_follows_its_type_and_has_a_number() {
        for line in page().lines().filter(|line| !line.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(name.starts_with("pool_") && value.parse::<u64>().is_ok(), "{line}");
        }
        assert!(page().contains("pool_raft_is_leader 1\n"));
    }
}
