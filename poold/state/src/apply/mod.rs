//! The only function that changes the pool: pure and deterministic.
//!
//! Every rule that must never break is checked here, where the entry is committed, and not only where it was planned. An
//! entry works on a clone of the state (cheap: see [`Table`](crate::state::Table)), which takes its place only when the
//! entry is accepted; so no rejection can leave half a change behind.
//!
//! - `pool`, `hosts`, `tokens`, `images`, `volumes`: one kind of object each.
//! - `replicas`: where replicas are. `services`: processes of volumes without a VM.
//! - `vms`: creating, deleting and what an operator wants of a VM. `run`: starts, ends, restarts and recovery.
//! - `migrations`: the moves. `queue`: moves that wait, and the limits that they wait for. `tasks`: long operations and their ends.
//! - `networks`: networks, and the cards of VMs. `duty`, `groups`, `users`: what an operator asks of hosts, of placements, and who may ask. `moves`: tasks of the pool.
//! - `clusters`: which hosts a VM is placed among. `govern`: settings, feature level, CA and access tokens. `ownership`: placements and epochs, which always change together. `audit`: who changed what. `requests`: requests that come again.

mod audit;
mod cloning;
mod clusters;
mod cpu;
mod duty;
mod govern;
mod groups;
mod hosts;
mod images;
mod leaving;
mod loans;
mod memory;
mod migrations;
mod moves;
mod networks;
mod ownership;
mod placement;
mod pool;
mod queue;
mod reclaim;
mod replicas;
mod requests;
mod run;
mod scrubs;
mod services;
mod snapshots;
mod tasks;
mod tokens;
mod users;
mod vms;
mod volumes;

#[cfg(test)]
mod tests;

pub(crate) use placement::permille;
pub use placement::{Rank, Reserved, Search};

use crate::command::VolumeCommand;
use crate::{
    command::Command,
    entry::{Entry, Seed},
    limits::TEXT_BYTES_MAX,
    outcome::Outcome,
    rejection::{Field, ObjectKind, Rejection},
    state::{Answer, Event, EventKind, Host, Migration, PoolState, Table, Vm, Volume},
};
use proto::{HostId, MigrationId, VmId, VolumeId, limits::is_valid_name};
use std::fmt::Display;

type Applied = Result<Outcome, Rejection>;

impl PoolState {
    /// Applies the entry at this index of the log.
    ///
    /// # Errors
    /// When a rule forbids it; then nothing but the revision has changed, and that the request was refused is remembered.
    ///
    /// # Panics
    /// When the index is not higher than that of the entry before: an entry is applied once.
    pub fn apply(&mut self, index: u64, entry: &Entry) -> Applied {
        self.note_applied(index);
        let command_hash = entry.request_id.as_ref().map(|_| entry.command.hash());
        if let (Some(id), Some(hash)) = (&entry.request_id, command_hash)
            && let Some(answer) = self.requests.get(id)
        {
            return if answer.command_hash == hash {
                Ok(answer.outcome)
            } else {
                Err(Rejection::RequestIdReused { request_id: id.clone() })
            };
        }
        let id = entry.request_id.as_deref().unwrap_or_default();
        if self.requests.is_refused(id) {
            return self.refuse_again(index, entry);
        }
        let mut next = self.clone();
        let outcome = match next.change(index, entry) {
            Ok(outcome) => outcome,
            Err(rejection) => {
                if requests::is_kept(self, entry) {
                    self.requests.refuse(id);
                }
                return Err(rejection);
            }
        };
        if let Some(command_hash) = command_hash
            && !next.requests.is_refused(id)
        {
            next.requests.insert(id, Answer { command_hash, outcome });
        }
        if let Some(record) = audit::record(self, index, entry) {
            next.audit.push(record);
        }
        next.update_index();
        *self = next;
        Ok(outcome)
    }

    /// Does what an entry says, or a part of it when it is refused.
    fn change(&mut self, index: u64, entry: &Entry) -> Applied {
        let mut change = Change {
            state: self,
            index,
            time_ms: entry.time_ms,
            seed: &entry.seed,
            principal: &entry.principal,
            request_id: entry.request_id.as_deref().unwrap_or_default(),
            ordinal: 0,
        };
        change.dispatch(&entry.command)
    }

