//! Two guests, their handles, and what the two daemons do.

use crate::support::ModelGuest;
use migrate::proof::PageHashes;
use migrate::{
    Identity, Outcome, Rehash, ResumedParts, SourceConfig, SourceHandle, SourcePhase, SourceProgress,
    SourceTask, TargetConfig, TargetHandle, TargetPhase, TargetTask,
};
use proto::{MigrationId, VmId};
use std::{
    net::{IpAddr, Ipv4Addr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

pub const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
pub const DEADLINE: Duration = Duration::from_secs(60);
pub const STATE: &[u8] = b"registers and devices";

pub struct Pair {
    pub source: Arc<ModelGuest>,
    pub target: Arc<ModelGuest>,
    pub source_identity: Identity,
    pub incoming: TargetHandle,
}

impl Pair {
    pub fn new(pages: usize, rehash: Rehash) -> Self {
        let source = Arc::new(ModelGuest::running(pages, STATE));
        Self::of(source, Arc::new(ModelGuest::new(pages)), rehash, None)
    }

    /// Between these two; the target's memory may be one that was kept.
    pub fn of(
        source: Arc<ModelGuest>,
        target: Arc<ModelGuest>,
        rehash: Rehash,
        kept: Option<PageHashes>,
    ) -> Self {
        let (source_identity, target_identity) =
            (Identity::generate().unwrap(), Identity::generate().unwrap());
        let config = TargetConfig {
            migration: MigrationId(5),
            vm: VmId(4),
            listen_ip: LOOPBACK,
            source_fingerprint: source_identity.fingerprint(),
            rehash,
            kept,
        };
        let incoming = TargetTask::listen(target_identity, config, target.clone()).unwrap();
        Self { source, target, source_identity, incoming }
    }

    pub fn config(&self) -> SourceConfig {
        SourceConfig::new(MigrationId(5), VmId(4), self.incoming.address(), self.incoming.fingerprint())
    }

    pub fn start(&self, config: SourceConfig) -> SourceHandle {
        SourceTask::spawn(self.source_identity.clone(), config, self.source.clone()).unwrap()
    }

    /// From paused to done, as the two daemons do it.
    pub async fn commit(&self, outgoing: &SourceHandle) -> SourceProgress {
        let paused = source_phase(outgoing, |phase| matches!(phase, SourcePhase::Paused { .. })).await;
        assert!(matches!(paused.phase, SourcePhase::Paused { .. }), "{paused:?}");
        outgoing.commit_proposed().await.unwrap();
        outgoing.outcome(Outcome::Committed).await.unwrap();
        target_phase(&self.incoming, |phase| matches!(phase, TargetPhase::Ready { .. })).await;
        *self.target.running.lock().unwrap() = true;
        let parts = ResumedParts { activate: Duration::from_micros(10), resume: Duration::from_micros(20) };
        self.incoming.send_resumed(parts).await;
        source_phase(outgoing, SourcePhase::is_final).await
    }
}

pub async fn source_phase(handle: &SourceHandle, wanted: impl Fn(&SourcePhase) -> bool) -> SourceProgress {
    let mut progress = handle.progress();
    let waiting = progress.wait_for(|now| wanted(&now.phase) || now.phase.is_final());
    let now = tokio::time::timeout(DEADLINE, waiting).await.expect("the source gets on").unwrap();
    now.clone()
}

pub async fn target_phase(handle: &TargetHandle, wanted: impl Fn(&TargetPhase) -> bool) -> TargetPhase {
    let mut phase = handle.phase();
    let waiting = phase.wait_for(|now| wanted(now) || now.is_final());
    let now = tokio::time::timeout(DEADLINE, waiting).await.expect("the target gets on").unwrap();
    now.clone()
}

/// A guest that writes to `pages` pages for as long as it may run.
pub struct Writer {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Writer {
    pub fn start(guest: Arc<ModelGuest>, pages: usize, pages_per_ms: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let begun = Instant::now();
            let mut written = 0_usize;
            while !stopped.load(Ordering::Relaxed) {
                let due = begun.elapsed().as_micros() as usize * pages_per_ms / 1000;
                {
                    let running = guest.running.lock().unwrap();
                    while *running && written < due {
                        guest.store(written.wrapping_mul(7919) % pages, written, written as u64 + 1);
                        written += 1;
                    }
                }
                // Paces the writes; nothing waits for it.
                std::thread::park_timeout(Duration::from_micros(500));
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
    }
}
