//! Members that get on, but so slowly that every write waits for them.
//!
//! ```text
//!  behind: ▁▁▂▂▃▃▂▂▃▄▅▆▇█ ──slow──▶ leaves the set, if that is large enough without it ──pause──▶ resynced
//!          grows while it is behind, shrinks while it is not                    60 s, then twice as long each time
//! ```
//! A member is behind while it owes a write for long that another member has confirmed: a guest that writes faster than all can
//! take makes nobody slow. A bad moment is forgiven, since it costs more to copy what a member misses than to wait for it.

use super::peer::Peer;
use super::{Owner, TICK};
use proto::HostId;
use std::time::Duration;

/// A write that others have confirmed and a member owes for so long puts it behind: ten times what a busy disk takes.
const BEHIND_AFTER: Duration = Duration::from_millis(250);

/// So long it must have been behind, less the time in which it was not.
const SLOW_AFTER: Duration = Duration::from_secs(15);

/// Pause before it is resynced.
const PAUSE: Duration = Duration::from_secs(60);

/// Longest pause: a disk that was replaced is found within this time.
const PAUSE_MAX: Duration = Duration::from_secs(16 * 60);

/// A member that was not behind for so long has no past.
const FORGIVEN_AFTER: Duration = Duration::from_secs(10 * 60);

/// How slow one replica is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Slowness {
    behind: Duration,
    fine: Duration,
    looked_at: Duration,
    times_out: u32,
}

impl Slowness {
    fn look(&mut self, now: Duration, is_behind: bool) {
        // An owner that was itself stopped blames nobody for it.
        let passed = now.saturating_sub(self.looked_at).min(2 * TICK);
        self.looked_at = now;
        if is_behind {
            self.behind = (self.behind + passed).min(SLOW_AFTER);
            self.fine = Duration::ZERO;
            return;
        }
        self.behind = self.behind.saturating_sub(passed);
        self.fine += passed;
        if self.fine >= FORGIVEN_AFTER {
            self.times_out = 0;
        }
    }

    fn is_slow(&self) -> bool {
        self.behind >= SLOW_AFTER
    }

    /// It has left the set; how long it is left alone, if that was because it is slow.
    pub fn put_out(&mut self) -> Option<Duration> {
        if !self.is_slow() {
            return None;
        }
        let pause = PAUSE.saturating_mul(1 << self.times_out.min(8)).min(PAUSE_MAX);
        self.times_out += 1;
        self.behind = Duration::ZERO;
        Some(pause)
    }
}

impl Owner {
    /// Time has passed: looks at how far the members are behind one another.
    pub(super) fn look_at_slowness(&mut self) {
        let now = self.now;
        let behind: Vec<HostId> = self.peers.keys().copied().filter(|host| self.is_behind(*host)).collect();
        for (host, peer) in &mut self.peers {
            peer.slowness.look(now, behind.contains(host));
        }
    }

    fn is_behind(&self, host: HostId) -> bool {
        let Some(peer) = self.peers.get(&host).filter(|peer| peer.is_streaming()) else { return false };
        let oldest = peer.connection.as_ref().and_then(|connection| connection.unconfirmed.front());
        let Some(oldest) = oldest.filter(|write| self.now >= write.sent_at + BEHIND_AFTER) else {
            return false;
        };
        let has_it = |peer: &Peer| peer.is_streaming() && peer.progress.written >= oldest.sequence;
        self.peers.values().any(has_it)
    }

    /// Whether every write waits for this member, and the set is large enough without it.
    pub(super) fn is_slow(&self, host: HostId) -> bool {
        let members = self.view().map_or(0, |view| view.isr.len());
        let is_slow = self.peers.get(&host).is_some_and(|peer| peer.slowness.is_slow());
        is_slow && members > self.config.min_isr as usize
    }
}
