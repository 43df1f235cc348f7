//! The schedule of faults: a pure function of the seed.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

/// A host, chosen when the fault strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Victim {
    /// By position.
    Host(usize),
    /// The host that runs this VM (by position) then.
    HostOfVm(usize),
    /// The leader then.
    Leader,
}

/// What happens to a pool. Durations in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Fault {
    /// kill -9 of the daemon; started again after the time.
    KillDaemon { victim: Victim, away_ms: u64 },
    /// kill -9 of the process of a VM.
    KillVm { vm: usize },
    /// kill -9 of the daemon and all VM processes; the daemon is started again after the time.
    KillHost { victim: Victim, away_ms: u64 },
    /// SIGSTOP of the daemon and all VM processes; SIGCONT after the time.
    StopHost { victim: Victim, away_ms: u64 },
    /// SIGSTOP of the daemon alone; SIGCONT after the time.
    StopDaemon { victim: Victim, away_ms: u64 },
    /// Nobody reaches the host for the time.
    CutHost { victim: Victim, away_ms: u64 },
}

impl Fault {
    /// Name of its kind, for the summary.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::KillDaemon { victim: Victim::Leader, .. } => "kill daemon of leader",
            Self::KillDaemon { .. } => "kill daemon",
            Self::KillVm { .. } => "kill vm process",
            Self::KillHost { victim: Victim::Leader, .. } => "kill host of leader",
            Self::KillHost { .. } => "kill host",
            Self::StopHost { .. } => "stop host",
            Self::StopDaemon { .. } => "stop daemon",
            Self::CutHost { .. } => "cut host",
        }
    }
}

/// One step: wait, then strike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Quiet time before the fault, in which VMs migrate.
    pub gap_ms: u64,
    /// Wait until every VM beats before the fault; else it strikes into the recovery from the last one.
    pub settle: bool,
    /// The fault.
    pub fault: Fault,
}

/// What a plan is made for.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    /// Number of hosts.
    pub hosts: usize,
    /// Number of VMs.
    pub vms: usize,
    /// Time after which the pool declares a host lost: absences are drawn around it.
    pub lost_ms: u64,
}

/// The endless sequence of steps of a seed.
#[derive(Debug)]
pub struct Plan {
    random: StdRng,
    scale: Scale,
}

impl Plan {
    /// The plan of a seed.
    #[must_use]
    pub fn new(seed: u64, scale: Scale) -> Self {
        Self { random: StdRng::seed_from_u64(seed), scale }
    }

    fn victim(&mut self) -> Victim {
        match self.random.random_range(0..4) {
            0 => Victim::Host(self.random.random_range(0..self.scale.hosts)),
            1 => Victim::Leader,
            _ => Victim::HostOfVm(self.random.random_range(0..self.scale.vms)),
        }
    }

    /// An absence: far below, about, or well above the time at which a host counts as lost.
    fn away_ms(&mut self) -> u64 {
        let lost = self.scale.lost_ms;
        match self.random.random_range(0..3) {
            0 => self.random.random_range(lost / 20..=lost / 3),
            1 => self.random.random_range(lost / 2..=lost),
            _ => self.random.random_range(lost * 5 / 4..=lost * 2),
        }
    }

    fn fault(&mut self) -> Fault {
        match self.random.random_range(0..12) {
            0..2 => Fault::KillDaemon { victim: self.victim(), away_ms: self.away_ms() },
            2 => Fault::KillDaemon { victim: Victim::Leader, away_ms: self.away_ms() },
            3..5 => Fault::KillVm { vm: self.random.random_range(0..self.scale.vms) },
            5..7 => Fault::KillHost { victim: self.victim(), away_ms: self.away_ms() },
            7 => Fault::KillHost { victim: Victim::Leader, away_ms: self.away_ms() },
            8 => Fault::StopDaemon { victim: self.victim(), away_ms: self.away_ms() },
            9 => Fault::StopHost { victim: self.victim(), away_ms: self.away_ms() },
            _ => Fault::CutHost { victim: self.victim(), away_ms: self.away_ms() },
        }
    }
}

impl Iterator for Plan {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        let lost = self.scale.lost_ms;
        let gap_ms = self.random.random_range(lost / 10..=lost);
        let settle = self.random.random_bool(0.6);
        Some(Step { gap_ms, settle, fault: self.fault() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const SCALE: Scale = Scale { hosts: 3, vms: 2, lost_ms: 3000 };

    #[test]
    fn a_seed_has_one_plan_and_another_seed_another() {
        let take = |seed| Plan::new(seed, SCALE).take(50).collect::<Vec<_>>();
        assert_eq!(take(7), take(7));
        assert_ne!(take(7), take(8));
    }

    #[test]
    fn every_kind_of_fault_comes_and_absences_lie_around_the_loss() {
        let steps: Vec<Step> = Plan::new(1, SCALE).take(400).collect();
        let kinds: BTreeSet<&str> = steps.iter().map(|step| step.fault.kind()).collect();
        assert_eq!(kinds.len(), 8, "{kinds:?}");
        let away = |fault| match fault {
            Fault::KillVm { .. } => None,
            Fault::KillDaemon { away_ms, .. }
            | Fault::KillHost { away_ms, .. }
            | Fault::StopHost { away_ms, .. }
            | Fault::StopDaemon { away_ms, .. }
            | Fault::CutHost { away_ms, .. } => Some(away_ms),
        };
        let aways: Vec<u64> = steps.iter().filter_map(|step| away(step.fault)).collect();
        assert!(aways.iter().any(|&ms| ms < SCALE.lost_ms / 3) && aways.iter().any(|&ms| ms > SCALE.lost_ms));
    }
}
