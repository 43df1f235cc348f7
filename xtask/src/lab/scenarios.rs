//! What can be run in the lab machine.

use anyhow::{Context, Result};

/// What a scenario needs besides the machine's own programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// The disk with Debian's root file system.
    Debian,
    /// The small disk that boots by itself.
    Small,
    /// The programs of a pool, and what makes hosts out of namespaces.
    Pool,
    /// The tests of a VM's process by itself.
    Process,
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
    Scenario { name: "", about: "", seconds: 300, usual: true, needs: &[], script: "" };

/// Those that `cargo xtask lab --quick` runs, and `cargo xtask test` before its campaign: what no machine can show whose KVM interprets
/// its guests. The machine's own tests run everywhere else, too.
pub const QUICK: [&str; 2] = ["linux", "hops"];

/// Those that `cargo xtask test` runs where a machine has no KVM. Not `tests`, nor a campaign: what takes ten minutes elsewhere takes hours
/// here, where each instruction of three daemons is interpreted.
pub const STAND_IN: [&str; 6] = ["machine", "process", "linux", "hops", "demo", "pool"];

/// When the quick scenarios are given up, from the first package that is fetched on: twice what they take where it is slow.
pub const QUICK_SECONDS_MAX: u64 = 600;

/// In the order in which they run.
pub static SCENARIOS: [Scenario; 13] = [
    Scenario {
        name: "machine",
        about: "the machine's own tests, with the probe guest under a true KVM",
        script: "exec /lab/target/debug/deps/vmm-machine --test-threads 2 --skip malice",
        ..SCENARIO
    },
    Scenario {
        name: "linux",
        about: "an unmodified Debian kernel: ACPI, two vCPUs, disks, clock, RNG, power button, power-off, reboot",
        script: "/lab/bin/vmm-lab linux && test -s $LAB_DETAILS",
        ..SCENARIO
    },
    Scenario {
        name: "hops",
        about: "two vCPUs go from machine to machine three times under load of CPU, timers and disk",
        script: "/lab/bin/vmm-lab hops 3 && test -s $LAB_DETAILS",
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
        about: "two stock guests in a pool of three hosts: boot from their disks, networks, VLAN, a growing disk, four moves under load, dead hosts, reboot, power button",
        seconds: 1500,
        needs: &[Need::Pool, Need::Small],
        script: "/lab/target/debug/tests-stock_guest small /dev/lab/small 4 && test -s $LAB_DETAILS",
        ..SCENARIO
    },
    Scenario {
        name: "pool-long",
        about: "the same with fifty moves",
        seconds: 3000,
        usual: false,
        needs: &[Need::Pool, Need::Small],
        script: "/lab/target/debug/tests-stock_guest small /dev/lab/small 50 && test -s $LAB_DETAILS",
    },
    Scenario {
        name: "pool-debian",
        about: "a stock Debian in a pool of three hosts: a login, a move under load, reboot, power button",
        seconds: 3600,
        usual: false,
        needs: &[Need::Pool, Need::Debian],
        script: "/lab/target/debug/tests-stock_guest debian /dev/lab/debian 1 && test -s $LAB_DETAILS",
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
        name: "process",
        about: "the tests of a VM's process by itself",
        seconds: 900,
        needs: &[Need::Pool, Need::Process],
        script: "exec sh /lab/tests.sh vm-process",
        ..SCENARIO
    },
    Scenario {
        name: "tests",
        about: "all tests that need KVM, one after the other: two hours and more",
        seconds: 14_400,
        usual: false,
        needs: &[Need::Pool, Need::Process, Need::Tests],
        script: "exec sh /lab/tests.sh",
    },
    Scenario {
        name: "bench",
        about: "boot times beside qemu's microvm; part of `cargo xtask bench vmm`",
        seconds: 1200,
        usual: false,
        needs: &[Need::Debian, Need::Qemu],
        script: "/lab/bin/vmm-lab bench && test -s $LAB_DETAILS",
    },
];

/// Scenarios by their names.
pub fn named<S: AsRef<str>>(names: &[S]) -> Result<Vec<&'static Scenario>> {
    let find = |name: &str| {
        let found = SCENARIOS.iter().find(|scenario| scenario.name == name);
        found.with_context(|| format!("there is no scenario {name}; see `cargo xtask lab --list`"))
    };
    names.iter().map(|name| find(name.as_ref())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_the_quick_ones_need_nothing() {
        for (index, scenario) in SCENARIOS.iter().enumerate() {
            assert!(SCENARIOS[..index].iter().all(|other| other.name != scenario.name), "{}", scenario.name);
        }
        assert!(named(&STAND_IN).is_ok(), "one is not there");
        for scenario in named(&QUICK).unwrap() {
            assert!(scenario.needs.is_empty(), "{} needs more than it may", scenario.name);
        }
    }
}
