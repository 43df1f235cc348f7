//! What a change is called in the audit log.

use crate::command::{ClusterCommand, VolumeCommand};
use crate::{
    command::{Command, Govern},
    state::{AuditRecord, PoolState},
};
use proto::{HostId, SnapshotId, TaskId, VmId, VolumeId};

/// Principals whose changes are recorded; those of hosts are reports, which the events show.
const USER_PREFIX: &str = "user-";

impl PoolState {
    /// What a change is called, e.g. `vm.start`, and what it is about, as this state knows it; none for reports of hosts.
    #[must_use]
    pub fn describe(&self, command: &Command) -> Option<(&'static str, String)> {
        describe(self, command)
    }
}

/// Whether somebody asked for it, and no host reports it.
pub(super) fn is_of_user(entry: &crate::Entry) -> bool {
    entry.principal.starts_with(USER_PREFIX)
}

/// The record of an accepted change, named by the state before it. None for reports of hosts.
pub(super) fn record(before: &PoolState, index: u64, entry: &crate::Entry) -> Option<AuditRecord> {
    if !is_of_user(entry) {
        return None;
    }
    let (action, object) = describe(before, &entry.command)?;
    Some(AuditRecord {
        revision: index,
        time_ms: entry.time_ms,
        principal: entry.principal.clone(),
        request_id: entry.request_id.clone().unwrap_or_default(),
        action: action.to_owned(),
        object,
    })
}

fn vm(state: &PoolState, id: VmId) -> String {
    state.vms.get(&id).map_or_else(|| id.to_string(), |vm| format!("vm {}", vm.name))
}

fn host(state: &PoolState, id: HostId) -> String {
    format!("host {}", state.host_name(id))
}

fn volume(state: &PoolState, id: VolumeId) -> String {
    state.volumes.get(&id).map_or_else(|| id.to_string(), |volume| format!("volume {}", volume.name))
}

fn snapshot(state: &PoolState, id: SnapshotId) -> String {
    format!("snapshot {}", state.snapshot_name(id))
}

fn task(state: &PoolState, id: TaskId) -> String {
    let of = state.tasks.get(&id).map(|task| format!(" ({} of {})", task.kind.as_str(), task.object));
    format!("task {id}{}", of.unwrap_or_default())
}

fn describe(state: &PoolState, command: &Command) -> Option<(&'static str, String)> {
    let pool = || format!("pool {}", state.settings.name);
    Some(match command {
        Command::InitPool(init) => ("pool.create", format!("pool {}", init.name)),
        Command::SetBrake => return None,
        Command::HaResume => ("ha.resume", pool()),
        Command::HaDisarm => ("ha.disarm", pool()),
        Command::HaArm => ("ha.arm", pool()),
        Command::StartBalance => ("balance.run", pool()),
        Command::CreateToken { .. } => ("token.create", "a join token".to_owned()),
        Command::RevokeToken { token } => ("token.revoke", token.to_string()),
        Command::JoinHost(join) => ("host.join", format!("host {}", join.facts.name)),
        Command::RemoveHost { host: id, .. } | Command::RetireHost { host: id, .. } => {
            ("host.remove", host(state, *id))
        }
        Command::SetHostLabels { host: id, .. } => ("host.label", host(state, *id)),
        Command::CordonHost { host: id } => ("host.cordon", host(state, *id)),
        Command::UncordonHost { host: id } => ("host.uncordon", host(state, *id)),
        Command::DrainHost { host: id } => ("host.drain", host(state, *id)),
        Command::RestoreHost { host: id } => ("host.restore", host(state, *id)),
        Command::ConfirmDead { host: id } => ("host.confirm-dead", host(state, *id)),
        Command::CreateImage { name, .. } => ("image.create", format!("image {name}")),
        Command::DeleteImage { image } => {
            let name = state.images.get(image).map_or_else(|| image.to_string(), |image| image.name.clone());
            ("image.delete", format!("image {name}"))
        }
        Command::CreateVolume { name, .. } => ("volume.create", format!("volume {name}")),
        Command::Volume(VolumeCommand::ResizeVolume { volume: id, .. }) => {
            ("volume.resize", volume(state, *id))
        }
        Command::Volume(VolumeCommand::LimitVolume { volume: id, .. }) => ("volume.set", volume(state, *id)),
        Command::DeleteVolume { volume: id } => ("volume.delete", volume(state, *id)),
        Command::Volume(VolumeCommand::ImportVolume { name, .. }) => {
            ("volume.import", format!("volume {name}"))
        }
        Command::Volume(VolumeCommand::ExportVolume { volume: id, .. }) => {
            ("volume.export", volume(state, *id))
        }
        Command::Volume(VolumeCommand::TakeSnapshot { volume: id, name }) => {
            ("snapshot.create", format!("{}@{name}", volume(state, *id)))
        }
        Command::Volume(VolumeCommand::DeleteSnapshot { snapshot: id }) => {
            ("snapshot.delete", snapshot(state, *id))
        }
        Command::Volume(VolumeCommand::RevertVolume { snapshot: id }) => {
            ("volume.revert", snapshot(state, *id))
        }
        Command::Volume(VolumeCommand::CloneVolume { name, .. }) => {
            ("volume.clone", format!("volume {name}"))
        }
        Command::Volume(VolumeCommand::CopySnapshot { name, .. }) => {
            ("volume.clone", format!("volume {name}"))
        }
        Command::Volume(VolumeCommand::ScrubVolume { volume: id, .. }) => {
            ("volume.scrub", volume(state, *id))
        }
        Command::Volume(VolumeCommand::ServeVolume { volume: id, .. }) => ("volume.nbd", volume(state, *id)),
        Command::Volume(VolumeCommand::StopServingVolume { volume: id }) => {
            ("volume.nbd-stop", volume(state, *id))
        }
        _ => return describe_rest(state, command),
    })
}

