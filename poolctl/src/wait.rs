//! Following work to its end, over the failure of any host.

use crate::{
    client::Client,
    failure::{Exit, Failure},
    progress::{MigrationBar, Spinner},
};
use proto::{
    MigrationId, TaskId,
    v1::{
        Migration, MigrationRef, Task, TaskRef, migration_service_client::MigrationServiceClient,
        task_service_client::TaskServiceClient,
    },
};
use std::ops::ControlFlow;

/// Waits until a task has ended.
///
/// # Errors
/// When the task failed or was cancelled, or could not be followed.
pub async fn task(client: &Client, id: TaskId, object: &str, what: &str) -> Result<(), Failure> {
    let spinner = Spinner::new(what);
    let mut last = Task::default();
    let open = |channel| async move { TaskServiceClient::new(channel).watch(TaskRef { id: id.0 }).await };
    let followed = client.follow(open, |task: Task| {
        spinner.task(&task);
        last = task;
        Ok(if last.state == "running" { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
    });
    followed.await.map_err(|failure| name_task(failure, id))?;
    task_result(&last, id, object)
}

/// The failure of a task that has ended otherwise than well.
fn task_result(task: &Task, id: TaskId, object: &str) -> Result<(), Failure> {
    match task.state.as_str() {
        "done" => Ok(()),
        "cancelled" => {
            Err(Failure::new(Exit::Failed, "TASK_CANCELLED", object, format!("{id} was cancelled")))
        }
        _ => {
            let cause = if task.error.is_empty() { format!("{id} failed") } else { task.error.clone() };
            Err(Failure::new(Exit::Failed, "TASK_FAILED", object, cause)
                .with_remedy(format!("poolctl task show {id}")))
        }
    }
}

/// Waits until a migration has ended, whatever its outcome.
///
/// # Errors
/// When it could not be followed.
pub async fn migration(client: &Client, begun: Migration) -> Result<Migration, Failure> {
    let id = begun.id;
    let bar = MigrationBar::new();
    bar.update(&begun);
    let mut last = begun;
    let open = |channel| async move { MigrationServiceClient::new(channel).watch(MigrationRef { id }).await };
    let followed = client.follow(open, |migration: Migration| {
        bar.update(&migration);
        last = migration;
        Ok(if last.outcome == "running" { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
    });
    followed.await.map_err(|failure| {
        let show = format!("poolctl migration show {}", MigrationId(id));
        if failure.exit == Exit::TimedOut { failure.with_remedy(show) } else { failure }
    })?;
    Ok(last)
}

/// The failure of a migration that has ended otherwise than well.
///
/// # Errors
/// When its outcome is not `done`.
pub fn migration_result(migration: &Migration) -> Result<(), Failure> {
    let id = MigrationId(migration.id);
    let object = format!("vm {}", migration.vm);
    let cause = |otherwise: &str| match migration.error.as_str() {
        "" => format!("{id} {otherwise}"),
        error => format!("{id}: {error}"),
    };
    match migration.outcome.as_str() {
        "done" => Ok(()),
        "cancelled" => Err(Failure::new(Exit::Failed, "MIGRATION_CANCELLED", object, cause("was cancelled"))),
        _ => Err(Failure::new(Exit::Failed, "MIGRATION_FAILED", object, cause("failed"))
            .with_remedy(format!("poolctl migration show {id}"))),
    }
}

/// Says which task goes on when the caller's time is up.
fn name_task(failure: Failure, id: TaskId) -> Failure {
    if failure.exit != Exit::TimedOut {
        return failure;
    }
    let remedy = format!("poolctl task watch {id}");
    Failure { object: id.to_string(), ..failure }.with_remedy(remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_done_is_success() {
        let task =
            |state: &str| Task { state: state.into(), error: "no kernel".into(), ..Default::default() };
        assert_eq!(task_result(&task("done"), TaskId(1), "vm a"), Ok(()));
        let failed = task_result(&task("failed"), TaskId(1), "vm a").unwrap_err();
        assert_eq!((failed.exit, failed.cause.as_str()), (Exit::Failed, "no kernel"));
        assert!(task_result(&task("cancelled"), TaskId(1), "vm a").is_err());

        let migration = |outcome: &str| Migration { id: 3, outcome: outcome.into(), ..Default::default() };
        assert_eq!(migration_result(&migration("done")), Ok(()));
        assert_eq!(migration_result(&migration("failed")).unwrap_err().reason, "MIGRATION_FAILED");
        assert_eq!(migration_result(&migration("cancelled")).unwrap_err().reason, "MIGRATION_CANCELLED");
    }

    #[test]
    fn a_timeout_names_the_task_that_goes_on() {
        let failure = Failure::timed_out("command", std::time::Duration::from_secs(1));
        let named = name_task(failure, TaskId(20));
        assert_eq!((named.object.as_str(), named.remedy.as_str()), ("task-20", "poolctl task watch task-20"));
    }
}
