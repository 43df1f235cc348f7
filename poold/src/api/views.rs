//! The pool's state as the messages of the public API.
//!
//! Names are resolved here: a message carries the name of a host or VM, and its id when the object is gone.

use super::{networks, status};
use pool_state::{
    Outcome, PoolState, Rejection,
    state::{
        self, Group, HostState, Image, Migration, MigrationRecord, PageCounts, RoundRecord, Task, TaskKind,
        TaskState, Vm, Volume,
    },
};
use proto::cpu::{CpuProfile, ParseCpuProfileError};
use proto::{
    HostId, ImageId, MemoryPages, VmId, VolumeId,
    v1::{self, RequestMeta},
};
use tonic::Status;

/// What was looked up, or the status that says why not.
///
/// # Errors
/// The rejection as callers see it.
pub fn found<T>(result: Result<T, Rejection>) -> Result<T, Status> {
    result.map_err(|rejection| status::rejected(&rejection))
}

/// What a request with this id was answered already.
pub fn answered(state: &PoolState, meta: Option<&RequestMeta>) -> Option<Outcome> {
    let request_id = meta.map(|meta| meta.request_id.as_str()).filter(|id| !id.is_empty())?;
    state.requests.get(request_id).map(|answer| answer.outcome)
}

/// The object to delete; none when a request with this id has deleted it already.
///
/// # Errors
/// It was not found, or the reference is ambiguous.
pub fn to_delete<T>(
    state: &PoolState,
    meta: Option<&RequestMeta>,
    object: Result<T, Rejection>,
) -> Result<Option<T>, Status> {
    match object {
        Err(_) if answered(state, meta).is_some() => Ok(None),
        object => found(object).map(Some),
    }
}

/// The status for an answer that does not fit the command: the request id was used for something else.
pub fn unexpected(outcome: Outcome) -> Status {
    Status::internal(format!("the pool answered {outcome:?}, which does not fit the command"))
}

/// The task that a command has begun, as its answer says.
pub fn task_begun(state: &PoolState, outcome: Outcome) -> Result<v1::Task, Status> {
    let Outcome::Task(id) = outcome else { return Err(unexpected(outcome)) };
    Ok(task(state, found(state.task(id))?))
}

/// Name of a host, or its id when it is gone.
pub fn host_name(state: &PoolState, host: HostId) -> String {
    state.host_name(host)
}

fn vm_name(state: &PoolState, vm: VmId) -> String {
    state.vms.get(&vm).map_or_else(|| vm.to_string(), |vm| vm.name.clone())
}

fn volume_name(state: &PoolState, volume: VolumeId) -> String {
    state.volumes.get(&volume).map_or_else(|| volume.to_string(), |volume| volume.name.clone())
}

fn image_name(state: &PoolState, image: Option<ImageId>) -> String {
    let Some(image) = image else { return String::new() };
    state.images.get(&image).map_or_else(|| image.to_string(), |image| image.name.clone())
}

/// A profile as a request names it; none: it names none.
pub fn cpu_profile(text: &str) -> Result<Option<CpuProfile>, Status> {
    match text {
        "" => Ok(None),
        text => text
            .parse()
            .map(Some)
            .map_err(|error: ParseCpuProfileError| Status::invalid_argument(error.to_string())),
    }
}

/// A VM.
pub fn vm(state: &PoolState, vm: &Vm) -> v1::Vm {
    v1::Vm {
        id: vm.id.0,
        name: vm.name.clone(),
        state: state.vm_state(vm).as_str().to_owned(),
        host: vm.placement.map(|host| state.host_name(host)).unwrap_or_default(),
        epoch: vm.epoch.0,
        vcpus: vm.spec.vcpus,
        memory_bytes: vm.spec.memory.0,
        disks: vm.spec.disks.iter().map(|disk| volume_name(state, *disk)).collect(),
        kernel: image_name(state, vm.spec.kernel),
        initrd: image_name(state, vm.spec.initrd),
        cmdline: vm.spec.cmdline.clone(),
        ha: vm.spec.ha.as_str().to_owned(),
        problem: vm.problem.clone().unwrap_or_default(),
        revision: state.revision,
        ha_priority: vm.spec.priority.into(),
        home: vm.home.map(|home| state.host_name(home)).unwrap_or_default(),
        nics: vm.spec.nics.iter().map(|nic| networks::nic(state, nic)).collect(),
        cpu_profile: state.cpu_profile(vm).to_string(),
        cluster: state.cluster_name(vm.spec.cluster),
        huge_pages: vm.spec.pages.is_huge(),
    }
}