/// The changes of VMs, tasks, groups and users.
fn describe_rest(state: &PoolState, command: &Command) -> Option<(&'static str, String)> {
    let group = |id: &proto::GroupId| {
        state.groups.get(id).map_or_else(|| id.to_string(), |group| format!("group {}", group.name))
    };
    let network = |id: &proto::NetworkId| {
        state.networks.get(id).map_or_else(|| id.to_string(), |network| format!("network {}", network.name))
    };
    let user = |name: &str| format!("user {name}");
    Some(match command {
        Command::CloneVm { name, .. } => ("vm.clone", format!("vm {name}")),
        Command::CreateVm(create) => ("vm.create", format!("vm {}", create.name)),
        Command::DeleteVm { vm: id } => ("vm.delete", vm(state, *id)),
        Command::StartVm { vm: id, .. } => ("vm.start", vm(state, *id)),
        Command::StopVm { vm: id, .. } => ("vm.stop", vm(state, *id)),
        Command::RebootVm { vm: id, .. } => ("vm.reboot", vm(state, *id)),
        Command::PauseVm { vm: id } => ("vm.pause", vm(state, *id)),
        Command::ResumeVm { vm: id } => ("vm.resume", vm(state, *id)),
        Command::StartMigration { vm: id, .. } => ("vm.migrate", vm(state, *id)),
        Command::CancelMigration { migration } => ("migration.cancel", migration.to_string()),
        Command::CancelTask { task: id } => ("task.cancel", task(state, *id)),
        Command::CreateGroup(create) => ("group.create", format!("group {}", create.name)),
        Command::ChangeGroup(change) => ("group.change", group(&change.group)),
        Command::DeleteGroup { group: id } => ("group.delete", group(id)),
        Command::CreateNetwork(create) => ("network.create", format!("network {}", create.name)),
        Command::DeleteNetwork { network: id } => ("network.delete", network(id)),
        Command::CreateUser { name, .. } => ("user.create", user(name)),
        Command::SetUserRole { name, .. } => ("user.role", user(name)),
        Command::RotateUser { name, .. } => ("user.rotate", user(name)),
        Command::DeleteUser { name } => ("user.delete", user(name)),
        Command::Govern(change) => return describe_governance(state, change),
        Command::Cluster(change) => return Some(describe_cluster(state, change)),
        // Reports; a user does not make them.
        _ => return None,
    })
}

fn describe_cluster(state: &PoolState, change: &ClusterCommand) -> (&'static str, String) {
    match change {
        ClusterCommand::CreateCluster { name, .. } => ("cluster.create", format!("cluster {name}")),
        ClusterCommand::DeleteCluster { cluster } => {
            ("cluster.delete", format!("cluster {}", state.cluster_name(Some(*cluster))))
        }
        ClusterCommand::SetHostCluster { host: id, .. } => ("cluster.add", host(state, *id)),
        ClusterCommand::SetVmCluster { vm: id, .. } => ("cluster.add", vm(state, *id)),
    }
}

fn describe_governance(state: &PoolState, change: &Govern) -> Option<(&'static str, String)> {
    let pool = || format!("pool {}", state.settings.name);
    Some(match change {
        Govern::SetPool(_) => ("pool.set", pool()),
        Govern::RotateCa(_) => ("ca.rotate", pool()),
        Govern::FinishCaRotation => ("ca.finish", pool()),
        Govern::CreateAccessToken { user, .. } => ("token.access", format!("user {user}")),
        Govern::DeleteAccessToken { token } => ("token.revoke", token.to_string()),
        Govern::CreateKeyToken { host: id, .. } => ("host.rekey", host(state, *id)),
        Govern::ReplaceHostKey { host: id, .. } => ("host.key", host(state, *id)),
        Govern::SetHostVersion { .. }
        | Govern::RaiseFeatureLevel { .. }
        | Govern::HostTrusts { .. }
        | Govern::RefuseRequest => return None,
    })
}
