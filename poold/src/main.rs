//! `poold`, the pool daemon.

use clap::Parser;
use poold::cli::{Cli, CliCommand};
use poold::commands;
use poold::config::{COMMAND_LOG_FILTER, HostConfig, LOG_FILTER, LogFormat};
use poold::logs::LogWriter;
use std::process::ExitCode;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// Threads of the runtime: the daemon waits for disks and peers; the VMs need the cores.
const WORKER_THREADS: usize = 2;

/// The first of these that says something and can be read.
fn log_filter(wishes: [Option<String>; 3]) -> Targets {
    let wishes = wishes.iter().flatten().filter(|wish| !wish.is_empty());
    wishes.flat_map(|wish| wish.parse()).next().unwrap_or_default()
}

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
    let configured = config.and_then(|config| config.log_filter);
    let filter = log_filter([std::env::var("RUST_LOG").ok(), configured, Some(usual.to_owned())]);
    let writer = match &cli.command {
        CliCommand::Serve { data, .. } if is_member => LogWriter::at(data),
        _ => LogWriter::stderr(),
    };
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(false);
    let logs = tracing_subscriber::registry().with(filter);
    if log_json {
        logs.with(lines.json()).init()
    } else {
        logs.with(lines).init()
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