/// A group.
pub fn group(state: &PoolState, group: &Group) -> v1::Group {
    v1::Group {
        id: group.id.0,
        name: group.name.clone(),
        rule: group.rule.as_str().to_owned(),
        strength: group.strength.as_str().to_owned(),
        vms: group.vms.iter().map(|vm| vm_name(state, *vm)).collect(),
        hosts: group.hosts.iter().map(|host| state.host_name(*host)).collect(),
        revision: state.revision,
    }
}

/// Why a VM is where it is.
pub fn explanation(state: &PoolState, vm: &Vm) -> v1::VmExplanation {
    let pool_state::explain::Explanation { reasons, hosts } = pool_state::explain::explain(state, vm);
    let verdict = |verdict: pool_state::explain::Verdict| v1::HostVerdict {
        host: state.host_name(verdict.host),
        fits: verdict.rank.is_some(),
        reasons: verdict.reasons,
        rank: verdict.rank.unwrap_or(0),
    };
    v1::VmExplanation {
        vm: vm.name.clone(),
        state: state.vm_state(vm).as_str().to_owned(),
        host: vm.placement.map(|host| state.host_name(host)).unwrap_or_default(),
        reasons,
        hosts: hosts.into_iter().map(verdict).collect(),
        revision: state.revision,
    }
}

/// A record of who changed what.
pub fn audit(record: &state::AuditRecord) -> v1::AuditRecord {
    v1::AuditRecord {
        revision: record.revision,
        time_ms: record.time_ms,
        principal: record.principal.clone(),
        request_id: record.request_id.clone(),
        action: record.action.clone(),
        object: record.object.clone(),
    }
}

/// A volume. A replica counts as gone while its host is not up, and as syncing when it is another life than the one that
/// was in sync.
pub fn volume(state: &PoolState, volume: &Volume) -> v1::Volume {
    let replica = |host: &HostId| {
        let up = state.hosts.get(host).is_some_and(|host| host.state == HostState::Up);
        let current = volume.isr_member(*host).is_some_and(|member| state.is_current(member));
        let word = match (up, current) {
            (true, true) => "in-sync",
            (true, false) => "syncing",
            (false, _) => "gone",
        };
        v1::Replica { host: state.host_name(*host), state: word.to_owned(), ..v1::Replica::default() }
    };
    v1::Volume {
        id: volume.id.0,
        name: volume.name.clone(),
        size_bytes: volume.size.0,
        epoch: volume.epoch.0,
        owner: volume.owner.map(|owner| owner_text(state, volume, owner)).unwrap_or_default(),
        replicas: volume.replicas.iter().map(replica).collect(),
        isr_version: volume.isr_version.0,
        revision: state.revision,
        nbd: volume.service.as_ref().and_then(|service| nbd(state, volume, service)),
        health: health(state, volume).to_owned(),
        replicas_wanted: volume.replicas_wanted,
        origin: volume.origin.map(|origin| state.snapshot_name(origin)).unwrap_or_default(),
        snapshots: state.snapshots_of(volume.id).map(|snapshot| snapshot.name.clone()).collect(),
        operations_per_s_max: volume.limits.operations_per_s.unwrap_or(0),
        bytes_per_s_max: volume.limits.bytes_per_s.unwrap_or(0),
        last_scrub: volume.last_scrub.map(|scrub| v1::VolumeScrub {
            task: scrub.task.0,
            checked: scrub.counts.checked,
            damaged: scrub.counts.damaged,
            repaired: scrub.counts.repaired,
            ended_ms: scrub.ended_ms,
            permille: 1000,
        }),
        ..v1::Volume::default()
    }
}

/// A snapshot.
pub fn snapshot(state: &PoolState, snapshot: &state::Snapshot) -> v1::Snapshot {
    let volume = state.volumes.get(&snapshot.volume);
    v1::Snapshot {
        id: snapshot.id.0,
        name: snapshot.name.clone(),
        volume: volume.map(|volume| volume.name.clone()).unwrap_or_default(),
        size_bytes: snapshot.size.0,
        created_ms: snapshot.created_ms,
        state: snapshot.state.as_str().to_owned(),
    }
}

fn health(state: &PoolState, volume: &Volume) -> &'static str {
    let serving = state.serving_members(volume).count();
    let behind = volume.replicas.iter().filter(|host| state.is_behind(volume, **host)).count();
    match (serving, behind) {
        (0, _) => "unavailable",
        (serving, _) if serving >= volume.replicas_wanted as usize => "healthy",
        (serving, behind) if serving + behind >= volume.replicas_wanted as usize => "syncing",
        _ => "degraded",
    }
}

