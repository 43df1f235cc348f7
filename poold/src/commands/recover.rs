//! `poold recover`: the pool goes on after the loss of its majority.

use super::serve::lock;
use super::{Failure, chain};
use crate::config::HostConfig;
use crate::consensus::recover::{self, Place};
use proto::HostId;
use std::path::{Path, PathBuf};

/// What the operator asks for.
#[derive(Debug, clap::Args)]
pub struct RecoverArgs {
    /// Data folder of this host.
    #[arg(long)]
    pub data: PathBuf,
    /// Another host that goes on, by its id such as host-12; may be repeated. All others are removed.
    #[arg(long = "survivor", value_name = "HOST-ID")]
    pub survivors: Vec<HostId>,
    /// Start from a backup (`poolctl pool backup`) instead of what this host holds.
    #[arg(long, value_name = "FILE")]
    pub from: Option<PathBuf>,
    /// This host follows another survivor, on which the pool was recovered.
    #[arg(long, conflicts_with_all = ["survivors", "from"])]
    pub follow: bool,
    /// You are sure that the other hosts are off for good: what they acknowledged alone is lost.
    #[arg(long)]
    pub the_majority_is_gone: bool,
}

/// Runs the command.
pub async fn run(args: RecoverArgs) -> Result<(), Failure> {
    let data = args.data.as_path();
    let failed = |error: &dyn std::error::Error| Failure::failed(chain(error));
    let config = HostConfig::load(data)
        .map_err(|error| failed(&error))?
        .ok_or_else(|| Failure::blocked(format!("{} belongs to no pool", data.display())))?;
    let _lock = lock(data)?;
    if !args.the_majority_is_gone {
        return Err(Failure::usage(
            "this gives up what only the other hosts know. If most voters are gone for good, run it again with \
             --the-majority-is-gone; else bring them back, and nothing is lost"
                .to_owned(),
        ));
    }
    let place = Place {
        data_dir: data,
        pool_id: &config.pool_id,
        host: config.host(),
        feature_level: config.feature_level(),
    };
    let next = format!("Next:\n  poold serve --data {}", data.display());
    if args.follow {
        recover::follow(place).await.map_err(|error| Failure::blocked(chain(&error)))?;
        eprintln!("Host {} follows the recovered pool.\n{next}", config.host_name);
        return Ok(());
    }
    let backup = args.from.as_deref().map(read).transpose()?;
    let mut survivors = args.survivors;
    survivors.push(config.host());
    let losses = recover::lead(place, &survivors, backup.as_deref()).await;
    let losses = losses.map_err(|error| Failure::blocked(chain(&error)))?;
    eprintln!("The pool is recovered; host {} is its first.", config.host_name);
    for volume in &losses.stale_volumes {
        eprintln!("  volume {volume}: its last acknowledged writes may be missing; check what is on it");
    }
    for vm in &losses.stopped_vms {
        eprintln!("  vm {vm}: it was on a removed host; `poolctl vm start {vm}`");
    }
    eprintln!("On each other survivor:\n  poold recover --data DIR --follow --the-majority-is-gone\n{next}");
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(path).map_err(|error| Failure::failed(format!("{}: {error}", path.display())))
}
