//! The schedule of faults: a pure function of the seed.

use ::tests::DiskKind;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

/// How often two faults strike at the same time.
const TWO_AT_ONCE: f64 = 0.2;

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
    /// kill -9 of everything at once; the daemons are started again after the time, in an order drawn from `order`.
    ColdBoot { order: u64, away_ms: u64 },
    /// The power of the host is cut: all its processes are gone, and what was not synced to its disk; back after the time.
    CutPower { victim: Victim, away_ms: u64 },
    /// The power of all hosts is cut at once; they are back after the time, in an order drawn from `order`.
    CutAllPower { order: u64, away_ms: u64 },
    /// SIGSTOP of the process of a VM alone; SIGCONT after the time.
    StopVm { vm: usize, away_ms: u64 },
    /// The pool falls apart for the time: hosts (by position) whose bit is set in `side` on one side, the rest on the other.
    CutHalves { side: u64, away_ms: u64 },
    /// What the host sends to another one is lost for the time; the other direction works.
    CutOneWay { victim: Victim, to: usize, away_ms: u64 },
    /// The host and another one don't reach each other for the time; everybody else reaches both.
    CutPair { victim: Victim, other: usize, away_ms: u64 },
    /// The disk of the host is full for the time.
    FillDisk { victim: Victim, away_ms: u64 },
    /// The network of the host carries only so much for the time.
    SlowLink { victim: Victim, kbit_per_s: u64, away_ms: u64 },
    /// Bits are turned in segment files of a host of which every replica has others in sync.
    FlipBits { victim: Victim, bits: u64 },
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
            Self::ColdBoot { .. } => "cold boot",
            Self::CutPower { .. } => "cut power",
            Self::CutAllPower { .. } => "cut all power",
            Self::StopVm { .. } => "stop vm process",
            Self::CutHalves { .. } => "cut halves",
            Self::CutOneWay { .. } => "cut one way",
            Self::CutPair { .. } => "cut pair",
            Self::FillDisk { .. } => "fill disk",
            Self::SlowLink { .. } => "slow link",
            Self::FlipBits { .. } => "flip bits",
        }
    }

    /// How long it lasts; 0 for one that is not undone.
    #[must_use]
    pub fn away_ms(self) -> u64 {
        match self {
            Self::KillVm { .. } | Self::FlipBits { .. } => 0,
            Self::KillDaemon { away_ms, .. }
            | Self::KillHost { away_ms, .. }
            | Self::StopHost { away_ms, .. }
            | Self::StopDaemon { away_ms, .. }
            | Self::CutHost { away_ms, .. }
            | Self::ColdBoot { away_ms, .. }
            | Self::CutPower { away_ms, .. }
            | Self::CutAllPower { away_ms, .. }
            | Self::StopVm { away_ms, .. }
            | Self::CutHalves { away_ms, .. }
            | Self::CutOneWay { away_ms, .. }
            | Self::CutPair { away_ms, .. }
            | Self::FillDisk { away_ms, .. }
            | Self::SlowLink { away_ms, .. } => away_ms,
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
    /// A second one that strikes at the same time.
    pub also: Option<Fault>,
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
    /// What the hosts' disks are: power is cut only of those that forget.
    pub disk: DiskKind,
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

    fn host(&mut self) -> usize {
        self.random.random_range(0..self.scale.hosts)
    }

    fn vm(&mut self) -> usize {
        self.random.random_range(0..self.scale.vms)
    }

    fn fault(&mut self) -> Fault {
        let (victim, away_ms) = (self.victim(), self.away_ms());
        let fault = match self.random.random_range(0..28) {
            0..3 => Fault::KillDaemon { victim, away_ms },
            3 => Fault::KillDaemon { victim: Victim::Leader, away_ms },
            4..6 => Fault::KillVm { vm: self.vm() },
            6..9 => Fault::KillHost { victim, away_ms },
            9 => Fault::KillHost { victim: Victim::Leader, away_ms },
            10 => Fault::StopDaemon { victim, away_ms },
            11..13 => Fault::StopHost { victim, away_ms },
            13..15 => Fault::CutHost { victim, away_ms },
            15 => Fault::ColdBoot { order: self.random.random(), away_ms },
            16..18 => Fault::StopVm { vm: self.vm(), away_ms: self.stop_ms() },
            18 => {
                Fault::CutHalves { side: self.random.random_range(1..(1 << self.scale.hosts) - 1), away_ms }
            }
            19..21 => Fault::CutOneWay { victim, to: self.host(), away_ms },
            21 => Fault::CutPair { victim, other: self.host(), away_ms },
            22 => Fault::FillDisk { victim, away_ms },
            23 => Fault::SlowLink { victim, kbit_per_s: self.random.random_range(5_000..50_000), away_ms },
            24..27 => Fault::CutPower { victim, away_ms },
            _ => Fault::CutAllPower { order: self.random.random(), away_ms },
        };
        match fault {
            Fault::CutPower { victim, away_ms } if self.scale.disk == DiskKind::Memory => {
                Fault::KillHost { victim, away_ms }
            }
            Fault::CutAllPower { order, away_ms } if self.scale.disk == DiskKind::Memory => {
                Fault::ColdBoot { order, away_ms }
            }
            fault => fault,
        }
    }

    /// How long a VM process alone stands: about a third of the loss of a host (its lease goes on), or most of it.
    fn stop_ms(&mut self) -> u64 {
        let lost = self.scale.lost_ms;
        if self.random.random_bool(0.5) { lost / 3 } else { lost * 4 / 5 }
    }
}

impl Iterator for Plan {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        let lost = self.scale.lost_ms;
        let gap_ms = self.random.random_range(lost / 10..=lost);
        let settle = self.random.random_bool(0.6);
        let fault = self.fault();
        let also = self.random.random_bool(TWO_AT_ONCE).then(|| self.fault());
        Some(Step { gap_ms, settle, fault, also })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const SCALE: Scale = Scale { hosts: 3, vms: 2, lost_ms: 3000, disk: DiskKind::Volatile };

    #[test]
    fn a_seed_has_one_plan_and_another_seed_another() {
        let take = |seed| Plan::new(seed, SCALE).take(50).collect::<Vec<_>>();
        assert_eq!(take(7), take(7));
        assert_ne!(take(7), take(8));
    }

    #[test]
    fn every_kind_of_fault_comes_and_absences_lie_around_the_loss() {
        let steps: Vec<Step> = Plan::new(1, SCALE).take(600).collect();
        let kinds: BTreeSet<&str> = steps.iter().map(|step| step.fault.kind()).collect();
        // Bits are turned by scenarios only: a second fault may take the good replicas away.
        assert_eq!(kinds.len(), 17, "{kinds:?}");
        let aways: Vec<u64> = steps.iter().map(|step| step.fault.away_ms()).filter(|&ms| ms > 0).collect();
        assert!(aways.iter().any(|&ms| ms < SCALE.lost_ms / 3) && aways.iter().any(|&ms| ms > SCALE.lost_ms));
        assert!(steps.iter().any(|step| step.also.is_some()));
    }
}
