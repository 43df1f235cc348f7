//! Commands of migrations, tasks and events.

use crate::reference;
use clap::Subcommand;
use proto::{MigrationId, TaskId};

/// `poolctl migration …`
#[derive(Debug, Subcommand)]
pub enum MigrationCommand {
    /// All migrations that the pool remembers
    List,
    /// The record of one migration
    Show {
        /// Its id, such as mig-21
        #[arg(value_parser = reference::migration)]
        id: MigrationId,
    },
    /// Takes a migration back, while that is still possible
    Cancel {
        /// Its id, such as mig-21
        #[arg(value_parser = reference::migration)]
        id: MigrationId,
    },
    /// What a migration would do, and everything that forbids it
    Plan {
        /// The VM
        vm: String,
        /// The host to move to [default: the pool chooses]
        #[arg(long, value_name = "HOST")]
        to: Option<String>,
    },
}

/// `poolctl task …`
#[derive(Debug, Subcommand)]
pub enum TaskCommand {
    /// All tasks that the pool remembers
    List,
    /// One task
    Show {
        /// Its id, such as task-20
        #[arg(value_parser = reference::task)]
        id: TaskId,
    },
    /// Asks a task to stop
    Cancel {
        /// Its id, such as task-20
        #[arg(value_parser = reference::task)]
        id: TaskId,
    },
    /// Waits until a task has ended; fails if the task does
    Wait {
        /// Its id, such as task-20
        #[arg(value_parser = reference::task)]
        id: TaskId,
    },
    /// Prints a task at each of its changes until it has ended
    Watch {
        /// Its id, such as task-20
        #[arg(value_parser = reference::task)]
        id: TaskId,
    },
}

/// `poolctl event …`
#[derive(Debug, Subcommand)]
pub enum EventCommand {
    /// Prints events as they happen, without a gap, until interrupted
    Watch {
        /// First revision to print [default: from now on]
        #[arg(long, value_name = "REVISION")]
        from: Option<u64>,
    },
    /// Who changed what, oldest first
    Audit {
        /// First revision to print [default: all that the pool remembers]
        #[arg(long, value_name = "REVISION", default_value_t)]
        from: u64,
    },
}
