//! What must hold in every state and between every two states that follow each other. Tests, simulations and fault campaigns check
//! them after each entry; production code does not need them.

use crate::{
    limits::{AUDIT_MAX, EPOCH_HISTORY_MAX, EVENTS_MAX, REFUSALS_MAX, REQUESTS_MAX, VOLUME_DEPTH_MAX},
    state::{Holder, HostDuty, Migration, MigrationPhase, PoolState, SnapshotState, TaskKind, Vm, Volume},
};
use proto::{ByteCount, Epoch, HostId, MigrationId, TaskId, VmId, VolumeId};
use std::collections::BTreeSet;

/// An invariant that does not hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A placed VM must own its volumes, and an unplaced one must not.
    #[error("{volume} of {vm} is not owned as the placement of the VM says")]
    OwnerDiffersFromPlacement {
        /// The VM.
        vm: VmId,
        /// The volume.
        volume: VolumeId,
    },
    /// A volume and the VM that has it must name each other.
    #[error("{volume} and {vm} do not name each other")]
    AttachmentDiffers {
        /// The VM.
        vm: VmId,
        /// The volume.
        volume: VolumeId,
    },
    /// An owner needs a secret, and nobody else has one.
    #[error("{volume} has a secret without an owner, or the other way round")]
    SecretWithoutOwner {
        /// The volume.
        volume: VolumeId,
    },
    /// A volume is owned by its VM or by its own process at a member of the pool.
    #[error("{volume} is owned by somebody else than its VM or its own process")]
    WrongOwner {
        /// The volume.
        volume: VolumeId,
    },
    /// A VM is placed at a member only.
    #[error("{vm} is placed at {host}, which is no member")]
    PlacedAtNoMember {
        /// The VM.
        vm: VmId,
        /// The host.
        host: HostId,
    },
    /// Reservations must fit.
    #[error("{host} has {memory} of memory and {reserved} are reserved")]
    OverCapacity {
        /// The host.
        host: HostId,
        /// Its memory.
        memory: ByteCount,
        /// What is reserved.
        reserved: ByteCount,
    },
    /// What the index says must follow from the rest.
    #[error("the index is not the one that follows from the state")]
    IndexDiffers,
    /// The in-sync set is a non-empty subset of distinct replicas.
    #[error("{volume} has an in-sync set that is empty, repeated, or not among its replicas")]
    BadIsr {
        /// The volume.
        volume: VolumeId,
    },
    /// The epoch history ascends and ends with the present epoch.
    #[error("{volume} has a history of epochs that does not ascend to its epoch")]
    BadHistory {
        /// The volume.
        volume: VolumeId,
    },
    /// An intent names a running migration of its VM, and a running migration has one.
    #[error("{migration} and its VM disagree about whether it runs")]
    IntentDiffers {
        /// The migration.
        migration: MigrationId,
    },
    /// The VM of a running migration is where the phase says.
    #[error("{migration} is in a phase that does not fit the placement of its VM")]
    PhaseDiffersFromPlacement {
        /// The migration.
        migration: MigrationId,
    },
    /// A running task belongs to something that still goes on.
    #[error("{task} runs, but nothing will end it")]
    OrphanedTask {
        /// The task.
        task: TaskId,
    },
    /// A bounded collection is over its bound.
    #[error("{collection} holds {count}, more than its bound")]
    OverBound {
        /// The collection.
        collection: &'static str,
        /// How much it holds.
        count: usize,
    },
    /// An epoch went back.
    #[error("the epoch of {object} went from {before} to {after}")]
    EpochWentBack {
        /// The VM or volume.
        object: String,
        /// Before.
        before: Epoch,
        /// After.
        after: Epoch,
    },
    /// A VM got another host under the same epoch.
    #[error("{vm} moved without a new epoch")]
    MovedWithoutEpoch {
        /// The VM.
        vm: VmId,
    },
    /// A volume got another owner, or its VM another epoch, without a new epoch of the volume.
    #[error("{volume} changed owner without a new epoch")]
    OwnerChangedWithoutEpoch {
        /// The volume.
        volume: VolumeId,
    },
    /// The in-sync set or the replicas changed under the same version.
    #[error("the replicas of {volume} changed without a new version")]
    IsrChangedWithoutVersion {
        /// The volume.
        volume: VolumeId,
    },
    /// A committed migration became uncommitted without a later epoch.
    #[error("{migration} was committed and is not any more")]
    CommitTakenBack {
        /// The migration.
        migration: MigrationId,
    },
    /// A volume lists its snapshots and no others, oldest first.
    #[error("the snapshots of {volume} are not those that it lists, or too many")]
    BadSnapshots {
        /// The volume.
        volume: VolumeId,
    },
    /// A card's network exists, and nobody else has its addresses.
    #[error("a card of {vm} is on no network, or shares an address")]
    BadCard {
        /// The VM.
        vm: VmId,
    },
}

