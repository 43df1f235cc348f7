//! `poolctl event`.

use super::Session;
use crate::{
    args::EventCommand,
    client::call,
    failure::Failure,
    view::{AuditView, EventView},
};
use proto::v1::{
    AuditRequest, Event, PoolShowRequest, WatchEventsRequest, event_service_client::EventServiceClient,
    pool_service_client::PoolServiceClient,
};
use std::{cell::Cell, ops::ControlFlow};

/// Runs a command of events.
///
/// # Errors
/// As the pool answers.
pub async fn run(command: EventCommand, session: &mut Session) -> Result<(), Failure> {
    let from = match command {
        EventCommand::Watch { from } => from,
        EventCommand::Audit { from } => return audit(from, session).await,
    };
    let from = match from {
        Some(from) => from,
        None => call!(session.client, PoolServiceClient, show, PoolShowRequest {}).await?.revision + 1,
    };
    let Session { client, output, .. } = session;
    let cursor = Cursor::new(from);
    let open = |channel| {
        let request = WatchEventsRequest { from_revision: cursor.revision.get() };
        async move { EventServiceClient::new(channel).watch(request).await }
    };
    let print = |event: Event| {
        if cursor.is_news(&event) {
            output.stream(&EventView::from(event))?;
        }
        Ok(ControlFlow::Continue(()))
    };
    client.follow(open, print).await
}

async fn audit(from_revision: u64, session: &mut Session) -> Result<(), Failure> {
    let answer = call!(session.client, EventServiceClient, audit, AuditRequest { from_revision }).await?;
    let views: Vec<AuditView> = answer.records.into_iter().map(AuditView::from).collect();
    session.output.list(answer.revision, &views)
}

/// Where a watch is. Another host begins again with the first event of a revision, so that some come twice.
struct Cursor {
    revision: Cell<u64>,
    /// First ordinal of that revision that has not been seen.
    ordinal: Cell<u32>,
}

impl Cursor {
    fn new(from: u64) -> Self {
        Self { revision: Cell::new(from), ordinal: Cell::new(0) }
    }

    /// Whether an event has not been seen; then it has been.
    fn is_news(&self, event: &Event) -> bool {
        if (event.revision, event.ordinal) < (self.revision.get(), self.ordinal.get()) {
            return false;
        }
        self.revision.set(event.revision);
        self.ordinal.set(event.ordinal.saturating_add(1));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_that_begins_again_shows_no_event_twice_and_leaves_none_out() {
        let event = |revision, ordinal| Event { revision, ordinal, ..Default::default() };
        let cursor = Cursor::new(5);
        assert!(!cursor.is_news(&event(4, 9)));
        assert!(cursor.is_news(&event(5, 0)));
        assert!(cursor.is_news(&event(7, 0)));
        // The connection breaks between two events of one revision.
        assert_eq!(cursor.revision.get(), 7);
        assert!(!cursor.is_news(&event(7, 0)));
        assert!(cursor.is_news(&event(7, 1)));
        assert!(cursor.is_news(&event(8, 0)));
    }
}
