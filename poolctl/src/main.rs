//! `poolctl`: the command line of a pool.
//!
//! ```text
//!  argv ─▶ args (clap, value parsers) ─▶ commands ──▶ client ──gRPC, mTLS──▶ any host of the pool
//!                                          │  ▲          └─ hosts file: addresses learned from the pool
//!                                          │  └─ wait: follows tasks and migrations to their end, with progress
//!                                          ▼
//!                                    view ─▶ output: table · wide · json · yaml · name
//! ```
//!
//! Always holds:
//! - Bad input is refused before any connection is made.
//! - A change carries one request id over all its attempts, so that failing over never doubles it.
//! - Standard output carries results only; progress, hints and errors go to standard error.
//! - The exit code tells the class of a failure ([`failure::Exit`]).
//!
//! Deliberately absent: decisions. What is allowed is judged by the pool, where it is committed.

mod args;
mod client;
mod commands;
mod config;
mod disk;
mod failure;
mod output;
mod progress;
mod reference;
mod view;
mod wait;

use clap::Parser as _;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = match args::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return output::report_usage(&error, std::env::args()),
    };
    let format = cli.global.output;
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return output::report(&failure::Failure::local("poolctl", error), format),
    };
    match runtime.block_on(commands::run(cli)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => output::report(&failure, format),
    }
}
