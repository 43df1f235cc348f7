//! Full clones: what a snapshot holds, copied into a volume of its own by the daemon that was asked.
//!
//! The new volume is lent to the daemon as for an import, so that nothing is left of it when the daemon dies half-way; its origin
//! is read where it is open, or lent, too.

use super::{
    Principal,
    copies::{Copies, Lent, PIECES_AHEAD, Wanted, broken},
    views,
};
use crate::supervisor::Machine;
use futures::StreamExt as _;
use pool_state::{Command, command::VolumeCommand, state::LoanKey};
use proto::{
    VolumeId,
    v1::{CloneVolumeRequest, Task, VolumePiece},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

impl Copies {
    /// Begins a full clone; it goes on when the caller has gone.
    pub async fn copy_snapshot(
        &self,
        principal: &Principal,
        request: CloneVolumeRequest,
    ) -> Result<Task, Status> {
        let CloneVolumeRequest { meta, snapshot, name, replicas, full: _ } = request;
        let state = self.context.read().await?;
        let found = views::found(state.resolve_snapshot(&snapshot))?;
        let wanted = Wanted { volume: found.volume, snapshot: Some(found.id), since: None };
        let loan = self.context.loans.begin();
        let (key, object) = (loan.key(), format!("volume {name}"));
        let command = Command::Volume(VolumeCommand::CopySnapshot {
            snapshot: found.id,
            name,
            replicas: (replicas > 0).then_some(replicas),
            host: self.context.host,
            key,
        });
        let (outcome, state) = self.context.change(principal, meta, command).await?;
        let task = views::task_begun(&state, outcome)?;
        let (copies, principal, volume) = (self.clone(), principal.clone(), VolumeId(task.id));
        tokio::spawn(async move {
            let copied = copies.copy(&principal, (volume, key), &wanted).await;
            if let Err(status) = &copied {
                tracing::warn!(%volume, problem = status.message(), "a full clone failed");
            }
            // Without an answer the reconciler ends it: the guard is gone.
            let _ = copies.end(&object, (volume, loan), &copied).await;
        });
        Ok(task)
    }

    async fn copy(
        &self,
        principal: &Principal,
        (volume, key): (VolumeId, LoanKey),
        wanted: &Wanted,
    ) -> Result<(), Status> {
        let target = self.opened(volume, key).await?;
        if let Some(pieces) = self.read_where_open(wanted).await? {
            return fill(&target, pieces).await;
        }
        let Lent { pieces, loan, .. } = self.lend(principal, None, wanted).await?;
        let filled = fill(&target, pieces).await;
        let ended = self.end(&wanted.volume.to_string(), (wanted.volume, loan), &filled).await;
        filled.and(ended.map(drop))
    }
}

/// Writes what is read; zeros are there already.
async fn fill(target: &Machine, mut pieces: Streaming<VolumePiece>) -> Result<(), Status> {
    let (sender, queue) = mpsc::channel(PIECES_AHEAD);
    let forward = async move {
        while let Some(piece) = pieces.next().await {
            let piece = piece?;
            if piece.data.iter().any(|byte| *byte != 0) && sender.send(piece).await.is_err() {
                // The process has said why.
                break;
            }
        }
        Ok(())
    };
    let (forwarded, written) = tokio::join!(forward, target.volume_write(ReceiverStream::new(queue)));
    forwarded.and(written.map(drop).map_err(|error| broken(&error)))
}
