//! Service `TaskService`.

use super::{known, views};
use crate::{agent::Agents, api::require_user, node::NodeContext};
use futures::Stream;
use pool_state::Command;
use proto::{
    HostId, TaskId,
    v1::{
        CancelTaskRequest, ListTasksRequest, ListTasksResponse, Task, TaskRef,
        task_service_server::TaskService,
    },
};
use std::{pin::Pin, time::Duration};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// Updates ahead of a slow watcher; it gets the newest state next, so few are enough.
const UPDATES_AHEAD: usize = 4;

/// How often a watcher is told how far work is that only the host knows that does it.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);

/// gRPC service `TaskService`.
pub struct TaskApi {
    context: NodeContext,
    agents: Agents,
}

impl TaskApi {
    /// The service of this host.
    pub fn new(context: NodeContext, agents: Agents) -> Self {
        Self { context, agents }
    }
}

/// Sends the task at each of its changes until it has ended.
async fn watch(
    (context, agents): (NodeContext, Agents),
    id: TaskId,
    sender: mpsc::Sender<Result<Task, Status>>,
) {
    let mut changes = context.consensus.watch();
    let mut last = None;
    loop {
        let state = changes.borrow_and_update().clone();
        let task = match views::found(state.task(id)) {
            Ok(task) => task,
            Err(status) => {
                let _ = sender.send(Err(status)).await;
                return;
            }
        };
        let host = known::hosts_of(&state, task);
        let view = known::task(&state, task, &agents.facts_of(host).await);
        if last.as_ref() != Some(&view) {
            if sender.send(Ok(view.clone())).await.is_err() || !task.is_running() {
                return;
            }
            last = Some(view);
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(PROGRESS_INTERVAL), if host.is_some() => {}
            () = sender.closed() => return,
            () = context.shutdown.cancelled() => return,
        }
    }
}

#[tonic::async_trait]
impl TaskService for TaskApi {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<Task, Status>> + Send>>;

    async fn list(&self, request: Request<ListTasksRequest>) -> Result<Response<ListTasksResponse>, Status> {
        require_user(&request)?;
        let state = self.context.fresh().await;
        let hosts: Vec<HostId> =
            state.tasks.values().filter_map(|task| known::hosts_of(&state, task)).collect();
        let facts = self.agents.facts_of(hosts).await;
        let tasks = state.tasks.values().map(|task| known::task(&state, task, &facts)).collect();
        Ok(Response::new(ListTasksResponse { revision: state.revision, tasks }))
    }

    async fn show(&self, request: Request<TaskRef>) -> Result<Response<Task>, Status> {
        require_user(&request)?;
        let state = self.context.fresh().await;
        let task = views::found(state.task(TaskId(request.get_ref().id)))?;
        let facts = self.agents.facts_of(known::hosts_of(&state, task)).await;
        Ok(Response::new(known::task(&state, task, &facts)))
    }

    async fn cancel(&self, request: Request<CancelTaskRequest>) -> Result<Response<Task>, Status> {
        let principal = require_user(&request)?;
        let CancelTaskRequest { meta, id } = request.into_inner();
        let task = TaskId(id);
        let (_, state) = self.context.change(&principal, meta, Command::CancelTask { task }).await?;
        Ok(Response::new(views::task(&state, views::found(state.task(task))?)))
    }

    async fn watch(&self, request: Request<TaskRef>) -> Result<Response<Self::WatchStream>, Status> {
        require_user(&request)?;
        let task = TaskId(request.get_ref().id);
        // Another host may have made it just now: the local state must be as new as that.
        views::found(self.context.fresh().await.task(task))?;
        let (sender, receiver) = mpsc::channel(UPDATES_AHEAD);
        tokio::spawn(watch((self.context.clone(), self.agents.clone()), task, sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}