    /// Moves the revision past an entry that carries no command (blank, membership).
    ///
    /// # Panics
    /// When the index is not higher than that of the entry before.
    pub fn note_applied(&mut self, index: u64) {
        assert!(
            index > self.revision,
            "entry {index} comes after {}: the log is applied in order",
            self.revision
        );
        self.revision = index;
    }
}

/// One entry at work on a copy of the state.
struct Change<'a> {
    state: &'a mut PoolState,
    index: u64,
    time_ms: u64,
    seed: &'a Seed,
    principal: &'a str,
    request_id: &'a str,
    ordinal: u32,
}

impl Change<'_> {
    fn dispatch(&mut self, command: &Command) -> Applied {
        if let Command::InitPool(init) = command {
            return self.init_pool(init);
        }
        if !self.state.settings.is_initialised() {
            return Err(Rejection::PoolNotInitialised);
        }
        self.state.check_level(command)?;
        match command {
            Command::InitPool(_) => Err(Rejection::PoolAlreadyInitialised),
            Command::CreateToken { secret_hash, ttl_ms } => self.create_token(*secret_hash, *ttl_ms),
            Command::RevokeToken { token } => self.revoke_token(*token),
            Command::JoinHost(join) => self.join_host(join),
            Command::UpdateHost(update) => self.update_host(update),
            Command::HostLost { host } => self.host_lost(*host),
            Command::HostReturned { host } => self.host_returned(*host),
            Command::RemoveHost { host, mode } => self.remove_host(*host, *mode),
            Command::RetireHost { host, copies } => self.retire_host(*host, *copies),
            Command::SetHostStore { host, store } => self.set_host_store(*host, *store),
            Command::CreateImage { name, blake3, size, holders } => {
                self.create_image(name, *blake3, *size, holders)
            }
            Command::AddImageHolder { image, host } => self.add_image_holder(*image, *host),
            Command::DeleteImage { image } => self.delete_image(*image),
            Command::CreateVolume { name, size, replicas } => self.create_volume(name, *size, *replicas),
            Command::DeleteVolume { volume } => self.delete_volume(*volume),
            Command::Volume(command) => self.dispatch_volume(command),
            Command::RecordVolumeStart { volume, start } => self.record_volume_start(*volume, *start),
            Command::RemoveFromIsr(change) => self.remove_from_isr(change),
            Command::AddToIsr(change) => self.add_to_isr(change),
            Command::SetBrake => self.set_brake(),
            Command::HaResume => self.ha_resume(),
            Command::HaDisarm => self.ha_disarm(),
            Command::HaArm => self.ha_arm(),
            _ => self.dispatch_service(command),
        }
    }

    /// The commands about hosts in service, groups and users.
    fn dispatch_service(&mut self, command: &Command) -> Applied {
        match command {
            Command::SetHostCpu { host, cpu } => self.set_host_cpu(*host, cpu),
            Command::SetHostCpus { host, cpus } => self.set_host_cpus(*host, *cpus),
            Command::SetHostHugeMemory { host, memory } => self.set_host_huge_memory(*host, *memory),
            Command::SetHostLabels { host, labels } => self.set_host_labels(*host, labels),
            Command::CordonHost { host } => self.cordon_host(*host),
            Command::UncordonHost { host } => self.uncordon_host(*host),
            Command::DrainHost { host } => self.drain_host(*host),
            Command::RestoreHost { host } => self.restore_host(*host),
            Command::ConfirmDead { host } => self.confirm_dead(*host),
            Command::StartBalance => self.start_balance(),
            Command::MoveVm { vm, target, cause } => self.move_vm(*vm, *target, *cause),
            Command::FinishTask { task } => self.finish_task(*task),
            Command::CreateGroup(create) => self.create_group(create),
            Command::ChangeGroup(change) => self.change_group(change),
            Command::DeleteGroup { group } => self.delete_group(*group),
            Command::CreateNetwork(create) => self.create_network(create),
            Command::DeleteNetwork { network } => self.delete_network(*network),
            Command::CreateUser { name, role, key_hash } => self.create_user(name, *role, *key_hash),
            Command::SetUserRole { name, role } => self.set_user_role(name, *role),
            Command::RotateUser { name, key_hash } => self.rotate_user(name, *key_hash),
            Command::DeleteUser { name } => self.delete_user(name),
            Command::Govern(change) => self.govern(change),
            Command::Cluster(change) => self.change_cluster(change),
            _ => self.dispatch_vm(command),
        }
    }

    /// What changes volumes.
    fn dispatch_volume(&mut self, command: &VolumeCommand) -> Applied {
        match command {
            VolumeCommand::ResizeVolume { volume, size } => self.resize_volume(*volume, *size),
            VolumeCommand::LimitVolume { volume, limits } => self.limit_volume(*volume, *limits),
            VolumeCommand::ServeVolume { volume, host, listen } => self.serve_volume(*volume, *host, listen),
            VolumeCommand::StopServingVolume { volume } => self.stop_serving_volume(*volume),
            VolumeCommand::VolumeServing { volume, epoch, uri } => self.volume_serving(*volume, *epoch, uri),
            VolumeCommand::VolumeServiceEnded { volume, epoch, end } => {
                self.volume_service_ended(*volume, *epoch, end)
            }
            VolumeCommand::ImportVolume { name, size, replicas, host, key } => {
                self.import_volume(name, *size, *replicas, (*host, *key))
            }
            VolumeCommand::ExportVolume { volume, host, key } => self.export_volume(*volume, *host, *key),
            VolumeCommand::EndLoan { volume, key, end } => self.end_loan_by_key(*volume, *key, end),
            VolumeCommand::TakeSnapshot { volume, name } => self.take_snapshot(*volume, name),
            VolumeCommand::DeleteSnapshot { snapshot } => self.delete_snapshot(*snapshot),
            VolumeCommand::RevertVolume { snapshot } => self.revert_volume(*snapshot),
            VolumeCommand::CloneVolume { snapshot, name } => self.clone_volume(*snapshot, name),
            VolumeCommand::CopySnapshot { snapshot, name, replicas } => {
                self.copy_snapshot(*snapshot, name, *replicas)
            }
            VolumeCommand::ScrubVolume { volume, replica, bytes_per_s } => {
                self.scrub_volume(*volume, *replica, *bytes_per_s)
            }
            VolumeCommand::VolumeScrubbed { volume, epoch, task, end } => {
                self.volume_scrubbed((*volume, *epoch), *task, end)
            }
            VolumeCommand::VolumeWorkDone { volume, epoch, work, at } => {
                self.volume_work_done((*volume, *epoch), *work, *at)
            }
            VolumeCommand::VolumeWorkFailed { volume, epoch, work, problem } => {
                self.volume_work_failed((*volume, *epoch), *work, problem)
            }
            VolumeCommand::PlaceReplica { volume, host, replaces } => {
                self.place_replica(*volume, *host, *replaces)
            }
            VolumeCommand::DropReplica { volume, host } => self.drop_replica(*volume, *host),
            VolumeCommand::WorkOnVolume { volume, host } => self.work_on_volume(*volume, *host),
            VolumeCommand::FinishVolumeWork { volume } => self.finish_volume_work(*volume),
        }
    }

    /// The commands about VMs, their migrations and their tasks.
    fn dispatch_vm(&mut self, command: &Command) -> Applied {
        match command {
            Command::CreateVm(create) => self.create_vm(create),
            Command::CloneVm { vm, name, disks } => self.clone_vm(*vm, name, *disks),
            Command::StepVmClone { task } => self.step_vm_clone(*task),
            Command::DeleteVm { vm } => self.delete_vm(*vm),
            Command::StartVm { vm, host } => self.start_vm(*vm, *host),
            Command::StopVm { vm, mode } => self.stop_vm(*vm, *mode),
            Command::RebootVm { vm, mode } => self.reboot_vm(*vm, *mode),
            Command::PauseVm { vm } => self.pause_vm(*vm),
            Command::ResumeVm { vm } => self.resume_vm(*vm),
            Command::VmRunning { vm, epoch } => self.vm_running(*vm, *epoch),
            Command::VmStopped { vm, epoch, reason } => self.vm_stopped(*vm, *epoch, *reason),
            Command::VmFailed { vm, epoch, problem } => self.vm_failed(*vm, *epoch, problem),
            Command::RestartVm { vm, expect_epoch, cause } => self.restart_vm(*vm, *expect_epoch, cause),
            Command::RecoverVm { vm, expect_epoch, host } => self.recover_vm(*vm, *expect_epoch, *host),
            Command::StartMigration { vm, target, options } => self.start_migration(*vm, *target, *options),
            Command::MigrationSourceReady { migration, fingerprint } => {
                self.migration_source_ready(*migration, *fingerprint)
            }
            Command::MigrationPrepared { migration, endpoint } => {
                self.migration_prepared(*migration, endpoint)
            }
            Command::MigrationCopying { migration } => self.migration_copying(*migration),
            Command::MigrationPaused { migration } => self.migration_paused(*migration),
            Command::MigrationCommit { migration, last_sequences } => {
                self.migration_commit(*migration, last_sequences)
            }
            Command::MigrationReclaim { migration } => self.reclaim(*migration),
            Command::MigrationAbort { migration, reason } => self.migration_abort(*migration, reason),
            Command::MigrationDone { migration, record } => {
                self.migration_done(*migration, record.as_deref())
            }
            Command::BeginMigration { migration } => self.begin_queued(*migration),
            Command::CancelMigration { migration } => self.cancel_migration(*migration),
            Command::CancelTask { task } => self.cancel_task(*task),
            Command::ExpireTask { task } => self.expire_task(*task),
            _ => unreachable!("dispatch handles the commands that are not about VMs"),
        }
    }

    fn event(&mut self, kind: EventKind, object: String, message: String) {
        let event = Event {
            revision: self.index,
            ordinal: self.ordinal,
            time_ms: self.time_ms,
            kind,
            object,
            message,
        };
        self.ordinal += 1;
        self.state.events.push(event);
    }

    fn vm_event(&mut self, kind: EventKind, vm: VmId, message: String) {
        let object = self.state.vms.get(&vm).map_or_else(|| vm.to_string(), |vm| format!("vm {}", vm.name));
        self.event(kind, object, message);
    }

    fn vm_mut(&mut self, id: VmId) -> Result<&mut Vm, Rejection> {
        find_mut(&mut self.state.vms, &id, ObjectKind::Vm)
    }

    fn host_mut(&mut self, id: HostId) -> Result<&mut Host, Rejection> {
        find_mut(&mut self.state.hosts, &id, ObjectKind::Host)
    }

    fn volume_mut(&mut self, id: VolumeId) -> Result<&mut Volume, Rejection> {
        find_mut(&mut self.state.volumes, &id, ObjectKind::Volume)
    }

    fn migration_mut(&mut self, id: MigrationId) -> Result<&mut Migration, Rejection> {
        find_mut(&mut self.state.migrations, &id, ObjectKind::Migration)
    }
}