fn owner_text(state: &PoolState, volume: &Volume, owner: state::VolumeOwner) -> String {
    let host = state.host_name(owner.host);
    match owner.vm() {
        Some(vm) => format!("vm {}", vm_name(state, vm)),
        None if volume.service.as_ref().is_some_and(|service| service.nbd.is_some()) => format!("nbd {host}"),
        None => format!("pool {host}"),
    }
}

fn nbd(state: &PoolState, volume: &Volume, service: &state::VolumeService) -> Option<v1::VolumeNbd> {
    let nbd = service.nbd.as_ref()?;
    let up = state.hosts.get(&service.host).is_some_and(|host| host.state == HostState::Up);
    let word = match service.wanted {
        _ if !up => "lost",
        state::ServiceWanted::Closed => "stopping",
        state::ServiceWanted::Open if service.serves_at(volume.epoch) => "serving",
        state::ServiceWanted::Open => "starting",
    };
    Some(v1::VolumeNbd {
        host: state.host_name(service.host),
        listen: nbd.listen.to_string(),
        uri: nbd.uri.clone().unwrap_or_default(),
        state: word.to_owned(),
        problem: service.problem.clone().unwrap_or_default(),
    })
}

/// An image.
pub fn image(state: &PoolState, image: &Image) -> v1::Image {
    v1::Image {
        id: image.id.0,
        name: image.name.clone(),
        blake3: image.blake3.to_string(),
        size_bytes: image.size.0,
        hosts: image.holders.iter().map(|host| state.host_name(*host)).collect(),
    }
}

/// A migration.
pub fn migration(state: &PoolState, migration: &Migration) -> v1::Migration {
    let memory = state.vms.get(&migration.vm).map_or(0, |vm| vm.spec.memory.0);
    v1::Migration {
        id: migration.id.0,
        vm: migration.vm_name.clone(),
        source: state.host_name(migration.source),
        target: state.host_name(migration.target),
        outcome: migration.outcome.as_str().to_owned(),
        phase: migration.phase.as_str().to_owned(),
        error: migration.error.clone().unwrap_or_default(),
        policy: migration.options.policy.as_str().to_owned(),
        memory_bytes: memory,
        task: migration.task.0,
        record: migration.record.as_ref().map(record),
        revision: state.revision,
        waits_for: state.waits_for(migration).map(|limit| limit.to_string()).unwrap_or_default(),
    }
}

/// What a migration did.
fn record(record: &MigrationRecord) -> v1::MigrationRecord {
    let parts = record.blackout_parts;
    let pages = |pages: PageCounts| v1::PageCounts {
        zero: pages.zero,
        raw: pages.raw,
        compressed: pages.compressed,
        delta: pages.delta,
        reference: pages.reference,
        faulted: pages.faulted,
    };
    let round = |round: &RoundRecord| v1::RoundRecord {
        round: round.round,
        bytes: round.bytes,
        pages: Some(pages(round.pages)),
        ms: round.ms,
        dirty_pages_after: round.dirty_pages_after,
    };
    v1::MigrationRecord {
        total_ms: record.total_ms,
        blackout_ms: record.blackout_ms,
        blackout_parts: Some(v1::BlackoutParts {
            pause: parts.pause,
            drain: parts.drain,
            last_pages: parts.last_pages,
            state: parts.state,
            proof: parts.proof,
            commit: parts.commit,
            activate: parts.activate,
            resume: parts.resume,
        }),
        rounds: record.rounds,
        bytes_sent: record.bytes_sent,
        pages: Some(pages(record.pages)),
        per_round: record.per_round.iter().map(round).collect(),
        memory_proved: record.memory_proved,
        memory_hash: record.memory_hash.clone(),
        blackout_expected_ms: record.blackout_expected_ms,
        source_cpu_ms: record.source_cpu_ms,
        target_cpu_ms: record.target_cpu_ms,
        fault_mean_ms: record.fault_mean_ms,
        connections: record.connections,
        huge_pages: record.memory_pages.is_huge(),
        ..v1::MigrationRecord::default()
    }
}

