//! What each command does: one file for each kind of object.

mod console;
mod events;
mod hosts;
mod images;
mod migrations;
mod pools;
mod tasks;
mod vms;
mod volumes;

use crate::{
    args::{Cli, Noun},
    client::Client,
    config,
    failure::Failure,
    output::Output,
};
use clap::CommandFactory as _;
use std::io;

/// What every command works with.
pub struct Session {
    /// The pool.
    pub client: Client,
    /// Where results go.
    pub output: Output<io::Stdout>,
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
    let client = Client::new(&config::path(global.config)?, global.timeout)?;
    let mut session = Session { client, output };
    let result = dispatch(noun, &mut session).await;
    session.client.finish().await;
    result
}

async fn dispatch(noun: Noun, session: &mut Session) -> Result<(), Failure> {
    match noun {
        Noun::Pool(command) => pools::run(command, session).await,
        Noun::Ha(command) => pools::run_ha(command, session).await,
        Noun::Host(command) => hosts::run(command, session).await,
        Noun::Volume(command) => volumes::run(command, session).await,
        Noun::Image(command) => images::run(command, session).await,
        Noun::Vm(command) => vms::run(command, session).await,
        Noun::Migration(command) => migrations::run(command, session).await,
        Noun::Console(command) => console::run(command, session).await,
        Noun::Task(command) => tasks::run(command, session).await,
        Noun::Event(command) => events::run(command, session).await,
        // Done before there was a session.
        Noun::Completion { .. } | Noun::Man => Ok(()),
    }
}