/// Checks one state.
///
/// # Errors
/// The first violation found.
pub fn check(state: &PoolState) -> Result<(), Violation> {
    state.vms.values().try_for_each(|vm| check_vm(state, vm))?;
    state.volumes.values().try_for_each(|volume| check_volume(state, volume))?;
    check_capacity(state)?;
    check_cards(state)?;
    check_migrations(state)?;
    check_tasks(state)?;
    check_listed(state)?;
    check_bounds(state)?;
    // One that was just read has none yet.
    let caught_up = {
        let mut state = state.clone();
        state.update_index();
        state.index
    };
    if caught_up.agrees_with(&state.index_anew()) { Ok(()) } else { Err(Violation::IndexDiffers) }
}

fn check_vm(state: &PoolState, vm: &Vm) -> Result<(), Violation> {
    if let Some(host) = vm.placement
        && !state.hosts.get(&host).is_some_and(crate::state::Host::is_member)
    {
        return Err(Violation::PlacedAtNoMember { vm: vm.id, host });
    }
    for disk in &vm.spec.disks {
        let volume = state.volumes.get(disk);
        let volume = volume.filter(|volume| volume.attached_to == Some(vm.id));
        let volume = volume.ok_or(Violation::AttachmentDiffers { vm: vm.id, volume: *disk })?;
        let owner = volume.owner.and_then(|owner| Some((owner.vm()?, owner.host)));
        if owner != vm.placement.map(|host| (vm.id, host)) {
            return Err(Violation::OwnerDiffersFromPlacement { vm: vm.id, volume: *disk });
        }
    }
    if let Some(intent) = vm.intent {
        let migration = state.migrations.get(&intent.migration);
        if !migration.is_some_and(|migration| migration.is_running() && migration.vm == vm.id) {
            return Err(Violation::IntentDiffers { migration: intent.migration });
        }
    }
    Ok(())
}

fn check_cards(state: &PoolState) -> Result<(), Violation> {
    let (mut macs, mut addresses) = (BTreeSet::new(), BTreeSet::new());
    for vm in state.vms.values() {
        for nic in &vm.spec.nics {
            let fits = match (state.networks.get(&nic.network), nic.ip) {
                (None, _) => false,
                (Some(network), ip) => {
                    let subnet = network.addressing.as_ref().map(|addressing| addressing.subnet);
                    subnet.is_some() == ip.is_some()
                        && ip.is_none_or(|ip| subnet.is_some_and(|subnet| subnet.contains_host(ip)))
                        && ip.is_none_or(|ip| addresses.insert((nic.network, ip)))
                }
            };
            if !fits || !macs.insert(nic.mac) {
                return Err(Violation::BadCard { vm: vm.id });
            }
        }
    }
    Ok(())
}

fn check_volume(state: &PoolState, volume: &Volume) -> Result<(), Violation> {
    let id = volume.id;
    if let Some(vm) = volume.attached_to
        && !state.vms.get(&vm).is_some_and(|vm| vm.spec.disks.contains(&id))
    {
        return Err(Violation::AttachmentDiffers { vm, volume: id });
    }
    if volume.owner.is_some() != volume.secret.is_some() {
        return Err(Violation::SecretWithoutOwner { volume: id });
    }
    check_owner(state, volume)?;
    check_snapshots(state, volume)?;
    let members: BTreeSet<HostId> = volume.isr.iter().map(|member| member.host).collect();
    let replicas: BTreeSet<HostId> = volume.replicas.iter().copied().collect();
    let distinct = members.len() == volume.isr.len() && replicas.len() == volume.replicas.len();
    let hosts = replicas.iter().all(|host| state.hosts.get(host).is_some_and(crate::state::Host::is_member));
    if !distinct || !hosts || members.is_empty() || !members.is_subset(&replicas) {
        return Err(Violation::BadIsr { volume: id });
    }
    let history = &volume.epoch_history;
    let ascends = history.windows(2).all(|pair| pair[0].epoch < pair[1].epoch && pair[0].start_seq.is_some());
    let ends = history.last().map_or(Epoch(0), |last| last.epoch) == volume.epoch;
    if ascends && ends { Ok(()) } else { Err(Violation::BadHistory { volume: id }) }
}

