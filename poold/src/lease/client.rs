//! Renews this host's lease and passes its deadline on to the VM processes.

use super::{LeaderHandle, boottime_ns};
use crate::{
    node::NodeContext,
    supervisor::{ProcessKey, ProcessView, Subject, Supervisor},
};
use pool_state::lease::{HostLease, HostLeaseCommand, HostLeaseEvent};
use pool_state::{PoolState, state::HaPolicy};
use proto::{
    HostId, Incarnation, VmId,
    v1::{ExtendLeaseRequest, HostStats, MachineStatus, RenewLeaseRequest},
};
use std::{collections::BTreeSet, time::Duration};
use tokio::sync::{mpsc, watch};

/// Renewals under way at the same time: a slow answer must not keep the next renewal from being sent.
const RENEWALS_MAX: usize = 4;

/// Handle of the client; clones share it.
#[derive(Clone)]
pub struct LeaseClient {
    /// End of this host's lease on CLOCK_BOOTTIME in nanoseconds; 0 before the first one.
    deadline_ns: watch::Sender<u64>,
}

impl Default for LeaseClient {
    fn default() -> Self {
        Self { deadline_ns: watch::Sender::new(0) }
    }
}

impl LeaseClient {
    /// Passes the present deadline on to one process, for one that has just been started.
    pub async fn pass_on(&self, supervisor: &Supervisor, key: ProcessKey) {
        let deadline_ns = *self.deadline_ns.borrow();
        if deadline_ns > boottime_ns() {
            extend(supervisor, key, deadline_ns, Placement::Unknown).await;
        }
    }
}

/// Which life of the host asks for the lease.
pub struct LeaseIdentity {
    /// Boot id of its kernel.
    pub boot_id: String,
    /// Life of its replica store.
    pub incarnation: Incarnation,
}

/// What a process is told of its placement together with a deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Placement {
    /// Read linearizably just now: still its own.
    Confirmed,
    /// Not read.
    Unknown,
}

/// Runs until the node stops.
pub async fn run_client(
    context: NodeContext,
    supervisor: Supervisor,
    leader: LeaderHandle,
    client: LeaseClient,
    identity: LeaseIdentity,
) {
    tokio::join!(
        renew_task(&context, &supervisor, &leader, &client, &identity),
        pass_task(&context, &supervisor, &client)
    );
}

async fn renew_task(
    context: &NodeContext,
    supervisor: &Supervisor,
    leader: &LeaderHandle,
    client: &LeaseClient,
    identity: &LeaseIdentity,
) {
    let Some(timing) = context.timing().await else { return };
    let mut lease = HostLease::new(&timing);
    let (answers, mut answered) = mpsc::channel(RENEWALS_MAX);
    loop {
        let event = tokio::select! {
            Some(event) = answered.recv() => event,
            () = sleep_until_ns(lease.next_tick_ns()) => HostLeaseEvent::Tick,
            () = context.shutdown.cancelled() => return,
        };
        for command in lease.handle(boottime_ns(), event) {
            match command {
                HostLeaseCommand::SendRenewal => {
                    let Ok(answer) = answers.clone().try_reserve_owned() else { continue };
                    let request = renewal(context, supervisor, identity);
                    let (context, leader) = (context.clone(), leader.clone());
                    // Far below the lease, so that renewals to a leader that died don't keep those to the next one back.
                    let limit = Duration::from_millis(timing.lease_ttl_ms / 4);
                    tokio::spawn(async move {
                        let sent_ns = boottime_ns();
                        let renewed = tokio::time::timeout(limit, renew(&context, &leader, request)).await;
                        if let Ok(Some(ttl_ms)) = renewed {
                            answer.send(HostLeaseEvent::Answered { sent_ns, ttl_ms });
                        }
                    });
                }
                HostLeaseCommand::Deadline { boottime_ns } => {
                    client.deadline_ns.send_replace(boottime_ns);
                }
            }
        }
    }
}

async fn sleep_until_ns(boottime_at_ns: Option<u64>) {
    let wait_ns = boottime_at_ns.unwrap_or(0).saturating_sub(boottime_ns());
    tokio::time::sleep(Duration::from_nanos(wait_ns)).await;
}

/// Asks the leader; nothing when there is none or it does not answer.
async fn renew(context: &NodeContext, leader: &LeaderHandle, request: RenewLeaseRequest) -> Option<u64> {
    let leading = context.consensus.leader()?;
    if leading == context.host {
        return Some(leader.renew(context.host).await);
    }
    match context.clients.lease(leading).ok()?.renew(request).await {
        Ok(response) => Some(response.into_inner().ttl_ms),
        Err(status) => {
            tracing::debug!(leader = %leading, error = status.message(), "lease not renewed");
            None
        }
    }
}

fn renewal(context: &NodeContext, supervisor: &Supervisor, identity: &LeaseIdentity) -> RenewLeaseRequest {
    let processes = supervisor.processes();
    RenewLeaseRequest {
        host_id: context.host.0,
        boot_id: identity.boot_id.clone(),
        incarnation: identity.incarnation.0.clone(),
        stats: Some(stats(context, processes.iter().filter_map(|process| vm_of(process.key)).count())),
        applied_index: context.consensus.local().revision,
        vms: processes.iter().filter_map(|process| vm_of(process.key)).map(|vm| vm.0).collect(),
    }
}

fn vm_of(key: ProcessKey) -> Option<VmId> {
    match key.subject {
        Subject::Vm(vm) => Some(vm),
        Subject::Volume(_) => None,
    }
}