fn find_mut<'t, K: Ord + Clone + Display, V: Clone>(
    table: &'t mut Table<K, V>,
    id: &K,
    kind: ObjectKind,
) -> Result<&'t mut V, Rejection> {
    table.get_mut(id).ok_or_else(|| Rejection::NotFound { kind, text: id.to_string() })
}

/// Checks a new object's name against the rules and its namesakes.
fn check_name<'a>(
    kind: ObjectKind,
    name: &str,
    mut others: impl Iterator<Item = &'a str>,
) -> Result<(), Rejection> {
    if !is_valid_name(name) {
        return Err(Rejection::BadName { name: cut(name) });
    }
    if others.any(|other| other == name) {
        return Err(Rejection::NameTaken { kind, name: name.to_owned() });
    }
    Ok(())
}

fn check_range(field: Field, value: u64, min: u64, max: u64) -> Result<(), Rejection> {
    if (min..=max).contains(&value) { Ok(()) } else { Err(Rejection::OutOfRange { field, value, min, max }) }
}

fn check_length(field: Field, text: &[u8], max: usize) -> Result<(), Rejection> {
    check_range(field, text.len() as u64, 1, max as u64)
}

fn check_room(kind: ObjectKind, count: usize, max: usize) -> Result<(), Rejection> {
    if count < max { Ok(()) } else { Err(Rejection::TooMany { kind, max: max as u64 }) }
}

/// A reporter's text, cut to what the state keeps.
fn cut(text: &str) -> String {
    text[..text.floor_char_boundary(TEXT_BYTES_MAX)].to_owned()
}
