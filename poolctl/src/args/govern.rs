//! Commands of what governs the pool: settings, certificate authority, versions, access tokens.

use crate::reference;
use clap::{Subcommand, ValueHint};
use proto::TokenId;
use std::{path::PathBuf, time::Duration};

use super::rules::Role;

/// `poolctl pool ca …`
#[derive(Debug, Subcommand)]
pub enum CaCommand {
    /// Begins to replace the certificate authority: a new one signs from now on, and both are trusted
    Rotate,
    /// Ends the replacement once every host shows a new certificate; what the old authority has signed is void
    Finish,
}

/// `poolctl upgrade …`
#[derive(Debug, Subcommand)]
pub enum UpgradeCommand {
    /// The pool's feature level, and the version of each host's daemon
    Status,
}

/// `poolctl user token …`
#[derive(Debug, Subcommand)]
pub enum UserTokenCommand {
    /// Makes a token, with which a program acts for a user without a certificate
    Create {
        /// The user
        user: String,
        /// What it may do, at most what its user may
        #[arg(long, value_enum)]
        role: Role,
        /// How long it is valid
        #[arg(long, value_name = "DURATION", default_value = "30d", value_parser = reference::duration_s)]
        ttl: Duration,
        /// Writes a configuration for poolctl with it instead of printing it; the file must not exist
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        out: Option<PathBuf>,
    },
    /// All access tokens, without their secrets
    List,
    /// Makes an access token void at once
    Revoke {
        /// Its id, such as token-9
        #[arg(value_parser = reference::token)]
        id: TokenId,
    },
}
