//! The schedule of faults: a pure function of the seed.

use ::tests::{DiskKind, Traffic};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

pub use crate::fault::{DiskPart, Fault, Kept, Victim};

/// How often two faults strike at the same time.
const TWO_AT_ONCE: f64 = 0.2;

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
        let fault = match self.random.random_range(0..40) {
            0..3 => Fault::KillDaemon { victim, away_ms },
            3 => Fault::KillDaemon { victim: Victim::Leader, away_ms },
            4..6 => Fault::KillVm { vm: self.vm() },
            6..9 => Fault::KillHost { victim, away_ms },
            9 => Fault::KillHost { victim: Victim::Leader, away_ms },
            10 => Fault::StopDaemon { victim, away_ms },
            11..13 => Fault::StopHost { victim, away_ms },
            13 => Fault::ColdBoot { order: self.random.random(), away_ms },
            14..16 => Fault::StopVm { vm: self.vm(), away_ms: self.stop_ms() },
            16..19 => Fault::CutPower { victim, away_ms },
            19 => Fault::CutAllPower { order: self.random.random(), away_ms },
            20..29 => self.fault_of_network(victim, away_ms),
            29..36 => self.fault_of_disk(victim, away_ms),
            _ => self.fault_of_daemon(victim, away_ms),
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

    fn fault_of_network(&mut self, victim: Victim, away_ms: u64) -> Fault {
        let traffic = [Traffic::Control, Traffic::Storage, Traffic::Migration];
        match self.random.random_range(0..9) {
            0..2 => Fault::CutHost { victim, away_ms },
            2 => Fault::CutHalves { side: self.random.random_range(1..(1 << self.scale.hosts) - 1), away_ms },
            3 => Fault::CutOneWay { victim, to: self.host(), away_ms },
            4 => Fault::CutPair { victim, other: self.host(), away_ms },
            5..7 => Fault::CutTraffic { victim, traffic: traffic[self.random.random_range(0..3)], away_ms },
            7 => Fault::LosePackets { victim, percent: self.random.random_range(5..40), away_ms },
            _ => Fault::SlowLink { victim, kbit_per_s: self.random.random_range(5_000..50_000), away_ms },
        }
    }

    fn fault_of_disk(&mut self, victim: Victim, away_ms: u64) -> Fault {
        match self.random.random_range(0..6) {
            0 => Fault::FillDisk { victim, away_ms },
            1 => Fault::FailDisk { victim, part: DiskPart::Reads, away_ms },
            2 => Fault::FailDisk { victim, part: DiskPart::Writes, away_ms },
            3 => Fault::FailDisk { victim, part: DiskPart::Syncs, away_ms },
            _ => Fault::SlowSyncs { victim, delay_ms: self.random.random_range(50..1500), away_ms },
        }
    }

    fn fault_of_daemon(&mut self, victim: Victim, away_ms: u64) -> Fault {
        let percent = self.random.random_range(10..=80);
        match self.random.random_range(0..5) {
            0 => {
                // A moment, hours, or days, ahead or back.
                let far = [20, 7_200, 3 * 24 * 3600][self.random.random_range(0..3)];
                let seconds = if self.random.random_bool(0.5) { far } else { -far };
                Fault::ShiftClock { victim, seconds, away_ms }
            }
            1 => {
                let delay_ms = self.random.random_range(50..self.scale.lost_ms);
                Fault::DelayCalls { victim, delay_ms, percent, away_ms }
            }
            2..4 => Fault::RepeatCalls { victim, later_ms: self.scale.lost_ms, percent, away_ms },
            _ => Fault::Squeeze { victim, mebibytes: self.random.random_range(8..96), away_ms },
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
        let steps: Vec<Step> = Plan::new(1, SCALE).take(3000).collect();
        let kinds: BTreeSet<&str> = steps.iter().map(|step| step.fault.kind()).collect();
        // Bits are turned by scenarios only, since a second fault may take the good replicas away.
        assert_eq!(kinds.len(), 29, "{kinds:?}");
        let aways: Vec<u64> = steps.iter().map(|step| step.fault.away_ms()).filter(|&ms| ms > 0).collect();
        assert!(aways.iter().any(|&ms| ms < SCALE.lost_ms / 3) && aways.iter().any(|&ms| ms > SCALE.lost_ms));
        assert!(steps.iter().any(|step| step.also.is_some()));
    }
}