fn check_snapshots(state: &PoolState, volume: &Volume) -> Result<(), Violation> {
    let listed = |id| state.snapshots.get(id).is_some_and(|snapshot| snapshot.volume == volume.id);
    let fits = volume.snapshots.iter().all(listed) && volume.snapshots.is_sorted_by(|a, b| a < b);
    let bounded = volume.snapshots.len() <= VOLUME_DEPTH_MAX;
    if fits && bounded { Ok(()) } else { Err(Violation::BadSnapshots { volume: volume.id }) }
}

/// A volume belongs to the VM that has it, or to its own process, never to both.
fn check_owner(state: &PoolState, volume: &Volume) -> Result<(), Violation> {
    let service = volume.service.as_ref().map(|service| service.host);
    let fits = match volume.owner.map(|owner| (owner.holder, owner.host)) {
        None => service.is_none(),
        Some((Holder::Service, host)) => service == Some(host),
        Some((Holder::Vm(vm), _)) => service.is_none() && volume.attached_to == Some(vm),
    };
    let member = |host: HostId| state.hosts.get(&host).is_some_and(crate::state::Host::is_member);
    if fits && service.is_none_or(member) { Ok(()) } else { Err(Violation::WrongOwner { volume: volume.id }) }
}

/// No snapshot is without its volume.
fn check_listed(state: &PoolState) -> Result<(), Violation> {
    let listed: usize = state.volumes.values().map(|volume| volume.snapshots.len()).sum();
    let lost = || state.snapshots.values().find(|it| !state.volumes.contains(&it.volume));
    match lost().or_else(|| state.snapshots.values().next()) {
        Some(example) if listed != state.snapshots.len() => {
            Err(Violation::BadSnapshots { volume: example.volume })
        }
        _ => Ok(()),
    }
}

fn check_capacity(state: &PoolState) -> Result<(), Violation> {
    for (id, reserved) in state.reserved_memory() {
        let memory = state.hosts.get(&id).map(|host| host.vm_memory).unwrap_or_default();
        if reserved > memory {
            return Err(Violation::OverCapacity { host: id, memory, reserved });
        }
    }
    Ok(())
}

fn check_migrations(state: &PoolState) -> Result<(), Violation> {
    for migration in state.migrations.values() {
        let id = migration.id;
        let vm = state.vms.get(&migration.vm);
        let locked = vm.is_some_and(|vm| vm.intent.is_some_and(|intent| intent.migration == id));
        if locked != migration.is_running() {
            return Err(Violation::IntentDiffers { migration: id });
        }
        let Some(vm) = vm.filter(|_| locked) else { continue };
        let expected = match migration.phase {
            MigrationPhase::Committed => (Some(migration.target), migration.to_epoch()),
            MigrationPhase::Done | MigrationPhase::Aborted | MigrationPhase::Reclaimed => {
                return Err(Violation::IntentDiffers { migration: id });
            }
            _ => (Some(migration.source), migration.from_epoch),
        };
        if (vm.placement, vm.epoch) != expected {
            return Err(Violation::PhaseDiffersFromPlacement { migration: id });
        }
    }
    Ok(())
}

fn check_tasks(state: &PoolState) -> Result<(), Violation> {
    for task in state.tasks.values().filter(|task| task.is_running()) {
        let goes_on = match task.kind {
            TaskKind::VmMigrate { migration } => state
                .migrations
                .get(&migration)
                .is_some_and(|migration| migration.is_running() && migration.task == task.id),
            TaskKind::VmStart | TaskKind::VmStop | TaskKind::VmReboot => {
                let vm = task.vm.and_then(|vm| state.vms.get(&vm));
                vm.is_some_and(|vm| vm.task == Some(task.id) && vm.placement.is_some())
            }
            TaskKind::HostDrain { host } | TaskKind::HostRemove { host, .. } => state
                .hosts
                .get(&host)
                .is_some_and(|host| host.is_member() && host.duty == HostDuty::Draining { task: task.id }),
            TaskKind::HostRestore { host } => {
                state.hosts.get(&host).is_some_and(crate::state::Host::is_member)
            }
            TaskKind::PoolBalance => true,
            TaskKind::VolumeServe { volume } | TaskKind::VolumeClose { volume } => {
                let service = state.volumes.get(&volume).and_then(|volume| volume.service.as_ref());
                service.is_some_and(|service| service.task == Some(task.id))
            }
            TaskKind::SnapshotTake { snapshot } | TaskKind::SnapshotDelete { snapshot } => {
                let state = state.snapshots.get(&snapshot).map(|snapshot| snapshot.state);
                state == Some(SnapshotState::Taking { task: task.id })
                    || state == Some(SnapshotState::Deleting { task: Some(task.id) })
            }
            TaskKind::VolumeRewrite { volume, .. } => {
                let rewriting = state.volumes.get(&volume).and_then(|volume| volume.rewriting);
                rewriting.is_some_and(|rewriting| rewriting.task == task.id)
            }
            TaskKind::VolumeScrub { volume } => {
                let scrub = state.volumes.get(&volume).and_then(|volume| volume.scrub);
                scrub.is_some_and(|scrub| scrub.task == task.id)
            }
            TaskKind::VmClone { .. } => state.clonings.contains(&task.id),
            TaskKind::VolumeImport { volume }
            | TaskKind::VolumeExport { volume }
            | TaskKind::VolumeCopy { volume } => {
                let service = state.volumes.get(&volume).and_then(|volume| volume.service.as_ref());
                service.and_then(|service| service.loan).is_some_and(|loan| loan.task == task.id)
            }
        };
        if !goes_on || task.ended_ms.is_some() {
            return Err(Violation::OrphanedTask { task: task.id });
        }
    }
    let ended = |id: &TaskId| state.tasks.get(id).is_none_or(|task| !task.is_running());
    let services = state.volumes.values().filter_map(|volume| volume.service.as_ref()?.task);
    let clonings = state.clonings.values().map(|cloning| cloning.task);
    let scrubs = state.volumes.values().filter_map(|volume| Some(volume.scrub?.task));
    let waited = state.vms.values().filter_map(|vm| vm.task).chain(services).chain(clonings).chain(scrubs);
    match waited.into_iter().find(ended) {
        Some(task) => Err(Violation::OrphanedTask { task }),
        None => Ok(()),
    }
}

