//! What users of a volume do besides reading and writing: snapshots, clones, lists of blocks, scrubbing.

use super::config::VolumeError;
use super::core::{Look, Looked};
use super::handle::{BLOCK, VolumeHandle};
use super::task::Message;
use crate::types::{Lineage, Tail, View, VolumeOp};
use proto::{BlockIndex, HostId, SnapshotId, VolumeId};
use std::ops::Range;
use std::time::Duration;

/// Ranges of bytes, ascending and apart from each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ranges {
    /// The ranges.
    pub ranges: Vec<Range<u64>>,
    /// Where to ask for more; `None`: these were the last.
    pub next: Option<u64>,
}

/// How far a scrub is, over all replicas and snapshots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ScrubProgress {
    /// Blocks that were read and compared with their checksums.
    pub checked: u64,
    /// Blocks that were damaged.
    pub damaged: u64,
    /// Those of them that were given the content of another replica.
    pub repaired: u64,
    /// How much of it is done, by addresses, in permille.
    pub permille: u32,
}

/// What is to be scrubbed, and how fast.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ScrubOptions {
    /// Only the replica at this host; none: all that are in sync.
    pub host: Option<HostId>,
    /// A pause after each 256 blocks.
    pub pace: Duration,
}

impl VolumeHandle {
    /// Takes a snapshot of everything that was acknowledged before; durable on every in-sync replica on return. Asked for again it
    /// returns the same.
    ///
    /// # Errors
    /// Too many snapshots, fenced, draining, closed.
    pub async fn snapshot(&self, snapshot: SnapshotId) -> Result<Tail, VolumeError> {
        self.operate(VolumeOp::Snapshot { snapshot }).await
    }

    /// Forgets a snapshot, if there is one. Its space comes back over time.
    ///
    /// # Errors
    /// Fenced, draining, closed.
    pub async fn delete_snapshot(&self, snapshot: SnapshotId) -> Result<(), VolumeError> {
        self.operate(VolumeOp::DeleteSnapshot { snapshot }).await.map(drop)
    }

    /// The volume holds again what a snapshot holds; what was written since is gone. Nothing may be writing meanwhile.
    ///
    /// # Errors
    /// No such snapshot, fenced, draining, closed.
    pub async fn revert(&self, snapshot: SnapshotId) -> Result<Tail, VolumeError> {
        self.operate(VolumeOp::Revert { snapshot }).await
    }

    /// Makes a volume that was never written begin with what a snapshot of another one holds; both share what neither changes.
    /// `at`: what [`snapshot`](Self::snapshot) has returned. A replica without that snapshot gets a copy of its own.
    ///
    /// # Errors
    /// The volume was written, fenced, draining, closed.
    pub async fn clone_of(
        &self,
        origin: VolumeId,
        snapshot: SnapshotId,
        at: Tail,
    ) -> Result<Tail, VolumeError> {
        self.operate(VolumeOp::Clone { origin, snapshot, at }).await
    }

    async fn operate(&self, op: VolumeOp) -> Result<Tail, VolumeError> {
        self.ask(VolumeError::Closed, |answer| Message::Op { op, answer }).await
    }

    async fn look(&self, look: Look) -> Result<Looked, VolumeError> {
        self.ask(VolumeError::Closed, |answer| Message::Look { look, answer }).await
    }

    /// The snapshots, in the order in which they were taken, and the hosts that are in sync.
    ///
    /// # Errors
    /// Not active.
    pub async fn lineage(&self) -> Result<(Lineage, Vec<HostId>), VolumeError> {
        match self.look(Look::Lineage).await? {
            Looked::Lineage { lineage, members } => Ok((lineage, members)),
            other => unreachable!("{other:?} answers another question"),
        }
    }

    /// Which of some bytes of a view hold data: all of them, however many.
    ///
    /// # Errors
    /// Out of range, no such snapshot, fenced, closed.
    pub async fn allocated(&self, view: View, offset: u64, len: u64) -> Result<Vec<Range<u64>>, VolumeError> {
        self.check(offset, len)?;
        let range = offset..offset + len;
        let end = BlockIndex(range.end.div_ceil(BLOCK));
        let mut ranges = Vec::new();
        let mut next = Some(BlockIndex(offset / BLOCK));
        while let Some(from) = next {
            let looked = self.look(Look::Allocated { view, from, end }).await?;
            next = add_blocks(&mut ranges, looked);
        }
        for part in &mut ranges {
            *part = part.start.max(range.start)..part.end.min(range.end);
        }
        ranges.retain(|part| !part.is_empty());
        Ok(ranges)
    }

