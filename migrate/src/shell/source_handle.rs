//! What others hold of a source: what it shall do, and the way to tell it more.

use crate::{
    converge::{DOWNTIME_LIMIT_DEFAULT, Policy},
    source::{
        AbortCause, CancelRefused, CommitRefused, Outcome, OutcomeConflict, Proof, ReclaimRefused,
        SourcePhase, SourceProgress,
    },
};
use proto::{CertificateFingerprint, MigrationId, VmId};
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroU64,
    time::Duration,
};
use tokio::sync::{mpsc, oneshot, watch};

/// Bulk streams: two, so that a lost packet holds up half of the pages only.
const STREAMS_DEFAULT: u8 = 2;

/// What to move, where to, and how.
#[derive(Debug, Clone)]
pub struct SourceConfig {
    /// The attempt.
    pub migration: MigrationId,
    /// The machine.
    pub vm: VmId,
    /// Address to send from.
    pub local_ip: IpAddr,
    /// Where the target listens.
    pub target: SocketAddr,
    /// The only certificate that is accepted there.
    pub target_fingerprint: CertificateFingerprint,
    /// How hard to try.
    pub policy: Policy,
    /// Blackout to aim at; zero means the default.
    pub downtime_limit: Duration,
    /// Limit of page data on the network; `None` for as fast as it goes.
    pub bandwidth_bytes_per_s: Option<NonZeroU64>,
    /// How memory is proved.
    pub proof: Proof,
    /// Bulk streams, 1 to [`crate::wire::BULK_STREAMS_MAX`].
    pub streams: u8,
    /// Connections that they are spread over, 1 to [`crate::wire::CONNECTIONS_MAX`]. Each keeps a thread at both sides
    /// busy: more than one is faster only where cores are spare.
    pub connections: u8,
}

impl SourceConfig {
    /// A migration with default policy and limits.
    #[must_use]
    pub fn new(
        migration: MigrationId,
        vm: VmId,
        target: SocketAddr,
        target_fingerprint: CertificateFingerprint,
    ) -> Self {
        let local_ip =
            if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { IpAddr::from(Ipv6Addr::UNSPECIFIED) };
        Self {
            migration,
            vm,
            local_ip,
            target,
            target_fingerprint,
            policy: Policy::Default,
            downtime_limit: DOWNTIME_LIMIT_DEFAULT,
            bandwidth_bytes_per_s: None,
            proof: Proof::default(),
            streams: STREAMS_DEFAULT,
            connections: 1,
        }
    }

    /// The same over so many connections, each with a stream at least.
    #[must_use]
    pub fn with_connections(self, connections: u8) -> Self {
        Self { connections, streams: self.streams.max(connections), ..self }
    }
}

pub(super) enum Request {
    CommitProposed(oneshot::Sender<Result<(), CommitRefused>>),
    Outcome(Outcome, oneshot::Sender<Result<(), OutcomeConflict>>),
    Cancel(oneshot::Sender<Result<(), CancelRefused>>),
    TakeIndex(oneshot::Sender<Option<Vec<u8>>>),
    Reclaimed(oneshot::Sender<Result<(), ReclaimRefused>>),
}

/// Controls a source. Clones control the same one; dropping all of them does not stop it.
#[derive(Debug, Clone)]
pub struct SourceHandle {
    pub(super) requests: mpsc::Sender<Request>,
    pub(super) progress: watch::Receiver<SourceProgress>,
}

impl SourceHandle {
    /// Phase and live numbers.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<SourceProgress> {
        self.progress.clone()
    }

    /// Comes right before the commit is proposed. After `Ok` the source does not resume before [`Self::outcome`].
    ///
    /// # Errors
    /// The source has aborted, or is not paused yet.
    pub async fn commit_proposed(&self) -> Result<(), CommitRefused> {
        let gone = CommitRefused::Aborted { cause: self.gone() };
        self.ask(Request::CommitProposed).await.unwrap_or(Err(gone))
    }

    /// Tells what the pool has decided; harmless when told again.
    ///
    /// # Errors
    /// The decision contradicts what the source has done: a machine that runs here must be stopped.
    pub async fn outcome(&self, outcome: Outcome) -> Result<(), OutcomeConflict> {
        let phase = self.progress.borrow().phase.name();
        self.ask(|answer| Request::Outcome(outcome, answer))
            .await
            .unwrap_or(Err(OutcomeConflict { outcome, phase }))
    }

    /// Gives the migration up. The machine runs again when the phase is `Aborted`.
    ///
    /// # Errors
    /// The commit has been proposed.
    pub async fn cancel(&self) -> Result<(), CancelRefused> {
        self.ask(Request::Cancel).await.unwrap_or(Ok(()))
    }

    /// Tells that the pool has given the machine back after the commit, that its volumes are taken back, and that it never ran at
    /// the target. It runs again when the phase is `Aborted`.
    ///
    /// # Errors
    /// It has run there, or was never given away.
    pub async fn reclaimed(&self) -> Result<(), ReclaimRefused> {
        let phase = self.progress.borrow().phase.name();
        self.ask(Request::Reclaimed).await.unwrap_or(Err(ReclaimRefused::NotCommitted { phase }))
    }

    /// The index of this side's memory as the target began with it (see [`crate::index`]), for a machine that has moved. It is
    /// made now, so that the migration itself need not wait for it. `None` when it would be too large.
    pub async fn take_index(&self) -> Option<Vec<u8>> {
        self.ask(Request::TakeIndex).await.flatten()
    }

    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Option<T> {
        let (answer, answered) = oneshot::channel();
        self.requests.send(request(answer)).await.ok()?;
        answered.await.ok()
    }

    /// The cause to name when the thread is gone, which only a panic can do.
    fn gone(&self) -> AbortCause {
        match &self.progress.borrow().phase {
            SourcePhase::Aborted { cause } | SourcePhase::Lost { cause, .. } => cause.clone(),
            _ => AbortCause::Vm { error: "the migration thread has ended".to_owned() },
        }
    }
}