/// The record that a VM process reports, as the state keeps it.
pub fn record_of_message(record: &v1::MigrationRecord) -> MigrationRecord {
    let pages = |pages: Option<v1::PageCounts>| {
        let pages = pages.unwrap_or_default();
        PageCounts {
            zero: pages.zero,
            raw: pages.raw,
            compressed: pages.compressed,
            delta: pages.delta,
            reference: pages.reference,
            faulted: pages.faulted,
        }
    };
    let parts = record.blackout_parts.unwrap_or_default();
    let round = |round: &v1::RoundRecord| RoundRecord {
        round: round.round,
        bytes: round.bytes,
        pages: pages(round.pages),
        ms: round.ms,
        dirty_pages_after: round.dirty_pages_after,
    };
    // Only the newest rounds are kept; the entry must stay small.
    let skipped = record.per_round.len().saturating_sub(pool_state::limits::ROUNDS_MAX);
    MigrationRecord {
        total_ms: record.total_ms,
        blackout_ms: record.blackout_ms,
        blackout_parts: state::BlackoutParts {
            pause: parts.pause,
            drain: parts.drain,
            last_pages: parts.last_pages,
            state: parts.state,
            proof: parts.proof,
            commit: parts.commit,
            activate: parts.activate,
            resume: parts.resume,
        },
        rounds: record.rounds,
        bytes_sent: record.bytes_sent,
        pages: pages(record.pages),
        per_round: record.per_round.iter().skip(skipped).map(round).collect(),
        memory_proved: record.memory_proved,
        memory_hash: record.memory_hash.clone(),
        blackout_expected_ms: record.blackout_expected_ms,
        source_cpu_ms: record.source_cpu_ms,
        target_cpu_ms: record.target_cpu_ms,
        fault_mean_ms: record.fault_mean_ms,
        connections: record.connections,
        memory_pages: MemoryPages::of_flag(record.huge_pages),
    }
}

/// A task. The phase of a migration is the migration's, that of a start or stop the VM's state.
pub fn task(state: &PoolState, task: &Task) -> v1::Task {
    let phase = match task.kind {
        TaskKind::VmMigrate { migration } => {
            state.migrations.get(&migration).map_or("", |migration| migration.phase.as_str()).to_owned()
        }
        TaskKind::VmStart | TaskKind::VmStop | TaskKind::VmReboot => {
            let vm = task.vm.and_then(|vm| state.vms.get(&vm));
            vm.map_or("", |vm| state.vm_state(vm).as_str()).to_owned()
        }
        TaskKind::HostDrain { host } => left_to_move(state, state.vms_on(host).collect()),
        TaskKind::HostRemove { host, .. } => {
            let replicas = state.replicas_at(host);
            format!("{replicas} replicas left; {}", left_to_move(state, state.vms_on(host).collect()))
        }
        TaskKind::HostRestore { host } => left_to_move(state, state.vms_at_home_on(host).collect()),
        TaskKind::VmClone { .. } => state.clonings.get(&task.id).map_or(String::new(), |cloning| {
            let made = cloning.disks.iter().filter(|disk| disk.volume().is_some()).count();
            format!("{made} of {} disks cloned", cloning.disks.len())
        }),
        TaskKind::PoolBalance => format!("{} moves left", pool_state::balance::plan(state).len()),
        TaskKind::VolumeImport { .. }
        | TaskKind::VolumeExport { .. }
        | TaskKind::VolumeCopy { .. }
        | TaskKind::SnapshotTake { .. }
        | TaskKind::SnapshotDelete { .. }
        | TaskKind::VolumeScrub { .. }
        | TaskKind::VolumeRewrite { .. } => String::new(),
        TaskKind::VolumeServe { volume } | TaskKind::VolumeClose { volume } => {
            let volume = state.volumes.get(&volume);
            let problem = volume.and_then(|volume| volume.service.as_ref()?.problem.clone());
            problem.unwrap_or_default()
        }
    };
    let error = match &task.state {
        TaskState::Failed { problem } => problem.clone(),
        TaskState::Running | TaskState::Done | TaskState::Cancelled => String::new(),
    };
    v1::Task {
        id: task.id.0,
        kind: task.kind.as_str().to_owned(),
        state: task.state.as_str().to_owned(),
        phase,
        objects: vec![task.object.clone()],
        error,
        created_ms: task.created_ms,
        ended_ms: task.ended_ms.unwrap_or(0),
        principal: task.principal.clone(),
        request_id: task.request_id.clone(),
        deadline_ms: task.deadline_ms,
        executor: task.executor.map(|host| state.host_name(host)).unwrap_or_default(),
        progress: None,
    }
}

/// What a task that moves VMs still has to do, and what holds it up.
fn left_to_move(state: &PoolState, vms: Vec<&Vm>) -> String {
    let moving = vms.iter().filter(|vm| vm.intent.is_some()).count();
    let stuck = vms.iter().filter(|vm| vm.intent.is_none());
    let problem = stuck.filter_map(|vm| state.migration_blockers(vm.id, None).into_iter().next()).next();
    let problem = problem.map(|problem| format!("; {problem}")).unwrap_or_default();
    format!("{} VMs left, {moving} moving{problem}", vms.len())
}

/// An event.
pub fn event(event: &state::Event) -> v1::Event {
    v1::Event {
        revision: event.revision,
        ordinal: event.ordinal,
        time_ms: event.time_ms,
        kind: event.kind.as_str().to_owned(),
        object: event.object.clone(),
        message: event.message.clone(),
    }
}
