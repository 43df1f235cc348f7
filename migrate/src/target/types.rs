//! What goes into and comes out of a [`super::Target`].

use crate::{
    apply::KeepHashes,
    bitmap::PageBitmap,
    machine::Supply,
    proof::{MemoryHash, MemoryProof},
    source::ResumedParts,
    wire::{Kept, Refusal, ToSource, ToTarget, batch::Round},
};
use proto::{MigrationId, PageIndex, Sequence, VmId, VolumeId};

/// What a target waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetSettings {
    /// The attempt.
    pub migration: MigrationId,
    /// The machine.
    pub vm: VmId,
    /// Pages of guest memory.
    pub page_count: u64,
    /// What its memory holds of the machine already.
    pub kept: Kept,
}

/// What has happened.
#[derive(Debug)]
pub enum TargetEvent {
    /// A message of the source.
    Message(ToTarget),
    /// The further connections may come, to these ports.
    Listening {
        /// One for each.
        ports: Vec<u16>,
    },
    /// Every page of the round is in memory.
    RoundApplied {
        /// The round.
        round: Round,
    },
    /// The machine state has arrived whole.
    StateReceived(Vec<u8>),
    /// The machine was restored.
    StateLoaded,
    /// The proof of what was received.
    MemoryHashed(MemoryProof),
    /// The missing pages can come.
    OnDemandBegun,
    /// The machine waits for this page.
    Fault {
        /// The page.
        page: PageIndex,
    },
    /// Answer to [`TargetCommand::ListMissing`].
    MissingListed(PageBitmap),
    /// Every missing page has come.
    Filled,
    /// The source has closed the link: it has nothing more to say.
    LinkClosed {
        /// In its words.
        why: String,
    },
    /// Pages or state could not be taken.
    Failed(TargetFailure),
    /// The link is gone.
    LinkLost {
        /// In words.
        error: String,
    },
    /// The machine runs here.
    Resumed(ResumedParts),
    /// The owner wants no more of it.
    Discard,
}

/// What the shell is to do.
#[derive(Debug, PartialEq, Eq)]
pub enum TargetCommand {
    /// Take pages from now on.
    Receive {
        /// Bulk streams that will come.
        streams: u8,
        /// Connections that they will come on, the first one included.
        connections: u8,
        /// Whether a proof will be asked for.
        hashes: KeepHashes,
    },
    /// Send a message on the control stream.
    Send(ToSource),
    /// Restore the machine.
    LoadState(Vec<u8>),
    /// Combine the hashes of all pages.
    HashMemory,
    /// Give up these pages, and take them as copies of the round when they come.
    BeginOnDemand {
        /// The round.
        round: Round,
        /// The pages.
        missing: PageBitmap,
    },
    /// Tell which pages have not come.
    ListMissing,
    /// Hold the vCPUs for want of pages, or let them go on.
    Starve(Supply),
    /// Give up the link.
    CloseLink,
}

/// Why a target has failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetFailure {
    /// The link broke before everything was here.
    #[error("the link to the source is gone: {error}")]
    Link {
        /// In words.
        error: String,
    },
    /// The source did not go on.
    #[error("the source gave up: {why}")]
    GivenUp {
        /// In its words.
        why: String,
    },
    /// The source does not fit.
    #[error("the source was refused: {refusal}")]
    Refused {
        /// Why.
        refusal: Refusal,
    },
    /// The source broke the protocol.
    #[error("the source sent `{message}` out of turn")]
    Protocol {
        /// Which message.
        message: &'static str,
    },
    /// A page frame could not be applied.
    #[error("{error}")]
    Pages {
        /// In words.
        error: String,
    },
    /// The machine could not be restored.
    #[error("{error}")]
    State {
        /// In words.
        error: String,
    },
    /// The memories are not equal: a dirty page was missed.
    #[error("memory differs from the source's in pages {first} to {end}; nothing was moved")]
    MemoryDiffers {
        /// First page of the first group that differs.
        first: PageIndex,
        /// The page after its last.
        end: PageIndex,
    },
}

/// Where a target is, for the outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetPhase {
    /// No source yet.
    Listening,
    /// Pages come in.
    Receiving,
    /// Everything is here; the outcome decides.
    Ready {
        /// Root of the memory proof.
        memory_hash: Option<MemoryHash>,
        /// Last sequence that the source issued, for each volume.
        last_sequences: Vec<(VolumeId, Sequence)>,
    },
    /// The machine runs here, and some of its pages are still at the source.
    Filling {
        /// Whether they come.
        supply: Supply,
    },
    /// The machine runs here.
    Resumed,
    /// Nothing was moved.
    Failed {
        /// Why.
        failure: TargetFailure,
    },
    /// Ended by its owner.
    Discarded,
}

impl TargetPhase {
    /// The word for it in `pool.v1.MigrationState`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Listening => "listening",
            Self::Receiving => "receiving",
            Self::Ready { .. } => "ready",
            Self::Filling { supply: Supply::Flows } => "filling",
            Self::Filling { supply: Supply::Broken } => "starved",
            Self::Resumed => "resumed",
            Self::Failed { .. } | Self::Discarded => "failed",
        }
    }

    /// Nothing happens any more.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Resumed | Self::Failed { .. } | Self::Discarded)
    }
}