    /// Where a view differs from a snapshot, from a byte on; in parts, since there may be many.
    ///
    /// # Errors
    /// No such snapshot, fenced, closed.
    pub async fn changed(&self, view: View, since: SnapshotId, offset: u64) -> Result<Ranges, VolumeError> {
        let from = BlockIndex(offset / BLOCK);
        let mut ranges = Vec::new();
        let next = add_blocks(&mut ranges, self.look(Look::Changed { view, since, from }).await?);
        let size = self.size_bytes();
        ranges.iter_mut().for_each(|range| range.end = range.end.min(size));
        Ok(Ranges { ranges, next: next.map(|block| block.0 * BLOCK) })
    }

    /// Reads everything that the in-sync replicas hold of the volume and its snapshots, compares it with its checksums, and puts
    /// intact content in the place of what is damaged. `progress` is told how far it is.
    ///
    /// # Errors
    /// Fenced, closed, or the host has no in-sync replica. What can't be repaired is counted only.
    pub async fn scrub(
        &self,
        options: ScrubOptions,
        mut progress: impl FnMut(ScrubProgress),
    ) -> Result<ScrubProgress, VolumeError> {
        let (lineage, mut members) = self.lineage().await?;
        if let Some(host) = options.host {
            members.retain(|member| *member == host);
            if members.is_empty() {
                return Err(VolumeError::NoReplica { host });
            }
        }
        let snapshots = lineage.snapshots.iter().map(|info| View::Snapshot(info.snapshot));
        let parts = (lineage.snapshots.len() as u64 + 1) * members.len() as u64;
        let mut total = ScrubProgress::default();
        let mut part = 0;
        for view in snapshots.chain([View::Live]) {
            for &host in &members {
                let mut next = Some(BlockIndex(0));
                while let Some(from) = next {
                    next = match self.look(Look::Verify { host, view, from }).await {
                        Ok(Looked::Verified { checked, damaged, next }) => {
                            total.checked += checked;
                            self.repair(host, view, damaged, &mut total).await;
                            next
                        }
                        Ok(other) => unreachable!("{other:?} answers another question"),
                        Err(error @ (VolumeError::Fenced { .. } | VolumeError::Closed)) => return Err(error),
                        // The snapshot was deleted, or the replica has left the set, meanwhile.
                        Err(_) => None,
                    };
                    total.permille = self.permille_of(part, next, parts);
                    progress(total);
                    tokio::time::sleep(options.pace).await;
                }
                part += 1;
            }
        }
        Ok(total)
    }

    /// How much is done of so many parts when one of them goes on at a block, or has ended.
    fn permille_of(&self, part: u64, next: Option<BlockIndex>, parts: u64) -> u32 {
        let blocks = (self.size_bytes() / BLOCK).max(1);
        let at = next.map_or(blocks, |next| next.0.min(blocks));
        let done = u128::from(part) * u128::from(blocks) + u128::from(at);
        let permille = done * 1000 / (u128::from(parts) * u128::from(blocks)).max(1);
        u32::try_from(permille).unwrap_or(1000).min(1000)
    }

    async fn repair(&self, host: HostId, view: View, damaged: Vec<BlockIndex>, total: &mut ScrubProgress) {
        for first in damaged {
            total.damaged += 1;
            // A replica may have heard of a larger size before its owner.
            let len = BLOCK.min(self.size_bytes().saturating_sub(first.0.saturating_mul(BLOCK)));
            let len = usize::try_from(len).expect("a block is small");
            let Ok(data) = self.read_view(view, first.0 * BLOCK, len).await else { continue };
            let mut block = data.to_vec();
            block.resize(usize::try_from(BLOCK).expect("a block is small"), 0);
            let data = block.into();
            let repaired =
                self.ask(VolumeError::Closed, |answer| Message::Repair { host, first, data, answer }).await;
            total.repaired += u64::from(repaired.is_ok());
        }
    }
}

/// Adds blocks to ranges of bytes; the block to go on with, if there may be more.
fn add_blocks(ranges: &mut Vec<Range<u64>>, looked: Looked) -> Option<BlockIndex> {
    let Looked::Blocks { blocks, full } = looked else { unreachable!("an answer to another question") };
    for block in &blocks {
        let bytes = block.0 * BLOCK..(block.0 + 1) * BLOCK;
        match ranges.last_mut() {
            Some(last) if last.end == bytes.start => last.end = bytes.end,
            _ => ranges.push(bytes),
        }
    }
    blocks.last().filter(|_| full).map(|last| BlockIndex(last.0 + 1))
}
