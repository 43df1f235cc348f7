//! Full clones: what a snapshot holds, copied into a volume of its own by the daemon of one host after the other if need be.
//!
//! The new volume has a process of its own, at a host that the state names; the reconciler there has this done, again from the
//! beginning whenever it was interrupted. Its origin is read where it is open, or lent.

use super::{
    Principal,
    copies::{Copies, Lent, PIECES_AHEAD, Wanted, both, end_of},
    views,
};
use crate::{
    node::NodeContext,
    progress::Progress,
    supervisor::{Machine, ProcessKey},
};
use futures::StreamExt as _;
use pool_state::{
    Command,
    command::VolumeCommand,
    state::{Loan, LoanPurpose},
};
use proto::{
    Epoch, VolumeId,
    v1::{CloneVolumeRequest, Task, VolumePiece},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

/// Begins a full clone; it goes on whoever dies.
pub async fn begin_copy(
    context: &NodeContext,
    principal: &Principal,
    request: CloneVolumeRequest,
) -> Result<Task, Status> {
    let CloneVolumeRequest { meta, snapshot, name, replicas, full: _ } = request;
    let state = context.read().await?;
    let snapshot = views::found(state.resolve_snapshot(&snapshot))?.id;
    let replicas = (replicas > 0).then_some(replicas);
    let command = Command::Volume(VolumeCommand::CopySnapshot { snapshot, name, replicas });
    let (outcome, state) = context.change(principal, meta, command).await?;
    views::task_begun(&state, outcome)
}

impl Copies {
    /// Fills a volume, which a process of this host has open at this epoch.
    ///
    /// # Errors
    /// The origin can't be read now, or the volume not be written.
    pub async fn copy_snapshot(&self, (volume, epoch): (VolumeId, Epoch), loan: Loan) -> Result<(), Status> {
        let LoanPurpose::Copy { snapshot } = loan.purpose else {
            return Err(Status::invalid_argument(format!("{volume} is not filled with a snapshot")));
        };
        let key = ProcessKey::volume(volume, epoch);
        let target =
            self.supervisor.machine(key).ok_or_else(|| Status::aborted(format!("{key} has ended")))?;
        let state = self.context.consensus.local();
        let found = views::found(state.snapshot(snapshot))?;
        let wanted = Wanted { volume: found.volume, snapshot: Some(snapshot), since: None };
        let progress = self.context.progress.begin(loan.task, found.size.0);
        if let Some(pieces) = self.read_where_open(&wanted).await? {
            return fill(&target, pieces, &progress).await;
        }
        let Lent { pieces, loan, .. } = self.lend(&wanted).await?;
        let filled = fill(&target, pieces, &progress).await;
        let ended = self.end(&wanted.volume.to_string(), (wanted.volume, loan), &filled).await;
        filled.and(ended.map(drop))
    }
}

/// Writes what is read; zeros are there already.
async fn fill(
    target: &Machine,
    mut pieces: Streaming<VolumePiece>,
    progress: &Progress,
) -> Result<(), Status> {
    let (sender, queue) = mpsc::channel(PIECES_AHEAD);
    let forward = async move {
        while let Some(piece) = pieces.next().await {
            let piece = piece?;
            let end = end_of(&piece);
            if piece.data.iter().any(|byte| *byte != 0) && sender.send(piece).await.is_err() {
                // The process has said why.
                break;
            }
            progress.reached(end);
        }
        Ok(())
    };
    both(forward, target.volume_write(ReceiverStream::new(queue))).await
}
