//! `poolctl task`.

use super::Session;
use crate::{
    args::TaskCommand,
    client::{call, new_meta},
    failure::Failure,
    view::TaskView,
    wait,
};
use proto::{
    TaskId,
    v1::{CancelTaskRequest, ListTasksRequest, Task, TaskRef, task_service_client::TaskServiceClient},
};
use std::ops::ControlFlow;

/// Runs a command of tasks.
///
/// # Errors
/// As the pool answers.
pub async fn run(command: TaskCommand, session: &mut Session) -> Result<(), Failure> {
    match command {
        TaskCommand::List => {
            let list = call!(session.client, TaskServiceClient, list, ListTasksRequest {}).await?;
            let views: Vec<TaskView> = list.tasks.into_iter().map(TaskView::from).collect();
            session.output.list(list.revision, &views)
        }
        TaskCommand::Show { id: TaskId(id) } => {
            let task = call!(session.client, TaskServiceClient, show, TaskRef { id }).await?;
            session.output.show(&TaskView::from(task))
        }
        TaskCommand::Cancel { id: TaskId(id) } => {
            let request = CancelTaskRequest { meta: new_meta(), id };
            let task = call!(session.client, TaskServiceClient, cancel, request).await?;
            let sentence = format!("{} is {}", TaskId(id), task.state);
            session.output.changed(&TaskView::from(task), &sentence)
        }
        TaskCommand::Wait { id } => {
            wait::task(&session.client, id, &id.to_string(), "waiting").await?;
            let task = call!(session.client, TaskServiceClient, show, TaskRef { id: id.0 }).await?;
            session.output.changed(&TaskView::from(task), &format!("{id} is done"))
        }
        TaskCommand::Watch { id: TaskId(id) } => {
            let Session { client, output, .. } = session;
            let open = |channel| async move { TaskServiceClient::new(channel).watch(TaskRef { id }).await };
            let print = |task: Task| {
                let ended = task.state != "running";
                output.stream(&TaskView::from(task))?;
                Ok(if ended { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
            };
            client.follow(open, print).await
        }
    }
}
