//! `poolctl migration` and `poolctl vm migrate`.

use super::Session;
use crate::{
    args::{MigrateArguments, MigrationCommand, Policy},
    client::{call, new_meta},
    failure::{Exit, Failure},
    view::{MigrationView, PlanView},
    wait,
};
use proto::{
    MigrationId, TaskId,
    v1::{
        CancelMigrationRequest, ListMigrationsRequest, MigrationRef, StartMigrationRequest,
        migration_service_client::MigrationServiceClient,
    },
};

/// Runs a command of migrations.
///
/// # Errors
/// As the pool answers; a plan with blockers is a failure too.
pub async fn run(command: MigrationCommand, session: &mut Session) -> Result<(), Failure> {
    match command {
        MigrationCommand::List => {
            let list = call!(session.client, MigrationServiceClient, list, ListMigrationsRequest {}).await?;
            let views: Vec<MigrationView> = list.migrations.into_iter().map(MigrationView::from).collect();
            session.output.list(list.revision, &views)
        }
        MigrationCommand::Show { id: MigrationId(id) } => {
            let migration = call!(session.client, MigrationServiceClient, show, MigrationRef { id }).await?;
            session.output.show(&MigrationView::from(migration))
        }
        MigrationCommand::Cancel { id: MigrationId(id) } => {
            let request = CancelMigrationRequest { meta: new_meta(), id };
            let migration = call!(session.client, MigrationServiceClient, cancel, request).await?;
            let sentence = format!("{} is being taken back", MigrationId(id));
            session.output.changed(&MigrationView::from(migration), &sentence)
        }
        MigrationCommand::Plan { vm, to } => {
            let request = StartMigrationRequest { vm, target: to.unwrap_or_default(), ..Default::default() };
            plan(request, session).await
        }
    }
}

/// `poolctl vm migrate`.
///
/// # Errors
/// As the pool answers, and when the VM did not move.
pub async fn migrate(arguments: MigrateArguments, session: &mut Session) -> Result<(), Failure> {
    let request = request_of(&arguments);
    if arguments.dry_run {
        return plan(request, session).await;
    }
    let begun = call!(session.client, MigrationServiceClient, start, request).await?;
    if arguments.detach {
        let task = TaskId(begun.task).to_string();
        return session.output.changed(&MigrationView::from(begun), &task);
    }
    let ended = wait::migration(&session.client, begun).await?;
    let result = wait::migration_result(&ended);
    let view = MigrationView::from(ended);
    let sentence = view.sentence();
    // The record is worth having in either case.
    session.output.changed(&view, &sentence)?;
    result
}

fn request_of(arguments: &MigrateArguments) -> StartMigrationRequest {
    let policy = arguments.policy.map_or("", |policy| match policy {
        Policy::Gentle => "gentle",
        Policy::Default => "default",
        Policy::PostCopy => "post-copy",
        Policy::MustFinish => "must-finish",
    });
    let downtime_ms = arguments.downtime.map_or(0, |limit| limit.as_millis());
    StartMigrationRequest {
        meta: new_meta(),
        vm: arguments.vm.clone(),
        target: arguments.to.clone().unwrap_or_default(),
        policy: policy.to_owned(),
        bandwidth_bytes_per_s: arguments.bandwidth.map_or(0, |bandwidth| bandwidth.0),
        connections: arguments.connections.map_or(0, u32::from),
        downtime_ms: u32::try_from(downtime_ms).unwrap_or(u32::MAX),
    }
}

async fn plan(request: StartMigrationRequest, session: &mut Session) -> Result<(), Failure> {
    let plan = call!(session.client, MigrationServiceClient, plan, request).await?;
    let view = PlanView::from(plan);
    session.output.show(&view)?;
    blocked(&view)
}

fn blocked(plan: &PlanView) -> Result<(), Failure> {
    match plan.blockers() {
        [] => Ok(()),
        blockers => Err(Failure::new(Exit::Blocked, "MIGRATION_BLOCKED", "migration", blockers.join("; "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::v1;

    #[test]
    fn blockers_are_a_failure_that_names_all_of_them() {
        let plan = |blockers: &[&str]| {
            let blockers = blockers.iter().map(|text| (*text).to_owned()).collect();
            PlanView::from(v1::MigrationPlan { vm: "a".into(), blockers, ..Default::default() })
        };
        assert_eq!(blocked(&plan(&[])), Ok(()));
        let failure = blocked(&plan(&["no memory", "same host"])).unwrap_err();
        assert_eq!((failure.exit, failure.cause.as_str()), (Exit::Blocked, "no memory; same host"));
    }
}
