//! The daemon's commands, and the exit codes of their failures (the same as poolctl's).

mod config;
mod init;
mod join;
pub mod recover;
mod serve;

use crate::cli::{CliCommand, ConfigCommand};
use crate::faults;

/// A failed command: what to print and how to exit.
#[derive(Debug)]
pub struct Failure {
    /// Exit code: 1 failed, 2 usage, 4 blocked, 5 no pool reached, 7 denied.
    pub code: u8,
    /// Object, cause and remedy.
    pub message: String,
}

impl Failure {
    /// Failed for a reason that no other code names.
    #[must_use]
    pub fn failed(message: String) -> Self {
        Self { code: 1, message }
    }

    /// The command line is wrong.
    #[must_use]
    pub fn usage(message: String) -> Self {
        Self { code: 2, message }
    }

    /// Something must be put right first.
    #[must_use]
    pub fn blocked(message: String) -> Self {
        Self { code: 4, message }
    }
}

/// An error with its causes, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

/// Runs a command to its end.
///
/// # Errors
/// What the operator must read.
pub async fn run(command: CliCommand) -> Result<(), Failure> {
    match command {
        CliCommand::Init { host, name, timing } => init::run(host, name, timing).await,
        CliCommand::Join { host, token } => join::run(host, token).await,
        CliCommand::Rekey { data, token } => join::rekey(&data, &token).await,
        CliCommand::Recover(args) => recover::run(args).await,
        CliCommand::Config(ConfigCommand::Check { data }) => config::check(&data),
        CliCommand::Config(ConfigCommand::Example) => config::example(),
        CliCommand::Serve { data, metrics, prove_memory, fault_socket, .. } => {
            if let Some(path) = &fault_socket {
                faults::listen(path)
                    .map_err(|error| Failure::failed(format!("{}: {error}", path.display())))?;
            }
            serve::run(&data, metrics, prove_memory).await
        }
    }
}
