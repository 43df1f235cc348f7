//! What guests do with snapshots, and how damage is found and mended.

use super::oracle::Blocks;
use super::process::{Pending, content_of};
use super::world::{BLOCKS, ProcessId, World};
use crate::owner::core::{Command, CommandId, Look, Looked};
use crate::types::{Tail, View, VolumeOp};
use bytes::Bytes;
use proto::limits::BLOCK_BYTES;
use proto::{BlockIndex, HostId, SnapshotId};

/// Whether a snapshot holds what it was taken with.
pub fn check_snapshot(
    snapshot: SnapshotId,
    first: BlockIndex,
    expected: &Blocks,
    data: &Bytes,
) -> Result<(), String> {
    for (block, bytes) in (first.0..).zip(data.chunks_exact(BLOCK_BYTES)) {
        let (found, (_, wanted)) = (content_of(bytes, block)?, expected[block as usize]);
        if found != wanted {
            return Err(format!("{snapshot} holds {found} in block {block}, it was taken with {wanted}"));
        }
    }
    Ok(())
}

impl World {
    pub fn operated(&mut self, id: ProcessId, command: CommandId, op: &VolumeOp, tail: Tail) {
        let Some(process) = self.processes.get_mut(&id) else { return };
        match op {
            VolumeOp::Snapshot { snapshot } => {
                self.stats.add("snapshot taken");
                process.snapshots.push(*snapshot);
            }
            VolumeOp::DeleteSnapshot { .. } => self.stats.add("snapshot deleted"),
            VolumeOp::Revert { .. } => self.stats.add("reverted"),
            VolumeOp::Clone { .. } => {}
        }
        let version = process.commands.remove(&command);
        // What had been done before has no place of its own.
        if let Some(version) = version {
            let result = if version == (tail.epoch, tail.sequence) {
                self.oracle.acknowledged(version)
            } else {
                Err(format!("{op:?} was issued as {version:?} and is acknowledged as {tail:?}"))
            };
            self.check(result);
        }
        self.worst_moment(10);
    }

    /// Compares what a host holds with its checksums.
    pub fn verify(&mut self, host: HostId) {
        let Some(id) = self.current() else { return };
        let snapshots = self.oracle.whole_line().map(|line| line.snapshots).unwrap_or_default();
        for view in snapshots.into_keys().map(View::Snapshot).chain([View::Live]) {
            let look = Look::Verify { host, view, from: BlockIndex(0) };
            self.command(id, Command::Look { look }, Some(Pending::Verify { host, view }));
        }
    }

    pub fn verified(&mut self, id: ProcessId, host: HostId, view: View, looked: Looked) {
        let Looked::Verified { damaged, next, .. } = looked else {
            return self.check(Err(format!("a verification is answered by {looked:?}")));
        };
        if next.is_some() {
            self.check(Err("a small volume takes more than one verification".to_owned()));
        }
        for first in damaged {
            self.stats.add("damaged block found");
            let command = Command::Read { view, first, count: 1 };
            self.command(id, command, Some(Pending::Mend { host, first }));
        }
    }

    pub fn take_snapshot(&mut self, id: ProcessId) {
        let snapshot = SnapshotId(self.fresh_id());
        let op = VolumeOp::Snapshot { snapshot };
        self.command(id, Command::Op { op }, Some(Pending::Op(op)));
    }

    /// Reads a snapshot, deletes it, or goes back to it.
    pub fn use_snapshot(&mut self, id: ProcessId) {
        let Some(process) = self.processes.get(&id).filter(|process| process.epoch == self.pool.epoch) else {
            return;
        };
        let is_idle = process.pending.is_empty();
        // An owner before may have left some.
        let Ok(line) = self.oracle.whole_line() else { return };
        let known: Vec<SnapshotId> = line.snapshots.keys().copied().collect();
        if known.is_empty() {
            return;
        }
        let snapshot = *self.random.pick(&known);
        match self.random.below(4) {
            0 => {
                let op = VolumeOp::DeleteSnapshot { snapshot };
                self.command(id, Command::Op { op }, Some(Pending::Op(op)));
            }
            1 if is_idle => {
                let op = VolumeOp::Revert { snapshot };
                self.command(id, Command::Op { op }, Some(Pending::Op(op)));
            }
            _ => {
                let process = &self.processes[&id];
                if !process.snapshots.contains(&snapshot) {
                    return;
                }
                let (first, expected) = (BlockIndex(0), line.snapshots[&snapshot].clone());
                let command = Command::Read { view: View::Snapshot(snapshot), first, count: BLOCKS as u32 };
                let pending = Pending::ReadSnapshot { snapshot, first, expected };
                self.command(id, command, Some(pending));
            }
        }
    }
}
