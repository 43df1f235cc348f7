//! Commands of groups, clusters, users and support.

use super::govern::UserTokenCommand;
use crate::reference;
use clap::{Args, Subcommand, ValueEnum, ValueHint};
use proto::CpuProfile;
use std::path::PathBuf;

/// What a group says about its VMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Rule {
    /// All on one host
    Together,
    /// No two on one host
    Apart,
    /// Only on the group's hosts
    OnHosts,
    /// Never on the group's hosts
    NotOnHosts,
}

/// `poolctl group …`
#[derive(Debug, Subcommand)]
pub enum GroupCommand {
    /// Makes a rule about where VMs run
    Create {
        /// Its name
        name: String,
        /// What it says
        #[arg(long, value_enum)]
        rule: Rule,
        /// Kept when there is a choice, and given up otherwise
        #[arg(long)]
        should: bool,
        /// Whom it is about
        #[command(flatten)]
        members: Members,
    },
    /// All groups
    List,
    /// One group
    Show {
        /// The group
        group: String,
    },
    /// Adds VMs or hosts
    Add {
        /// The group
        group: String,
        /// Whom to add
        #[command(flatten)]
        members: Members,
    },
    /// Takes VMs or hosts out
    Remove {
        /// The group
        group: String,
        /// Whom to take out
        #[command(flatten)]
        members: Members,
    },
    /// Deletes a group; the VMs stay where they are
    Delete {
        /// The group
        group: String,
    },
}

/// `poolctl cluster …`
#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// Makes an empty cluster: hosts with one CPU profile, among which their VMs are placed and moved
    Create {
        /// Its name
        name: String,
        /// What its guests see of the processor, and what each of its hosts must support: host-common (what they all have),
        /// x86-64-v2, x86-64-v3, or host (all of it, on equal processors)
        #[arg(long, value_parser = reference::cpu_profile, value_name = "PROFILE", default_value = "host-common")]
        cpu_profile: CpuProfile,
    },
    /// All clusters; `default` has whatever was put into no other
    List,
    /// One cluster
    Show {
        /// The cluster
        cluster: String,
    },
    /// Puts hosts without VMs, and stopped VMs, into a cluster; `default` takes them back
    Add {
        /// The cluster
        cluster: String,
        /// Whom to put there
        #[command(flatten)]
        members: Members,
    },
    /// Deletes a cluster that nobody is in
    Delete {
        /// The cluster
        cluster: String,
    },
}

/// Members of a group or cluster.
#[derive(Debug, Args)]
pub struct Members {
    /// A VM; may be repeated
    #[arg(long = "vm", value_name = "VM")]
    pub vms: Vec<String>,
    /// A host (of groups: for rules about hosts); may be repeated
    #[arg(long = "host", value_name = "HOST")]
    pub hosts: Vec<String>,
}

/// What a user may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// Look
    Viewer,
    /// Work with VMs, volumes and hosts in service
    Operator,
    /// Change the pool itself: members, users, backup
    Admin,
}

impl Role {
    /// The word of the API.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }
}

/// `poolctl user …`
#[derive(Debug, Subcommand)]
pub enum UserCommand {
    /// Makes a user and its configuration; the key is made here and never leaves this machine
    Create {
        /// Its name
        name: String,
        /// What it may do
        #[arg(long, value_enum)]
        role: Role,
        /// Where its configuration goes; the file must not exist
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        out: PathBuf,
    },
    /// All users
    List,
    /// Changes what a user may do
    Role {
        /// Its name
        name: String,
        /// What it may do from now on
        #[arg(value_enum)]
        role: Role,
    },
    /// Gives a user another key; the old one is void at once
    Rotate {
        /// Its name
        name: String,
        /// Where the new configuration goes; the file must not exist
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        out: PathBuf,
    },
    /// Deletes a user; its key is void at once
    Delete {
        /// Its name
        name: String,
    },
    /// As whom this command calls
    Whoami,
    /// Brings another certificate for the key of this configuration, and writes it there
    Renew,
    /// Access tokens, for programs without a certificate
    #[command(subcommand)]
    Token(UserTokenCommand),
}

/// `poolctl support …`
#[derive(Debug, Subcommand)]
pub enum SupportCommand {
    /// Writes all that the pool says of itself, without secrets, to one JSON file
    Bundle {
        /// The file; it must not exist
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
    },
}
