//! The project's own commands: `cargo xtask demo`, `test`, `bench`, `build`, `tidy`, `lab`, `chaos`.
//!
//! ```text
//!  demo ─┐                      ┌─ tests::Pool: real daemons on loopback addresses
//!  test ─┼─▶ machine: what is   ├─ cargo: fmt, clippy, build, test
//!  chaos ┘   missing, install   └─ tidy: rules that no compiler checks
//! ```
//!
//! Needs nothing but Rust and a C linker to be built itself; what the rest needs it installs as root, or names.

#![expect(clippy::print_stdout, reason = "a program that talks to a person")]

mod bench;
mod build;
mod demo;
mod guard;
mod lab;
mod machine;
mod test;
mod tidy;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Work on this project.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Shows a pool at work: three hosts, a VM, a live migration, a dead host
    Demo,
    /// Format, lints, tidy, all tests, a short chaos campaign, the quick scenarios of the lab
    Test,
    /// Builds the programs and the probe guest
    Build {
        /// With optimisation
        #[arg(long)]
        release: bool,
    },
    /// Rules that no compiler checks
    Tidy,
    /// Figures of this project beside those of others
    Bench {
        /// What to measure
        #[command(subcommand)]
        what: bench::Bench,
    },
    /// Scenarios with unmodified Linux guests under a true KVM, inside a machine in software
    Lab {
        /// Only lists the scenarios
        #[arg(long)]
        list: bool,
        /// Only the quick ones, with the programs of the tests
        #[arg(long)]
        quick: bool,
        /// With the programs of the tests: quick to build, too slow for a pool where they are interpreted
        #[arg(long)]
        dev: bool,
        /// Which ones; all of them by default
        scenarios: Vec<String>,
    },
    /// Cleans up after the process at the other end of its input
    #[command(name = guard::COMMAND, hide = true)]
    CollectLeftovers,
    /// Faults on a pool of real processes, and checkers; see chaos/README.md
    Chaos {
        /// Passed on to the program: --seed 7 --minutes 10, scenario all, replay DIR
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

fn main() -> Result<ExitCode> {
    match Arguments::parse().command {
        Command::Demo => demo::run()?,
        Command::Test => test::run()?,
        Command::Build { release } => {
            machine::prepare_build()?;
            build::programs(if release { build::Profile::Release } else { build::Profile::Dev })?;
        }
        Command::Tidy => tidy::run()?,
        Command::Bench { what } => what.run()?,
        Command::Lab { list: true, .. } => lab::list(),
        Command::Lab { quick: true, .. } => lab::quick()?,
        Command::Lab { scenarios, dev: true, .. } => lab::run(&scenarios, build::Profile::Dev)?,
        Command::Lab { scenarios, .. } => lab::run(&scenarios, build::Profile::Release)?,
        Command::CollectLeftovers => guard::run(),
        Command::Chaos { arguments } => return chaos(&arguments),
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs the campaign program; its exit code tells what it found.
fn chaos(arguments: &[String]) -> Result<ExitCode> {
    machine::prepare_run()?;
    // Programs that can do without a safety rule are kept apart, so that they are never taken for the others.
    let profile = if arguments.first().is_some_and(|word| word == "teeth") {
        build::Profile::Sabotage
    } else {
        build::Profile::Dev
    };
    let programs = build::programs(profile)?;
    let status =
        build::prebuilt(std::process::Command::new(programs.join("chaos")).args(arguments)).status()?;
    let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
    Ok(ExitCode::from(code))
}
