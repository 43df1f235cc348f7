//! Commands of the pool as a whole and of its hosts.

use super::govern::CaCommand;
use crate::reference;
use clap::{Subcommand, ValueHint};
use proto::TokenId;
use std::{path::PathBuf, time::Duration};

/// `poolctl pool …`
#[derive(Debug, Subcommand)]
pub enum PoolCommand {
    /// The pool and its hosts at a glance
    Status,
    /// Everything about the pool itself
    Show,
    /// Changes settings: name=NAME, replicas-default=N (of volumes that are created without --replicas), cpu-overcommit=N (vCPUs
    /// that a CPU is counted for), cpu-profile=NAME (what guests see of the processor, from their next boot on),
    /// scrub-interval=7d (how long after its last scrub each volume is scrubbed; or never), scrub-rate=32MiB (of each replica)
    Set {
        /// KEY=VALUE; may be repeated
        #[arg(required = true, value_parser = reference::setting, value_name = "KEY=VALUE")]
        settings: Vec<reference::Setting>,
    },
    /// The pool's certificate authority
    #[command(subcommand)]
    Ca(CaCommand),
    /// Writes the pool's state to a file, from which `poold recover` can found it again; it holds the key of the pool's CA
    Backup {
        /// The file; it must not exist
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
    },
}

/// `poolctl ha …`
#[derive(Debug, Subcommand)]
pub enum HaCommand {
    /// Permits recovery again after the brake against false alarms stopped it
    Resume,
    /// Switches recovery off for a time of maintenance
    Disarm,
    /// Switches recovery on again
    Arm,
    /// Which VMs would stay down if hosts failed
    Plan {
        /// How many hosts fail together
        #[arg(long, default_value_t = 1, value_name = "HOSTS")]
        fail: u32,
    },
}

/// `poolctl balance …`
#[derive(Debug, Subcommand)]
pub enum BalanceCommand {
    /// What `balance run` would move, and why
    Plan,
    /// Moves VMs until no rule is broken and the hosts are evenly used
    Run {
        /// Print the task and do not wait
        #[arg(long = "async")]
        detach: bool,
    },
}

/// `poolctl host …`
#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// Join tokens
    #[command(subcommand)]
    Token(TokenCommand),
    /// All hosts
    List,
    /// One host
    Show {
        /// The host
        host: String,
    },
    /// Sets and removes labels; `zone` spreads replicas and voters
    Label {
        /// The host
        host: String,
        /// KEY=VALUE to set, KEY- to remove
        #[arg(required = true, value_parser = reference::label)]
        labels: Vec<reference::Label>,
    },
    /// Lets no VM come to a host; those that are there stay
    Cordon {
        /// The host
        host: String,
    },
    /// Lets VMs come to a host again
    Uncordon {
        /// The host
        host: String,
    },
    /// Moves every VM away, live, and waits until the host is empty
    Drain {
        /// The host
        host: String,
        /// Print the task and do not wait
        #[arg(long = "async")]
        detach: bool,
    },
    /// Puts a host back into service and its VMs back on it
    Restore {
        /// The host
        host: String,
        /// Print the task and do not wait
        #[arg(long = "async")]
        detach: bool,
    },
    /// Vouches that a lost host is off, so that its VMs without HA may be started elsewhere
    ConfirmDead {
        /// The host
        host: String,
    },
    /// Makes a token with which a host comes with another key, since the one it had was lost or stolen: run `poold rekey` there
    Rekey {
        /// The host
        host: String,
        /// How long it is valid
        #[arg(long, value_name = "DURATION", default_value = "3h", value_parser = reference::duration_s)]
        ttl: Duration,
    },
    /// Takes a lost host out of the pool for good; its replicas are made anew elsewhere
    Forget {
        /// The host
        host: String,
    },
    /// Moves a host's VMs and replicas away and takes it out of the pool
    Remove {
        /// The host
        host: String,
        /// Also when some volumes have fewer copies then: there is no other host for them
        #[arg(long, conflicts_with = "force")]
        fewer_copies: bool,
        /// Print the task and do not wait
        #[arg(long = "async", conflicts_with = "force")]
        detach: bool,
        /// Also when it is lost and can't hand over what it holds
        #[arg(long)]
        force: bool,
    },
    /// Lists the hosts now and after every change, until interrupted
    Watch,
}

/// `poolctl host token …`
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Makes a token for `poold join`; its text is shown only this once
    Create {
        /// How long it is valid
        #[arg(long, value_name = "DURATION", default_value = "3h", value_parser = reference::duration_s)]
        ttl: Duration,
    },
    /// All tokens, without their secrets
    List,
    /// Makes a token useless
    Revoke {
        /// Its id, such as token-9
        #[arg(value_parser = reference::token)]
        id: TokenId,
    },
}
