//! `poold`, the pool daemon.

use clap::Parser;
use poold::cli::{Cli, CliCommand};
use poold::commands;
use poold::config::{COMMAND_LOG_FILTER, HostConfig, LOG_FILTER, LogFormat};
use poold::logs::LogWriter;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

/// Threads of the runtime: the daemon waits for disks and peers; the VMs need the cores.
const WORKER_THREADS: usize = 2;

fn main() -> ExitCode {
    let cli = Cli::parse();
    // What is wrong with it the command itself will say.
    let config = match &cli.command {
        CliCommand::Serve { data, .. } => HostConfig::load(data).ok().flatten(),
        _ => None,
    };
    let log_json = matches!(cli.command, CliCommand::Serve { log_json: true, .. })
        || config.as_ref().is_some_and(|config| config.log_format == Some(LogFormat::Json));
    // A folder that is no host's gets nothing written into it.
    let is_member = config.is_some();
    let usual = match &cli.command {
        CliCommand::Serve { .. } => LOG_FILTER,
        // A command says itself what it has done.
        _ => COMMAND_LOG_FILTER,
    };
    let filter = config.and_then(|config| config.log_filter).unwrap_or_else(|| usual.to_owned());
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(filter));
    let writer = match &cli.command {
        CliCommand::Serve { data, .. } if is_member => LogWriter::at(data),
        _ => LogWriter::stderr(),
    };
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).with_ansi(false);
    if log_json {
        logs.json().init()
    } else {
        logs.init()
    }
    if let Some(sabotage) = proto::Sabotage::chosen() {
        tracing::error!(
            without = sabotage.name(),
            "this build is for chaos campaigns only: a safety rule is left out"
        );
    }
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(WORKER_THREADS).enable_all().build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(commands::run(cli.command)),
        Err(error) => Err(commands::Failure::failed(format!("the runtime does not start: {error}"))),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("poold: {}", failure.message);
            ExitCode::from(failure.code)
        }
    }
}
