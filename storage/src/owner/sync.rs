//! Copying: makes a replica equal to another one, block by block, each with its own version.

use super::link::{Link, LinkError};
use crate::types::{ProposalError, Tail, VolumeProposal, VolumeView};
use crate::wire::{Answer, Request, RequestId};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use proto::{BlockIndex, Sequence};
use std::collections::BTreeSet;
use std::time::Duration;

/// Blocks on their way at a time: hides the round trip, and leaves room for the guest's own I/O.
const COPIES_IN_FLIGHT: usize = 16;

/// Pause before a proposal without an answer is made again.
const PROPOSE_RETRY: Duration = Duration::from_millis(200);

/// All blocks of the lists that `request` asks for, page by page.
async fn list(
    link: &Link,
    request: impl Fn(RequestId, BlockIndex) -> Request,
) -> Result<BTreeSet<BlockIndex>, LinkError> {
    let mut all = BTreeSet::new();
    let mut from = BlockIndex(0);
    loop {
        let (answer, _) = link.ask(|id| request(id, from), Bytes::new()).await?;
        let Answer::Blocks { blocks, full } = answer else {
            return Err(LinkError::Failed { host: link.host, cause: "no list of blocks".to_owned() });
        };
        let last = blocks.last().copied();
        all.extend(blocks);
        match last {
            Some(last) if full => from = last.next(),
            _ => return Ok(all),
        }
    }
}

/// A copy that has voided the target's divergent tail and must now bring what is missing.
pub struct Resync {
    target: Link,
    cut: Tail,
    divergent: BTreeSet<BlockIndex>,
}

impl Resync {
    /// Voids everything after `cut` at the target. From here on it is incomplete until [`finish`](Self::finish).
    ///
    /// # Errors
    /// The target is gone.
    pub async fn begin(target: Link, cut: Option<Tail>) -> Result<Self, LinkError> {
        let cut = cut.unwrap_or_default();
        target.tell(|id| Request::Truncate { id, cut }, Bytes::new()).await?;
        // What it has lost must be overwritten too, also where the source has written nothing since.
        let divergent = list(&target, |id, from| Request::Voided { id, from }).await?;
        Ok(Self { target, cut, divergent })
    }

    /// Copies what `source` holds after the cut, and what the target lost; then the target is complete up to `upto`.
    /// The source must hold everything up to there.
    ///
    /// # Errors
    /// Either is gone.
    pub async fn finish(self, source: &Link, upto: Tail) -> Result<u64, LinkError> {
        let Self { target, cut, divergent } = self;
        let (after, end) = (cut.sequence, Sequence(u64::MAX));
        let mut blocks = list(source, |id, from| Request::Changed { id, after, upto: end, from }).await?;
        blocks.extend(divergent);
        let count = blocks.len() as u64;
        futures::stream::iter(blocks)
            .map(|block| copy(source, &target, block))
            .buffer_unordered(COPIES_IN_FLIGHT)
            .try_collect::<()>()
            .await?;
        target.tell(|id| Request::Complete { id, tail: upto }, Bytes::new()).await?;
        Ok(count)
    }
}

async fn copy(source: &Link, target: &Link, block: BlockIndex) -> Result<(), LinkError> {
    let (answer, data) = source.ask(|id| Request::Fetch { id, block }, Bytes::new()).await?;
    let Answer::Block { version, zero } = answer else {
        return Err(LinkError::Failed { host: source.host, cause: format!("block {block} is damaged") });
    };
    if version.sequence == Sequence(0) {
        // Never written at the source, and void at the target: both read as zero.
        return Ok(());
    }
    target.tell(|id| Request::Copy { id, block, version, zero }, data).await
}

/// Has a change committed through any of the links, for as long as it takes to get an answer.
///
/// # Errors
/// Every answer but "none".
pub async fn propose(links: &[Link], proposal: &VolumeProposal) -> Result<VolumeView, ProposalError> {
    let mut cause = "no replica is attached".to_owned();
    for link in links {
        let asked = link.ask(|id| Request::Propose { id, proposal: proposal.clone() }, Bytes::new()).await;
        match asked {
            Ok((Answer::Proposed(Err(ProposalError::Unavailable { cause: why })), _)) => cause = why,
            Ok((Answer::Proposed(result), _)) => return result,
            Ok((other, _)) => cause = format!("unexpected {other:?}"),
            Err(LinkError::Fenced { promised, .. }) => {
                return Err(ProposalError::Fenced { current: promised });
            }
            Err(error) => cause = error.to_string(),
        }
    }
    tokio::time::sleep(PROPOSE_RETRY).await;
    Err(ProposalError::Unavailable { cause })
}
