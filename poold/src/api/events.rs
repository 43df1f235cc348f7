//! Service `EventService`.

use super::views;
use crate::{api::require_user, node::NodeContext};
use futures::Stream;
use pool_state::PoolState;
use proto::v1::{AuditRequest, AuditResponse, Event, WatchEventsRequest, event_service_server::EventService};
use std::pin::Pin;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// Events ahead of a slow watcher; the log in the state holds what comes after them.
const EVENTS_AHEAD: usize = 64;

/// gRPC service `EventService`.
pub struct EventApi {
    context: NodeContext,
}

impl EventApi {
    /// The service of this host.
    pub fn new(context: NodeContext) -> Self {
        Self { context }
    }
}

/// The events of `from` and later.
fn events_since(state: &PoolState, from: u64) -> Result<Vec<Event>, Status> {
    let too_old = || {
        let oldest = state.events.oldest_revision();
        Status::out_of_range(format!(
            "events before revision {oldest} are gone; list the objects and watch from there"
        ))
    };
    Ok(state.events.since(from).ok_or_else(too_old)?.map(views::event).collect())
}

/// Sends all events from revision `next` on. Without a gap: what is sent next begins after the last revision seen.
async fn watch(context: NodeContext, mut next: u64, sender: mpsc::Sender<Result<Event, Status>>) {
    let mut changes = context.consensus.watch();
    loop {
        let state = changes.borrow_and_update().clone();
        // A watcher may be ahead of this host.
        if state.revision >= next {
            match events_since(&state, next) {
                Ok(events) => {
                    for event in events {
                        if sender.send(Ok(event)).await.is_err() {
                            return;
                        }
                    }
                }
                Err(status) => {
                    let _ = sender.send(Err(status)).await;
                    return;
                }
            }
            next = state.revision + 1;
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = sender.closed() => return,
            () = context.shutdown.cancelled() => return,
        }
    }
}

#[tonic::async_trait]
impl EventService for EventApi {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<Event, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<WatchEventsRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        require_user(&request)?;
        let from = request.get_ref().from_revision;
        let (sender, receiver) = mpsc::channel(EVENTS_AHEAD);
        tokio::spawn(watch(self.context.clone(), from, sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn audit(&self, request: Request<AuditRequest>) -> Result<Response<AuditResponse>, Status> {
        require_user(&request)?;
        let state = self.context.fresh().await;
        let records = state.audit.since(request.get_ref().from_revision).map(views::audit).collect();
        Ok(Response::new(AuditResponse { revision: state.revision, records }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pool_state::state::EventLog;

    #[test]
    fn an_empty_log_has_no_events_and_no_gap() {
        let state = PoolState { events: EventLog::default(), ..PoolState::default() };
        assert_eq!(events_since(&state, 0).map_err(|status| status.code()), Ok(vec![]));
    }
}