fn check_bounds(state: &PoolState) -> Result<(), Violation> {
    let longest = state.volumes.values().map(|volume| volume.epoch_history.len()).max().unwrap_or_default();
    let bounds = [
        ("events", state.events.iter().count(), EVENTS_MAX),
        ("requests", state.requests.len(), REQUESTS_MAX),
        ("refused requests", state.requests.refused_len(), REFUSALS_MAX),
        ("audit", state.audit.len(), AUDIT_MAX),
        ("epoch history", longest, EPOCH_HISTORY_MAX),
    ];
    match bounds.into_iter().find(|(_, count, max)| count > max) {
        Some((collection, count, _)) => Err(Violation::OverBound { collection, count }),
        None => Ok(()),
    }
}

/// Checks what must hold between a state and a later one of the same pool.
///
/// # Errors
/// The first violation found.
pub fn check_step(before: &PoolState, after: &PoolState) -> Result<(), Violation> {
    for old in before.vms.values() {
        let Some(new) = after.vms.get(&old.id) else { continue };
        check_epoch(old.id.to_string(), old.epoch, new.epoch)?;
        let moved = new.placement.is_some() && new.placement != old.placement;
        if moved && new.epoch == old.epoch {
            return Err(Violation::MovedWithoutEpoch { vm: old.id });
        }
        check_disks_follow(before, after, old, new)?;
    }
    for old in before.volumes.values() {
        let Some(new) = after.volumes.get(&old.id) else { continue };
        check_epoch(old.id.to_string(), old.epoch, new.epoch)?;
        if new.owner.is_some() && new.owner != old.owner && new.epoch == old.epoch {
            return Err(Violation::OwnerChangedWithoutEpoch { volume: old.id });
        }
        let changed = (&old.isr, &old.replicas) != (&new.isr, &new.replicas);
        if (changed && new.isr_version <= old.isr_version) || new.isr_version < old.isr_version {
            return Err(Violation::IsrChangedWithoutVersion { volume: old.id });
        }
    }
    for old in before.migrations.values().filter(|migration| migration.is_committed()) {
        let was_given_back = |new: &Migration| {
            let vm = after.vms.get(&new.vm);
            new.phase == MigrationPhase::Reclaimed && vm.is_some_and(|vm| vm.epoch > new.to_epoch())
        };
        if after.migrations.get(&old.id).is_some_and(|new| !new.is_committed() && !was_given_back(new)) {
            return Err(Violation::CommitTakenBack { migration: old.id });
        }
    }
    Ok(())
}

fn check_disks_follow(before: &PoolState, after: &PoolState, old: &Vm, new: &Vm) -> Result<(), Violation> {
    if old.epoch == new.epoch {
        return Ok(());
    }
    for disk in &new.spec.disks {
        let epoch = |state: &PoolState| state.volumes.get(disk).map(|volume| volume.epoch);
        if epoch(after) <= epoch(before) {
            return Err(Violation::OwnerChangedWithoutEpoch { volume: *disk });
        }
    }
    Ok(())
}

fn check_epoch(object: String, before: Epoch, after: Epoch) -> Result<(), Violation> {
    if after < before { Err(Violation::EpochWentBack { object, before, after }) } else { Ok(()) }
}
