//! The lease guard: decides, from the deadlines that the daemon passes on, whether this VM may run.
//!
//! ```text
//!            extended                       deadline                     vCPUs stopped
//!  Unleased ──────────▶ Held{deadline} ──────────────▶ Stopping{exit_by} ───────────────▶ Fenced
//!                          ▲   │ extended: moves on         │ exit_by passed                │
//!                          │   ▼                            ▼                               │
//!                          └───┘                       ExitProcess                          │
//!                          ▲          extended with the placement confirmed                  │
//!                          └────────────────────────────────────────────────────────────────┘
//!  Exempt: never fenced (`ha = none`: nobody starts the VM elsewhere by himself).
//! ```
//!
//! Invariants: vCPUs run only in `Exempt` or in `Held` before its deadline; a deadline never moves back; out of
//! `Fenced` leads only an extension whose sender has just read that placement and epoch are still this process's own.
//!
//! Time is CLOCK_BOOTTIME in nanoseconds: it goes on while the machine sleeps, and so does the leader's patience.

/// What a vCPU gets to stop when the process itself was suspended past the deadline, in nanoseconds: its memory may be
/// the only copy, so it isn't thrown away unseen; but the pool may have started the VM elsewhere, so it is short.
const LATE_GRACE_NS: u64 = 200_000_000;

/// A point on CLOCK_BOOTTIME, in nanoseconds since boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct BootTime(pub u64);

/// Where the guard stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseState {
    /// No lease is needed.
    Exempt,
    /// No lease has come yet.
    Unleased,
    /// vCPUs may run until the deadline.
    Held { deadline: BootTime },
    /// The deadline has passed and the vCPUs were told to stop; past `exit_by` the process ends itself.
    Stopping { exit_by: BootTime, deadline: BootTime },
    /// The vCPUs stand still for want of a lease.
    Fenced { deadline: BootTime },
}

/// What happens to the guard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseEvent {
    /// The daemon passed on a deadline.
    Extended { deadline: BootTime, placement: Placement },
    /// Time has passed.
    Tick,
    /// All vCPUs are out of the guest.
    VcpusStopped,
}

/// What the daemon knows of the VM's placement as it extends the lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// Read linearizably just now: still this process's own.
    Confirmed,
    /// Not read.
    Unknown,
}

/// What the shell must do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseCommand {
    /// Stop all vCPUs, then report `VcpusStopped`.
    HoldVcpus,
    /// The lease no longer stands in the vCPUs' way.
    ReleaseVcpus,
    /// A vCPU doesn't stop: end the process at once.
    ExitProcess,
}

/// The guard of one VM process.
#[derive(Debug)]
pub struct LeaseGuard {
    state: LeaseState,
    fence_exit_ns: u64,
}

impl LeaseGuard {
    /// A guard without a lease; `fence_exit_ns` is the time that a vCPU has to stop, in nanoseconds.
    pub fn new(fence_exit_ns: u64) -> Self {
        Self { state: LeaseState::Unleased, fence_exit_ns }
    }

    /// A guard that never fences.
    pub fn exempt() -> Self {
        Self { state: LeaseState::Exempt, fence_exit_ns: 0 }
    }

    /// Where the guard stands.
    pub fn state(&self) -> LeaseState {
        self.state
    }

    /// When `Tick` must come at the latest; `None` while nothing can expire.
    pub fn next_wakeup(&self) -> Option<BootTime> {
        match self.state {
            LeaseState::Held { deadline } => Some(deadline),
            LeaseState::Stopping { exit_by, .. } => Some(exit_by),
            LeaseState::Exempt | LeaseState::Unleased | LeaseState::Fenced { .. } => None,
        }
    }

    /// Advances the guard; the only place where it changes state.
    pub fn handle(&mut self, now: BootTime, event: LeaseEvent) -> Option<LeaseCommand> {
        let expired = self.expire(now);
        let (next, command) = match (self.state, event) {
            (LeaseState::Unleased, LeaseEvent::Extended { deadline, .. }) if deadline > now => {
                (LeaseState::Held { deadline }, Some(LeaseCommand::ReleaseVcpus))
            }
            (LeaseState::Held { deadline: old }, LeaseEvent::Extended { deadline, .. }) => {
                (LeaseState::Held { deadline: old.max(deadline) }, None)
            }
            (
                LeaseState::Fenced { .. },
                LeaseEvent::Extended { deadline, placement: Placement::Confirmed },
            ) if deadline > now => (LeaseState::Held { deadline }, Some(LeaseCommand::ReleaseVcpus)),
            (LeaseState::Stopping { deadline, .. }, LeaseEvent::VcpusStopped) => {
                (LeaseState::Fenced { deadline }, None)
            }
            // An extension that comes too late, or without the placement, changes nothing.
            (state, LeaseEvent::Extended { .. } | LeaseEvent::Tick | LeaseEvent::VcpusStopped) => {
                (state, None)
            }
        };
        self.state = next;
        command.or(expired)
    }

