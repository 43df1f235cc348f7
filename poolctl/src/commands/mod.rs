//! What each command does: one file for each kind of object.

mod clusters;
mod console;
mod copies;
mod events;
mod govern;
mod groups;
mod hosts;
mod images;
mod migrations;
mod networks;
mod pools;
mod snapshots;
mod support;
mod tasks;
mod users;
mod vms;
mod volumes;

use crate::{
    args::{Cli, Noun},
    client::{Client, call},
    config,
    failure::Failure,
    output::Output,
    view::TaskView,
    wait,
};
use clap::CommandFactory as _;
use proto::{
    TaskId,
    v1::{Task, TaskRef, task_service_client::TaskServiceClient},
};
use std::{io, path::PathBuf};

/// What every command works with.
pub struct Session {
    /// The pool.
    pub client: Client,
    /// Where results go.
    pub output: Output<io::Stdout>,
    /// The configuration that was read.
    pub config_path: PathBuf,
}

/// Runs a command.
///
/// # Errors
/// Why it did not do what was asked.
pub async fn run(cli: Cli) -> Result<(), Failure> {
    let Cli { global, noun } = cli;
    let mut output = Output::new(global.output);
    match noun {
        Noun::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "poolctl", &mut script);
            return output.raw(&script);
        }
        Noun::Man => {
            let mut page = Vec::new();
            let rendered = clap_mangen::Man::new(Cli::command()).render(&mut page);
            rendered.map_err(|error| Failure::local("manual page", error))?;
            return output.raw(&page);
        }
        _ => {}
    }
    let config_path = config::path(global.config)?;
    let client = Client::new(&config_path, global.timeout)?;
    let mut session = Session { client, output, config_path };
    let result = dispatch(noun, &mut session).await;
    session.client.finish().await;
    result
}

/// Waits for a task of the pool and shows how it ended, or shows the task alone.
///
/// # Errors
/// When the task that is waited for fails.
async fn end_of_pool_task(
    session: &mut Session,
    task: Task,
    object: &str,
    what: &str,
    detach: bool,
) -> Result<(), Failure> {
    let id = TaskId(task.id);
    if detach {
        return session.output.changed(&TaskView::from(task), &id.to_string());
    }
    wait::task(&session.client, id, object, what).await?;
    let task = call!(session.client, TaskServiceClient, show, TaskRef { id: id.0 }).await?;
    session.output.changed(&TaskView::from(task), &format!("{what} {object}: done"))
}

async fn dispatch(noun: Noun, session: &mut Session) -> Result<(), Failure> {
    match noun {
        Noun::Pool(command) => pools::run(command, session).await,
        Noun::Ha(command) => pools::run_ha(command, session).await,
        Noun::Host(command) => hosts::run(command, session).await,
        Noun::Volume(command) => volumes::run(command, session).await,
        Noun::Snapshot(command) => snapshots::run(command, session).await,
        Noun::Image(command) => images::run(command, session).await,
        Noun::Vm(command) => vms::run(command, session).await,
        Noun::Migration(command) => migrations::run(command, session).await,
        Noun::Console(command) => console::run(command, session).await,
        Noun::Task(command) => tasks::run(command, session).await,
        Noun::Event(command) => events::run(command, session).await,
        Noun::Group(command) => groups::run(command, session).await,
        Noun::Cluster(command) => clusters::run(command, session).await,
        Noun::Net(command) => networks::run(command, session).await,
        Noun::Balance(command) => pools::run_balance(command, session).await,
        Noun::User(command) => users::run(command, session).await,
        Noun::Upgrade(command) => govern::upgrade(command, session).await,
        Noun::Support(command) => support::run(command, session).await,
        // Done before there was a session.
        Noun::Completion { .. } | Noun::Man => Ok(()),
    }
}
