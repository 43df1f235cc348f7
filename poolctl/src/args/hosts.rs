//! Commands of the pool as a whole and of its hosts.

use crate::reference;
use clap::Subcommand;
use proto::TokenId;
use std::time::Duration;

/// `poolctl pool …`
#[derive(Debug, Subcommand)]
pub enum PoolCommand {
    /// The pool and its hosts at a glance
    Status,
    /// Everything about the pool itself
    Show,
}

/// `poolctl ha …`
#[derive(Debug, Subcommand)]
pub enum HaCommand {
    /// Permits recovery again after the brake against false alarms stopped it
    Resume,
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
    /// Takes a host out of the pool
    Remove {
        /// The host
        host: String,
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