    /// Applies the passing of time.
    fn expire(&mut self, now: BootTime) -> Option<LeaseCommand> {
        match self.state {
            LeaseState::Held { deadline } if now >= deadline => {
                let on_time = deadline.0.saturating_add(self.fence_exit_ns);
                let late = now.0.saturating_add(LATE_GRACE_NS);
                self.state = LeaseState::Stopping { exit_by: BootTime(on_time.max(late)), deadline };
                Some(LeaseCommand::HoldVcpus)
            }
            LeaseState::Stopping { exit_by, .. } if now >= exit_by => Some(LeaseCommand::ExitProcess),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXIT: u64 = 3_000_000_000;

    fn extended(deadline: u64, placement: Placement) -> LeaseEvent {
        LeaseEvent::Extended { deadline: BootTime(deadline), placement }
    }

    fn held(deadline: u64) -> LeaseGuard {
        let mut guard = LeaseGuard::new(EXIT);
        let command = guard.handle(BootTime(0), extended(deadline, Placement::Unknown));
        assert_eq!(command, Some(LeaseCommand::ReleaseVcpus));
        guard
    }

    #[test]
    fn vcpus_are_held_at_the_deadline_and_not_before() {
        let mut guard = held(10_000);
        assert_eq!(guard.handle(BootTime(9_999), LeaseEvent::Tick), None);
        assert_eq!(guard.handle(BootTime(10_000), LeaseEvent::Tick), Some(LeaseCommand::HoldVcpus));
    }

    #[test]
    fn a_deadline_never_moves_back() {
        let mut guard = held(10_000);
        guard.handle(BootTime(1), extended(5_000, Placement::Confirmed));
        assert_eq!(guard.state(), LeaseState::Held { deadline: BootTime(10_000) });
    }

    #[test]
    fn a_late_extension_does_not_undo_the_end_of_the_lease() {
        let mut guard = held(10_000);
        // The extension arrives after the deadline, before any tick: a suspended process sees it first.
        let command = guard.handle(BootTime(10_001), extended(20_000, Placement::Unknown));
        assert_eq!(command, Some(LeaseCommand::HoldVcpus));
        guard.handle(BootTime(10_002), LeaseEvent::VcpusStopped);
        assert_eq!(guard.handle(BootTime(10_003), extended(20_000, Placement::Unknown)), None);
        assert!(matches!(guard.state(), LeaseState::Fenced { .. }));
    }

    #[test]
    fn only_a_confirmed_placement_leads_out_of_the_fence() {
        let mut guard = held(10_000);
        guard.handle(BootTime(10_000), LeaseEvent::Tick);
        guard.handle(BootTime(10_001), LeaseEvent::VcpusStopped);
        assert_eq!(
            guard.handle(BootTime(11_000), extended(10_500, Placement::Confirmed)),
            None,
            "already over"
        );
        let command = guard.handle(BootTime(11_000), extended(20_000, Placement::Confirmed));
        assert_eq!(command, Some(LeaseCommand::ReleaseVcpus));
    }

    #[test]
    fn a_vcpu_that_does_not_stop_ends_the_process() {
        let mut guard = held(10_000);
        guard.handle(BootTime(10_000), LeaseEvent::Tick);
        assert_eq!(guard.next_wakeup(), Some(BootTime(10_000 + EXIT)));
        assert_eq!(guard.handle(BootTime(10_000 + EXIT), LeaseEvent::Tick), Some(LeaseCommand::ExitProcess));
    }

    #[test]
    fn a_process_that_slept_through_everything_stops_its_vcpus_or_exits_soon() {
        let mut guard = held(10_000);
        let awake = 20 * EXIT;
        assert_eq!(guard.handle(BootTime(awake), LeaseEvent::Tick), Some(LeaseCommand::HoldVcpus));
        let late = BootTime(awake + LATE_GRACE_NS);
        assert_eq!(guard.next_wakeup(), Some(late));
        assert_eq!(guard.handle(late, LeaseEvent::Tick), Some(LeaseCommand::ExitProcess));
    }

    #[test]
    fn an_exempt_vm_is_never_fenced() {
        let mut guard = LeaseGuard::exempt();
        assert_eq!(guard.handle(BootTime(u64::MAX), LeaseEvent::Tick), None);
        assert_eq!(guard.next_wakeup(), None);
    }
}
