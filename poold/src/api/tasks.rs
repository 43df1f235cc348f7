//! Service `TaskService`.

use super::views;
use crate::{api::require_user, node::NodeContext};
use futures::Stream;
use pool_state::Command;
use proto::{
    TaskId,
    v1::{
        CancelTaskRequest, ListTasksRequest, ListTasksResponse, Task, TaskRef,
        task_service_server::TaskService,
    },
};
use std::pin::Pin;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// Updates ahead of a slow watcher; it gets the newest state next, so few are enough.
const UPDATES_AHEAD: usize = 4;

/// gRPC service `TaskService`.
pub struct TaskApi {
    context: NodeContext,
}

impl TaskApi {
    /// The service of this host.
    pub fn new(context: NodeContext) -> Self {
        Self { context }
    }
}

/// Sends the task at each of its changes until it has ended.
async fn watch(context: NodeContext, id: TaskId, sender: mpsc::Sender<Result<Task, Status>>) {
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
        let view = views::task(&state, task);
        if last.as_ref() != Some(&view) {
            if sender.send(Ok(view.clone())).await.is_err() || !task.is_running() {
                return;
            }
            last = Some(view);
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
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
        let tasks = state.tasks.values().map(|task| views::task(&state, task)).collect();
        Ok(Response::new(ListTasksResponse { revision: state.revision, tasks }))
    }

    async fn show(&self, request: Request<TaskRef>) -> Result<Response<Task>, Status> {
        require_user(&request)?;
        let state = self.context.fresh().await;
        let task = views::found(state.task(TaskId(request.get_ref().id)))?;
        Ok(Response::new(views::task(&state, task)))
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
        tokio::spawn(watch(self.context.clone(), task, sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}
