//! Three replica servers and the owner of one volume, each a process of its own, exported over NBD: what the benchmark and
//! the tools of NBD are pointed at without a whole pool.
//!
//! ```text
//!  nbd_cluster DIR SIZE_MIB ──starts──▶ nbd_cluster replica DIR HOST SIZE_MIB   × 3
//!     owner ── unix socket ─▶ replica 1 (the local one)
//!           ── QUIC ────────▶ replicas 2 and 3
//!     NBD at DIR/nbd.sock                      replicas ──proposals──▶ DIR/pool.sock (in the owner's process)
//! ```
//! Prints a line for each replica (host, process id) and `ready`; then does what its input says, until that ends, and answers each
//! line with the bytes that were sent to the host's replica: `kill HOST`, `start HOST` (returns when it is in sync), `sent HOST`.

mod owner;
mod pool;
mod replica;

use anyhow::{Context, Result, bail};
use proto::{AttachmentSecret, ByteCount, Epoch, VolumeId};
use std::path::PathBuf;
use tokio::runtime::{Builder, Runtime};

const VOLUME: VolumeId = VolumeId(1);
const EPOCH: Epoch = Epoch(1);
const SECRET: AttachmentSecret = AttachmentSecret([7; 32]);
const USAGE: &str = "usage: nbd_cluster DIR SIZE_MIB";

/// One thread: a request and its answer pass through many tasks, and waking another processor for each costs more than they do.
fn runtime() -> Result<Runtime> {
    Ok(Builder::new_current_thread().enable_all().build()?)
}

fn size(argument: Option<String>) -> Result<ByteCount> {
    let mib: u64 = argument.context(USAGE)?.parse()?;
    mib.checked_mul(1 << 20).map(ByteCount).context("a volume that large can't be addressed")
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let first = arguments.next().context(USAGE)?;
    if first != "replica" {
        return runtime()?.block_on(owner::run(PathBuf::from(first), size(arguments.next())?));
    }
    let (Some(dir), Some(host)) = (arguments.next(), arguments.next()) else { bail!(USAGE) };
    runtime()?.block_on(replica::run(PathBuf::from(dir), host.parse()?, size(arguments.next())?))
}
