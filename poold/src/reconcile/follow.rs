//! Follows the migrations of local processes by their streams: a phase must be seen when it is reached, not at the next
//! poll.

use super::observe::is_final;
use crate::supervisor::{ProcessKey, Supervisor};
use futures::StreamExt as _;
use proto::MigrationId;
use std::collections::HashMap;
use tokio::task::JoinHandle;

/// The streams that are followed now.
#[derive(Default)]
pub struct Followers {
    tasks: HashMap<(ProcessKey, MigrationId), JoinHandle<()>>,
}

impl Drop for Followers {
    fn drop(&mut self) {
        for task in self.tasks.values() {
            task.abort();
        }
    }
}

impl Followers {
    /// Follows each migration that is under way and not followed yet.
    pub fn keep(&mut self, supervisor: &Supervisor) {
        self.tasks.retain(|_, task| !task.is_finished());
        for process in supervisor.processes() {
            let migration = process.status.as_ref().and_then(|status| status.migration.as_ref());
            let Some(migration) = migration.filter(|migration| !is_final(migration)) else { continue };
            let id = MigrationId(migration.migration_id);
            self.tasks
                .entry((process.key, id))
                .or_insert_with(|| tokio::spawn(follow(supervisor.clone(), process.key, id)));
        }
    }
}

async fn follow(supervisor: Supervisor, key: ProcessKey, migration: MigrationId) {
    let Some(machine) = supervisor.machine(key) else { return };
    match machine.watch_migration(migration).await {
        Ok(mut statuses) => {
            while let Some(Ok(status)) = statuses.next().await {
                supervisor.record(key, status);
            }
        }
        Err(error) => tracing::debug!(process = %key, %error, "the migration can't be followed"),
    }
    // The stream has ended with the migration or with the process; what is true now shows at the next question.
    supervisor.poke(key);
}
