//! The command line as types. Everything that can be checked without the pool is checked here.

mod govern;
mod hosts;
mod networks;
mod rules;
mod storage;
mod vms;
mod work;

#[cfg(test)]
mod tests;

pub use govern::{CaCommand, UpgradeCommand, UserTokenCommand};
pub use hosts::{BalanceCommand, HaCommand, HostCommand, PoolCommand, TokenCommand};
pub use networks::{NetArguments, NetCommand};
pub use rules::{ClusterCommand, GroupCommand, Members, Rule, SupportCommand, UserCommand};
pub use storage::{DiskFormat, ImageCommand, SnapshotCommand, VolumeCommand};
pub use vms::{ConsoleCommand, CreateArguments, HaPolicy, MigrateArguments, Policy, VmCommand};
pub use work::{EventCommand, MigrationCommand, TaskCommand};

use crate::{output::Format, reference};
use clap::{Args, Parser, Subcommand};
use std::{path::PathBuf, time::Duration};

/// Operates a pool of hosts. An object is named by its name, its id, or a unique prefix of either.
#[derive(Debug, Parser)]
#[command(name = "poolctl", version, propagate_version = true, arg_required_else_help = true)]
#[command(after_help = "Exit codes: 0 ok, 1 failed, 2 usage, 3 not found, 4 blocked or precondition, \
5 no quorum, 6 timed out (the task goes on), 7 denied.")]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub noun: Noun,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Configuration [default: ~/.config/poolctl/config.toml]
    #[arg(long, global = true, env = "POOLCTL_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Form of the result
    #[arg(short, long, global = true, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: Format,
    /// Longest wait, such as 30s; what was begun goes on
    #[arg(long, global = true, value_name = "DURATION", value_parser = reference::duration_ms)]
    pub timeout: Option<Duration>,
}

/// Kinds of objects.
#[derive(Debug, Subcommand)]
pub enum Noun {
    /// The pool as a whole
    #[command(subcommand)]
    Pool(PoolCommand),
    /// Recovery of VMs of lost hosts
    #[command(subcommand)]
    Ha(HaCommand),
    /// Hosts and join tokens
    #[command(subcommand)]
    Host(HostCommand),
    /// Replicated disks
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Snapshots of replicated disks
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Kernels, initrds and disk images
    #[command(subcommand)]
    Image(ImageCommand),
    /// Virtual machines
    #[command(subcommand)]
    Vm(VmCommand),
    /// Moves of VMs between hosts
    #[command(subcommand)]
    Migration(MigrationCommand),
    /// Serial consoles
    #[command(subcommand)]
    Console(ConsoleCommand),
    /// Long operations
    #[command(subcommand)]
    Task(TaskCommand),
    /// What happens in the pool
    #[command(subcommand)]
    Event(EventCommand),
    /// Rules about where VMs run
    #[command(subcommand)]
    Group(GroupCommand),
    /// Hosts with one CPU profile, and their VMs
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// Networks of VMs
    #[command(subcommand)]
    Net(NetCommand),
    /// An even use of all hosts
    #[command(subcommand)]
    Balance(BalanceCommand),
    /// Who may use the pool
    #[command(subcommand)]
    User(UserCommand),
    /// Versions of the hosts' daemons
    #[command(subcommand)]
    Upgrade(UpgradeCommand),
    /// What helps to help
    #[command(subcommand)]
    Support(SupportCommand),
    /// Prints a completion script
    Completion {
        /// For which shell
        shell: clap_complete::Shell,
    },
    /// Prints the manual page
    Man,
}
