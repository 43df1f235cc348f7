//! When a majority last followed this leader.
//!
//! Leases rest on it: a leader that was cut off must not extend them. openraft's own metric is as old as its last
//! publication, and its clock stands still while the machine sleeps. So the task asks for a proof of leadership again and
//! again and keeps the time on CLOCK_BOOTTIME *before* it asked: at that time or later a majority knew no later leader.

use super::PoolRaft;
use crate::lease::boottime;
use openraft::ServerState;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// A proof is asked for this often within one renewal of the leases.
const PROOFS_PER_RENEWAL: u32 = 2;

/// The last proof; clones share it.
#[derive(Debug, Clone, Default)]
pub struct QuorumProof {
    last: Arc<Mutex<Option<Proof>>>,
}

#[derive(Debug, Clone, Copy)]
struct Proof {
    term: u64,
    asked: Duration,
}

impl QuorumProof {
    /// Age of the last proof that belongs to `term`.
    pub fn age(&self, term: u64) -> Option<Duration> {
        let last = *self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.filter(|proof| proof.term == term).map(|proof| boottime().saturating_sub(proof.asked))
    }

    /// Keeps the proof young while this host leads.
    pub async fn run(self, raft: PoolRaft, lease_renew: Duration, stop: CancellationToken) {
        let interval = lease_renew / PROOFS_PER_RENEWAL;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.refresh(&raft) => {}
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(interval) => {}
            }
        }
    }

    async fn refresh(&self, raft: &PoolRaft) {
        let term = {
            let metrics = raft.metrics();
            let metrics = metrics.borrow();
            if metrics.state != ServerState::Leader {
                return;
            }
            metrics.current_term
        };
        let asked = boottime();
        // openraft bounds each question by the heartbeat interval.
        if raft.get_read_log_id().await.is_ok() {
            *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(Proof { term, asked });
        }
    }
}
