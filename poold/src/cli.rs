//! The command line of the daemon.

use crate::commands::recover::RecoverArgs;
use crate::config::TimingName;
use clap::{Parser, Subcommand};
use pool_state::features;
use proto::ByteCount;
use std::net::SocketAddr;
use std::path::PathBuf;

/// One daemon per host of a pool of virtual machines.
#[derive(Debug, Parser)]
#[command(name = "poold", version, about)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: CliCommand,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum CliCommand {
    /// Founds a new pool with this host as its first.
    Init {
        /// Where and as whom.
        #[command(flatten)]
        host: HostArgs,
        /// Name of the pool.
        #[arg(long)]
        name: String,
        /// Timing profile of the pool.
        #[arg(long, value_enum, default_value = "default")]
        timing: TimingName,
    },
    /// Joins a pool; safe to run again.
    Join {
        /// Where and as whom.
        #[command(flatten)]
        host: HostArgs,
        /// The line that `poolctl host token create` printed.
        token: String,
    },
    /// Gives this member another key, since the one it had was lost or stolen; safe to run again.
    Rekey {
        /// Data folder of this host.
        #[arg(long, value_parser = absolute)]
        data: PathBuf,
        /// The line that `poolctl host rekey` printed.
        token: String,
    },
    /// Founds the pool anew from this host, after the loss of the majority for good.
    Recover(RecoverArgs),
    /// The host's configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Runs the daemon.
    Serve {
        /// Data folder of this host.
        #[arg(long, value_parser = absolute)]
        data: PathBuf,
        /// Serve Prometheus metrics and /healthz there [default: `metrics` of poold.toml].
        #[arg(long, value_name = "IP:PORT")]
        metrics: Option<SocketAddr>,
        /// How the memory of VMs that move away from this host is proved [default: `prove_memory` of poold.toml, or sampled].
        #[arg(long, value_enum)]
        prove_memory: Option<MemoryProof>,
        /// Logs as JSON, one object per line [default: `log_format` of poold.toml, or text].
        #[arg(long)]
        log_json: bool,
        /// Takes faults by lines on this unix socket: for tests only, since it can be told to lose what it writes.
        #[arg(long, value_name = "PATH", hide = true, value_parser = absolute)]
        fault_socket: Option<PathBuf>,
    },
}

/// What to do with the configuration.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Checks poold.toml and prints what is in force: each key, the timings, the limits of this version.
    Check {
        /// Data folder of this host.
        #[arg(long, value_parser = absolute)]
        data: PathBuf,
    },
    /// Prints a file with every key and what it is for.
    Example,
}

/// How it is proved that a VM's memory has arrived as it was.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryProof {
    /// Hashes of everything sent and received, and a sample of the memory read again
    #[default]
    Sampled,
    /// All memory read again while the VM stands still: finds every lost write, and takes its time
    Full,
}

/// Where and as whom a host comes to be.
#[derive(Debug, clap::Args)]
pub struct HostArgs {
    /// Data folder of this host.
    #[arg(long, value_parser = absolute)]
    pub data: PathBuf,
    /// Name of this host in the pool.
    #[arg(long)]
    pub host_name: String,
    /// Address that the other hosts reach: TCP for gRPC, UDP for the block store.
    #[arg(long, value_name = "IP:PORT")]
    pub listen: SocketAddr,
    /// Takes part in no higher feature level, so that an older version can still come back [default: the newest]
    #[arg(long, value_name = "LEVEL", value_parser = level())]
    pub feature_level: Option<u32>,
    /// Memory that VMs may use, e.g. 64GiB [default: 80 % of the machine's].
    #[arg(long, alias = "memory", value_name = "SIZE")]
    pub vm_memory: Option<ByteCount>,
}

fn level() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(i64::from(features::OLDEST)..=i64::from(features::NEWEST))
}

/// The processes of VMs have other working directories: a relative path would mean something else there.
fn absolute(path: &str) -> std::io::Result<PathBuf> {
    std::path::absolute(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_unit_starts_this_program_and_leaves_vms_alone() {
        let unit = include_str!("../dist/poold.service");
        let value = |key: &str| unit.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        let start = value("ExecStart").unwrap();
        let cli = Cli::try_parse_from(start.split_whitespace()).unwrap();
        let CliCommand::Serve { data, .. } = cli.command else { panic!("{start}") };
        assert_eq!(
            value("ConditionPathExists"),
            data.join("poold.toml").to_str(),
            "only a member is started"
        );
        assert_eq!(value("KillMode"), Some("process"), "VM processes outlive the daemon");
        // A wrong configuration or command line, and what must be put right first: starting again would not help.
        assert_eq!(value("RestartPreventExitStatus"), Some("2 4"));
        assert_eq!(value("Restart"), Some("always"));
    }

    /// Where systemd is installed, which says of each line what it does not understand.
    #[test]
    fn systemd_understands_the_shipped_unit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("poold.service");
        // It looks for the program, which is another one here.
        let here = std::env::current_exe().unwrap();
        let unit = include_str!("../dist/poold.service").replace("/usr/bin/poold", here.to_str().unwrap());
        std::fs::write(&path, unit).unwrap();
        let verify =
            std::process::Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&path).output();
        match verify {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            verified => {
                let verified = verified.unwrap();
                let told = String::from_utf8_lossy(&verified.stderr).into_owned();
                assert!(verified.status.success() && told.is_empty(), "{told}");
            }
        }
    }
}
