//! By what an action is found in the logs: its VM, and the task and the request that it is part of.

use pool_state::{Command, PoolState, reconcile::HostAction};
use proto::{MigrationId, TaskId, VmId};

/// The span in which an action is carried out; all that is logged meanwhile names the ids.
pub fn span_of(state: &PoolState, action: &HostAction) -> tracing::Span {
    let (vm, task) = subject(state, action);
    let request = task.and_then(|task| state.tasks.get(&task)).map(|task| task.request_id.as_str());
    tracing::info_span!(
        "action",
        vm = vm.map(tracing::field::display),
        task = task.map(tracing::field::display),
        request = request.filter(|request| !request.is_empty()),
    )
}

fn subject(state: &PoolState, action: &HostAction) -> (Option<VmId>, Option<TaskId>) {
    let of_vm = |vm: VmId| (Some(vm), state.vms.get(&vm).and_then(|vm| vm.task));
    let of_migration = |id: MigrationId| {
        let migration = state.migrations.get(&id);
        (migration.map(|migration| migration.vm), migration.map(|migration| migration.task))
    };
    match action {
        HostAction::SpawnAndStart { vm, .. }
        | HostAction::Destroy { vm, .. }
        | HostAction::Stop { vm, .. }
        | HostAction::Pause { vm }
        | HostAction::Resume { vm }
        | HostAction::UpdateVolumes { vm, .. } => of_vm(*vm),
        HostAction::PrepareIncoming { migration }
        | HostAction::StartOutgoing { migration }
        | HostAction::ProposeCommit { migration, .. }
        | HostAction::ReportCommitted { migration }
        | HostAction::ResumeAfterAbort { migration }
        | HostAction::ActivateIncoming { migration }
        | HostAction::TakeBack { migration } => of_migration(*migration),
        HostAction::CopySnapshot { loan, .. } => (None, Some(loan.task)),
        HostAction::Scrub { volume, .. } | HostAction::EndScrub { volume, .. } => {
            (None, state.volumes.get(volume).and_then(|volume| volume.scrub).map(|scrub| scrub.task))
        }
        HostAction::OpenService { volume, .. }
        | HostAction::CloseService { volume, .. }
        | HostAction::DestroyService { volume, .. }
        | HostAction::UpdateService { volume, .. }
        | HostAction::Work { volume, .. } => {
            let service = state.volumes.get(volume).and_then(|volume| volume.service.as_ref());
            (None, service.and_then(|service| service.loan.map(|loan| loan.task).or(service.task)))
        }
        HostAction::Report(command) => match command {
            Command::VmRunning { vm, .. }
            | Command::VmStopped { vm, .. }
            | Command::VmFailed { vm, .. }
            | Command::RestartVm { vm, .. } => of_vm(*vm),
            Command::MigrationSourceReady { migration, .. }
            | Command::MigrationPrepared { migration, .. }
            | Command::MigrationCopying { migration }
            | Command::MigrationPaused { migration }
            | Command::MigrationAbort { migration, .. }
            | Command::MigrationDone { migration, .. } => of_migration(*migration),
            _ => (None, None),
        },
    }
}
