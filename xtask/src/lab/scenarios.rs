//! What can be run in the lab machine.

/// What a scenario needs besides the machine's own programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// The disk with Debian's root file system.
    Debian,
    /// The programs of a pool, and what makes hosts out of namespaces.
    Pool,
    /// All test programs that need KVM.
    Tests,
    /// Debian's qemu, to compare with.
    Qemu,
}

/// What runs inside.
#[derive(Debug)]
pub struct Scenario {
    pub name: &'static str,
    pub about: &'static str,
    /// Bound of its run in seconds, for a busy machine.
    pub seconds: u32,
    /// Run by `--quick`: all of them together are to take less than four minutes on two cores.
    pub quick: bool,
    /// Run when no scenario is named.
    pub usual: bool,
    pub needs: &'static [Need],
    /// What the lab's shell does; the exit code is the result, and details are left as JSON in `$LAB_DETAILS`.
    pub script: &'static str,
}

impl Scenario {
    /// Whether it needs this.
    pub fn needs(&self, need: Need) -> bool {
        self.needs.contains(&need)
    }
}

/// Whatever stands in for an absent field.
const SCENARIO: Scenario =
    Scenario { name: "", about: "", seconds: 300, quick: false, usual: true, needs: &[], script: "" };

/// In the order in which they run.
pub static SCENARIOS: [Scenario; 12] = [
    Scenario {
        name: "machine",
        about: "the machine's own tests, with the probe guest under a true KVM",
        quick: true,
        script: "exec /lab/target/debug/deps/vmm-machine --test-threads 2 --skip malice",
        ..SCENARIO
    },
    Scenario {
        name: "linux",
        about: "an unmodified Debian kernel: ACPI, two vCPUs, disks, clock, RNG, power button, power-off, reboot",
        quick: true,
        script: "/lab/bin/vmm-lab linux && test -s $LAB_DETAILS",
        ..SCENARIO
    },
    Scenario {
        name: "hops",
        about: "two vCPUs go from machine to machine five times under load of CPU, timers and disk",
        quick: true,
        script: "/lab/bin/vmm-lab hops 5 && test -s $LAB_DETAILS",
        ..SCENARIO
    },
    Scenario {
        name: "demo",
        about: "`cargo xtask demo`: a pool of three hosts, a migration, a dead host",
        seconds: 420,
        needs: &[Need::Pool],
        script: "exec /lab/target/debug/xtask demo",
        ..SCENARIO
    },
    Scenario {
        name: "debian",
        about: "a stock Debian boots its disk's own kernel: a login, the power button, a clean shutdown",
        seconds: 600,
        needs: &[Need::Debian],
        script: "/lab/bin/vmm-lab debian && test -s $LAB_DETAILS",
        ..SCENARIO
    },
    Scenario {
        name: "pool",
        about: "a stock Debian in a pool of three hosts: boots from its disk, moves four times under load, reboots, power button",
        seconds: 1800,
        needs: &[Need::Pool, Need::Debian],
        script: "/lab/target/debug/tests-stock_guest 4 && test -s $LAB_DETAILS",
        ..SCENARIO
    },
    Scenario {
        name: "pool-long",
        about: "the same with fifty moves",
        seconds: 3000,
        usual: false,
        needs: &[Need::Pool, Need::Debian],
        script: "/lab/target/debug/tests-stock_guest 50 && test -s $LAB_DETAILS",
        ..SCENARIO
    },
    Scenario {
        name: "boots",
        about: "two dozen boots of the Debian kernel, each with another timing",
        seconds: 900,
        script: "/lab/bin/vmm-lab boots 24 && test -s $LAB_DETAILS",
        ..SCENARIO
    },
    Scenario {
        name: "hops-long",
        about: "fifty hops",
        seconds: 900,
        script: "/lab/bin/vmm-lab hops 50 && test -s $LAB_DETAILS",
        ..SCENARIO
    },
    Scenario {
        name: "tests",
        about: "all tests that need KVM; `cargo xtask test` runs them here where the machine has none",
        seconds: 3600,
        usual: false,
        needs: &[Need::Pool, Need::Tests],
        script: "exec sh /lab/tests.sh",
        ..SCENARIO
    },
    Scenario {
        name: "bench",
        about: "boot times beside qemu's microvm; part of `cargo xtask bench vmm`",
        seconds: 1200,
        usual: false,
        needs: &[Need::Debian, Need::Qemu],
        script: "/lab/bin/vmm-lab bench && test -s $LAB_DETAILS",
        ..SCENARIO
    },
    Scenario {
        name: "chaos",
        about: "the campaign of `cargo xtask test`",
        seconds: 900,
        usual: false,
        needs: &[Need::Pool],
        script: "exec /lab/target/debug/chaos --seed 20261125 --minutes 1.5",
        ..SCENARIO
    },
];

/// A scenario by its name.
pub fn named(name: &str) -> Option<&'static Scenario> {
    SCENARIOS.iter().find(|scenario| scenario.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_the_quick_ones_are_bounded() {
        for (index, scenario) in SCENARIOS.iter().enumerate() {
            assert!(SCENARIOS[..index].iter().all(|other| other.name != scenario.name), "{}", scenario.name);
            assert!(!scenario.quick || scenario.needs.is_empty(), "{} needs more than it may", scenario.name);
        }
        let seconds: u32 = SCENARIOS.iter().filter(|scenario| scenario.quick).map(|s| s.seconds).sum();
        // Their bounds, not what they take: room for a busy machine.
        assert!(seconds <= 900, "{seconds} s");
    }
}