fn stats(context: &NodeContext, processes: usize) -> HostStats {
    let space = nix::sys::statvfs::statvfs(context.data_dir.as_path());
    let (store_total_bytes, store_free_bytes) = space.map_or((0, 0), |space| {
        let unit = space.fragment_size();
        (space.blocks().saturating_mul(unit), space.blocks_available().saturating_mul(unit))
    });
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    HostStats {
        memory_total_bytes: meminfo_bytes(&memory, "MemTotal:"),
        memory_free_bytes: meminfo_bytes(&memory, "MemAvailable:"),
        store_total_bytes,
        store_free_bytes,
        vms_running: u32::try_from(processes).unwrap_or(u32::MAX),
    }
}

/// A line of `/proc/meminfo`, which counts in KiB.
fn meminfo_bytes(text: &str, label: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(label));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

/// Keeps a task for each process that passes the deadlines on to it: one that hangs must not cost the others theirs.
async fn pass_task(context: &NodeContext, supervisor: &Supervisor, client: &LeaseClient) {
    let mut changed = supervisor.changed();
    let mut known: BTreeSet<ProcessKey> = BTreeSet::new();
    loop {
        changed.mark_unchanged();
        let present: BTreeSet<ProcessKey> =
            supervisor.processes().into_iter().map(|process| process.key).collect();
        for &key in present.difference(&known) {
            tokio::spawn(pass_to(context.clone(), supervisor.clone(), key, client.deadline_ns.subscribe()));
        }
        known = present;
        tokio::select! {
            changed = changed.changed() => if changed.is_err() { return },
            () = context.shutdown.cancelled() => return,
        }
    }
}

/// Passes each new deadline on to one process until it is gone.
async fn pass_to(
    context: NodeContext,
    supervisor: Supervisor,
    key: ProcessKey,
    mut deadlines: watch::Receiver<u64>,
) {
    loop {
        let deadline_ns = *deadlines.borrow_and_update();
        let Some(process) = supervisor.process(key) else { return };
        // Nothing has been granted yet, or what was granted is over already.
        if deadline_ns > boottime_ns() {
            let first = waits_for_first(&context, &process);
            let placement = if first || has_lapsed(&process) {
                read_placement(&context, key).await
            } else {
                Placement::Unknown
            };
            // A process would take its first lease without a question.
            if !first || placement == Placement::Confirmed {
                extend(&supervisor, key, deadline_ns, placement).await;
            }
        }
        tokio::select! {
            changed = deadlines.changed() => if changed.is_err() { return },
            () = context.shutdown.cancelled() => return,
        }
    }
}

/// Whether the process was started while the host had no lease. Its placement was confirmed then, which may be long ago: the
/// host may have been declared lost since.
fn waits_for_first(context: &NodeContext, process: &ProcessView) -> bool {
    let state = context.consensus.local();
    let vm = vm_of(process.key).and_then(|vm| state.vms.get(&vm));
    let exempt = vm.is_some_and(|vm| vm.spec.ha == HaPolicy::None);
    let configured = |status: &MachineStatus| status.vm_id != 0 || status.volume_id != 0;
    let never = |status: &MachineStatus| configured(status) && status.lease_deadline_boottime_ns == 0;
    !exempt && process.status.as_ref().is_some_and(never)
}

/// Whether the process has had a lease and let it end: it takes a new one only with its placement confirmed.
fn has_lapsed(process: &ProcessView) -> bool {
    process.status.as_ref().is_some_and(|status| {
        let deadline_ns = status.lease_deadline_boottime_ns;
        status.state == "fenced" || (deadline_ns != 0 && deadline_ns <= boottime_ns())
    })
}

fn is_ours(state: &PoolState, host: HostId, key: ProcessKey) -> bool {
    match key.subject {
        Subject::Vm(vm) => state.may_run(host, vm, key.epoch),
        Subject::Volume(volume) => state.may_serve(host, volume, key.epoch),
    }
}

/// Whether a linearizable read says that the process still owns what it is for.
async fn read_placement(context: &NodeContext, key: ProcessKey) -> Placement {
    match context.consensus.read_linearizable().await {
        Ok(state) if is_ours(&state, context.host, key) => {
            tracing::info!(process = %key, "placement confirmed; the process may run");
            Placement::Confirmed
        }
        Ok(_) => Placement::Unknown,
        Err(error) => {
            tracing::warn!(process = %key, %error, "a fenced process stays paused: its placement can't be read");
            Placement::Unknown
        }
    }
}

async fn extend(supervisor: &Supervisor, key: ProcessKey, deadline_ns: u64, placement: Placement) {
    let Some(machine) = supervisor.machine(key) else { return };
    let request = ExtendLeaseRequest {
        deadline_boottime_ns: deadline_ns,
        placement_confirmed: placement == Placement::Confirmed,
    };
    match machine.extend_lease(request).await {
        Ok(status) => supervisor.record(key, status),
        // The next renewal brings the next deadline; a process that misses several fences itself, as it should.
        Err(error) => tracing::debug!(process = %key, %error, "lease not passed on"),
    }
}

#[cfg(test)]
mod tests {
    use super::meminfo_bytes;

    #[test]
    fn meminfo_lines_are_read_in_kib() {
        let text = "MemTotal:       24576 kB\nMemFree: 1 kB\nMemAvailable:    2048 kB\n";
        assert_eq!(meminfo_bytes(text, "MemTotal:"), 24576 * 1024);
        assert_eq!(meminfo_bytes(text, "MemAvailable:"), 2048 * 1024);
        assert_eq!(meminfo_bytes("garbage", "MemTotal:"), 0);
    }
}
