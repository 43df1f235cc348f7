//! Hosts that live and get no processor for a while, and many that vanish at once.

use anyhow::Result;
use std::time::{Duration, Instant};
use tests::vms::PROBE_LIGHT;
use tests::wait::{wait_for, wait_until};
use tests::{Pool, VmSpec, alone, pool::Timing};

/// As long as a host may get no processor at the default timing, by which it is lost after fifteen seconds; the fast one is a fifth.
const STARVED: Duration = Duration::from_secs(10);
const STARVED_FAST: Duration = Duration::from_secs(2);

/// Two elections and a full wait of the next leader fit in several times.
const SOON: Duration = Duration::from_secs(30);

/// Waits that long; a test waits on a condition, and this one is about time.
fn pass(time: Duration) -> Result<()> {
    let end = Instant::now() + time;
    wait_for(time + SOON, "time passes", || Ok(Instant::now() > end))
}

#[test]
fn a_host_without_a_processor_for_a_while_is_not_taken_for_dead() -> Result<()> {
    let _turn = alone();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    let leader = pool.leader()?;
    let starved = pool.host_besides(&[leader.name()])?;
    for (vm, host) in [("web", starved), ("other", leader)] {
        pool.start_probe(vm, "64MiB", PROBE_LIGHT, Some(host.name()))?;
    }
    let before = (pool.vm_process("web")?, pool.vm_process("other")?);
    // First one that follows, then the one that leads: its successor must not take the others' silence for their death.
    for host in [starved, leader] {
        host.stop_all()?;
        pass(STARVED_FAST)?;
        host.cont_all()?;
        wait_for(SOON, "the pool takes changes again", || {
            Ok(pool.poolctl(&["host", "label", "h1", "seen=yes"])?.code == 0)
        })?;
        for vm in ["web", "other"] {
            let now = pool.wait_beats(vm, 3, SOON)?;
            assert_eq!(now.boots, 1, "{vm} was started anew: {now:?}");
        }
    }
    assert_eq!((pool.vm_process("web")?, pool.vm_process("other")?), before);
    nobody_was_lost(&pool)
}

fn nobody_was_lost(pool: &Pool) -> Result<()> {
    let path = pool.dir().join("bundle.json");
    pool.poolctl(&["support", "bundle", &path.to_string_lossy()])?.ok()?;
    let bundle = std::fs::read_to_string(path)?;
    assert!(!bundle.contains("host.lost"), "a host that lives was declared lost");
    Ok(())
}

#[test]
fn ten_seconds_without_a_processor_cost_nothing_at_default_timings() -> Result<()> {
    let _turn = alone();
    let pool = Pool::builder().timing(Timing::Default).start()?;
    let leader = pool.leader()?;
    let starved = pool.host_besides(&[leader.name()])?;
    let before = pool.start_probe("web", "64MiB", PROBE_LIGHT, Some(starved.name()))?;
    let (process, epoch) = (pool.vm_process("web")?, pool.vm("web")?["epoch"].clone());
    // The daemon and the VM's process with it, as when something else takes all processors.
    starved.stop_all()?;
    pass(STARVED)?;
    starved.cont_all()?;
    let now = pool.wait_beats("web", 5, SOON)?;
    assert_eq!(now.boots, before.boots, "it was started anew: {now:?}");
    assert_eq!(pool.vm("web")?["epoch"], epoch);
    assert_eq!((pool.vm_process("web")?, pool.vm_host("web")?.as_str()), (process, starved.name()));
    nobody_was_lost(&pool)
}

#[test]
fn nothing_is_recovered_when_most_hosts_vanish_until_an_operator_says_so() -> Result<()> {
    let _turn = alone();
    // Seven, so that the majority of the five voters is left when four hosts are gone.
    let pool = Pool::builder().hosts(7).timing(Timing::Fast).start()?;
    let voters = wait_until(SOON, "five hosts vote", || {
        let voters = pool.json(&["pool", "status"])?["voters"].clone();
        Ok(voters.as_array().filter(|voters| voters.len() == 5).cloned())
    })?;
    let leader = pool.leader()?.name().to_owned();
    let votes = |name: &str| voters.iter().any(|voter| voter == name);
    let (followers, learners): (Vec<_>, Vec<_>) =
        pool.hosts().iter().filter(|host| host.name() != leader).partition(|host| votes(host.name()));
    let victims: Vec<_> = learners.into_iter().chain(followers.into_iter().take(2)).collect();
    assert_eq!(victims.len(), 4);
    pool.import_probe()?;
    // Without a disk: nothing but the brake keeps it down.
    let spec = VmSpec { name: "web", memory: "64MiB", disks: &[], cmdline: "wss=4M", ha: "restart" };
    pool.create_vm(&spec)?;
    pool.start_vm("web", Some(victims[0].name()))?;
    victims.iter().try_for_each(|host| host.kill9_host())?;
    wait_for(SOON, "the brake is set", || Ok(pool.json(&["pool", "show"])?["ha_braked"] == true))?;
    for victim in &victims {
        pool.wait_host_state(victim.name(), "lost", SOON)?;
    }
    // As long again as a host may be silent.
    pass(Duration::from_secs(3))?;
    assert_eq!(pool.vm_host("web")?, victims[0].name(), "it was recovered under the brake");
    let why = pool.json(&["vm", "explain", "web"])?.to_string();
    assert!(why.contains("poolctl ha resume"), "{why}");
    pool.json(&["ha", "resume"])?;
    pool.wait_probe("web", SOON, "boots elsewhere", |now| now.beat > 2)?;
    assert!(victims.iter().all(|victim| pool.vm_host("web").is_ok_and(|host| host != victim.name())));
    Ok(())
}
