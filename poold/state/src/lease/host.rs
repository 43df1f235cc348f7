//! The host's side: renews often, and counts each lease from the moment its renewal was sent.

use crate::timing::Timing;

const NS_PER_MS: u64 = 1_000_000;

/// Until when this host's VMs may run. All times are CLOCK_BOOTTIME in nanoseconds, which goes on while the host sleeps.
#[derive(Debug, Clone)]
pub struct HostLease {
    renew_ns: u64,
    ttl_ns_max: u64,
    next_send_ns: Option<u64>,
    deadline_ns: u64,
}

/// What happens at the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostLeaseEvent {
    /// Time has passed.
    Tick,
    /// The leader answered the renewal that was sent at `sent_ns`. `ttl_ms` 0: it granted nothing.
    Answered {
        /// When the renewal was sent.
        sent_ns: u64,
        /// The lease's length from then on.
        ttl_ms: u64,
    },
}

/// What the shell must do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostLeaseCommand {
    /// Send a renewal now, and give it at most one interval to be answered.
    SendRenewal,
    /// Tell the VM processes their new deadline.
    Deadline {
        /// CLOCK_BOOTTIME.
        boottime_ns: u64,
    },
}

impl HostLease {
    /// A host without a lease.
    #[must_use]
    pub fn new(timing: &Timing) -> Self {
        Self {
            renew_ns: timing.lease_renew_ms.saturating_mul(NS_PER_MS),
            ttl_ns_max: timing.lease_ttl_ms.saturating_mul(NS_PER_MS),
            next_send_ns: None,
            deadline_ns: 0,
        }
    }

    /// Takes an event and says what to do.
    pub fn handle(&mut self, now_ns: u64, event: HostLeaseEvent) -> Vec<HostLeaseCommand> {
        match event {
            HostLeaseEvent::Tick => {
                if self.next_send_ns.is_some_and(|next| now_ns < next) {
                    return Vec::new();
                }
                self.next_send_ns = Some(now_ns.saturating_add(self.renew_ns));
                vec![HostLeaseCommand::SendRenewal]
            }
            HostLeaseEvent::Answered { sent_ns, ttl_ms } => {
                // An answer can't come before its question, and no leader grants more than the pool's TTL.
                if ttl_ms == 0 || sent_ns > now_ns {
                    return Vec::new();
                }
                let ttl_ns = ttl_ms.saturating_mul(NS_PER_MS).min(self.ttl_ns_max);
                let deadline_ns = sent_ns.saturating_add(ttl_ns);
                if deadline_ns <= self.deadline_ns {
                    return Vec::new();
                }
                self.deadline_ns = deadline_ns;
                vec![HostLeaseCommand::Deadline { boottime_ns: deadline_ns }]
            }
        }
    }

    /// The end of the lease; 0 when there was none yet.
    #[must_use]
    pub fn deadline_ns(&self) -> u64 {
        self.deadline_ns
    }

    /// When the next tick is due; none: now.
    #[must_use]
    pub fn next_tick_ns(&self) -> Option<u64> {
        self.next_send_ns
    }
}
