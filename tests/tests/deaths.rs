//! Daemons, VM processes and hosts die; VMs and their disks don't.

use anyhow::{Context, Result};
use std::time::{Duration, Instant};
use tests::machine::Machine;
use tests::probe::Summary;
use tests::vms::{PROBE_BUSY, PROBE_LIGHT};
use tests::wait::wait_for;
use tests::{Pool, VmProcess, alone, in_turn, pool::Timing};

/// The promise to the operator, at default timings.
const RECOVERY_MAX: Duration = Duration::from_secs(20);

/// What the guest has said, read from its process, without any daemon.
fn probe_of(process: &VmProcess) -> Result<Summary> {
    let piece = Machine::connect(&process.dir)?.console(0)?;
    Ok(Summary::of_console(&String::from_utf8_lossy(&piece.data)))
}

#[test]
fn a_vm_goes_on_while_its_daemon_is_dead_and_the_next_daemon_finds_it() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Default).start()?;
    pool.start_probe("web", "64MiB", PROBE_LIGHT, Some("h2"))?;
    let process = pool.vm_process("web")?;
    let host = pool.host_named("h2")?;
    host.kill9_daemon()?;
    let at_death = probe_of(&process)?;
    wait_for(Duration::from_secs(8), "the guest beats and writes without a daemon", || {
        let now = probe_of(&process)?;
        Ok(now.beat > at_death.beat + 2 && now.acked > at_death.acked + 2 && now.errors.is_empty())
    })?;
    let before_return = probe_of(&process)?;
    host.start_daemon()?;
    pool.wait_host_state("h2", "up", Duration::from_secs(20))?;
    let after = pool.wait_probe("web", Duration::from_secs(20), "goes on under the new daemon", |now| {
        now.beat > before_return.beat + 3 && now.acked > before_return.acked
    })?;
    assert_eq!(after.boots, 1, "the guest was started anew: {after:?}");
    assert_eq!(pool.vm_process("web")?, process);
    assert_eq!(pool.vm("web")?["state"], "running");
    // Longer than a lease: the new daemon renews it.
    let lease_over = Instant::now() + Duration::from_secs(12);
    wait_for(Duration::from_secs(30), "it still runs when an old lease would be over", || {
        let now = pool.probe("web")?;
        Ok(Instant::now() > lease_over && now.beat > after.beat + 10)
    })?;
    assert_eq!(pool.vm_process("web")?, process);
    Ok(())
}

#[test]
fn a_vm_of_a_killed_host_runs_elsewhere_within_20_s_with_all_its_data() -> Result<()> {
    let _turn = alone();
    let pool = Pool::builder().timing(Timing::Default).start()?;
    let victim = pool.host_besides(&[pool.leader()?.name()])?;
    pool.start_probe("web", "64MiB", PROBE_LIGHT, Some(victim.name()))?;
    pool.wait_probe("web", Duration::from_secs(30), "writes", |now| now.acked >= 20)?;
    let process = pool.vm_process("web")?;
    let last = probe_of(&process)?;
    let killed = Instant::now();
    victim.kill9_host()?;
    let booted = pool.wait_probe("web", Duration::from_secs(40), "boots elsewhere", |now| {
        now.boots >= 1 && now.disk_counter >= last.acked && now.beat > 0
    })?;
    let took = killed.elapsed();
    assert!(took < RECOVERY_MAX, "the VM was back after {took:?}");
    assert!(booted.verified > 0 && booted.errors.is_empty(), "{booted:?}");
    assert_ne!(pool.vm_host("web")?, victim.name());
    // The host returns, and becomes a full member again.
    victim.start_daemon()?;
    pool.wait_host_state(victim.name(), "up", Duration::from_secs(30))?;
    pool.wait_in_sync("web-disk", 3, Duration::from_secs(60))?;
    pool.wait_beats("web", 3, Duration::from_secs(20))?;
    Ok(())
}

#[test]
fn a_paused_old_owner_neither_runs_nor_writes_when_it_comes_back() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    let victim = pool.host_besides(&[pool.leader()?.name()])?;
    pool.start_probe("web", "64MiB", PROBE_BUSY, Some(victim.name()))?;
    pool.wait_probe("web", Duration::from_secs(30), "writes", |now| now.acked >= 20)?;
    let old = pool.vm_process("web")?;
    let acked_before = probe_of(&old)?.acked;
    victim.stop_all()?;
    wait_for(Duration::from_secs(30), "the VM is placed elsewhere", || {
        Ok(pool.vm_host("web")? != victim.name())
    })?;
    let new = pool.wait_probe("web", Duration::from_secs(40), "boots elsewhere", |now| now.beat > 2)?;
    assert!(new.disk_counter >= acked_before, "acknowledged {acked_before}, found {new:?}");

    let used = old.vcpu_time()?;
    // The VM process first and alone: nobody tells it that it is old.
    old.process.signal(tests::process::Signal::SIGCONT)?;
    let watched = Instant::now() + Duration::from_secs(3);
    let mut most = used;
    wait_for(Duration::from_secs(10), "three seconds of the old copy, or its end", || {
        if let Ok(now) = old.vcpu_time() {
            most = most.max(now);
        }
        Ok(Instant::now() > watched || !old.process.alive())
    })?;
    assert!(most - used < Duration::from_millis(5), "the old copy ran for {:?}", most - used);
    victim.cont_all()?;
    old.process.wait_gone(Duration::from_secs(30)).context("the daemon ends the old copy")?;
    assert!(
        !old.dir.exists()
            || wait_for(Duration::from_secs(10), "its directory is gone", || Ok(!old.dir.exists())).is_ok()
    );

    // Whatever the old copy tried, the disk is the new one's: a boot verifies every block.
    let last = pool.wait_beats("web", 3, Duration::from_secs(20))?;
    assert_eq!(last.boots, 1, "{last:?}");
    pool.json(&["vm", "stop", "web"])?;
    pool.start_vm("web", None)?;
    let booted = pool
        .wait_probe("web", Duration::from_secs(60), "boots again", |now| now.verified > 0 && now.beat > 0)?;
    assert!(booted.disk_counter >= last.acked, "{last:?} → {booted:?}");
    Ok(())
}

#[test]
fn a_killed_vm_process_is_started_again_at_a_higher_epoch() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    pool.start_probe("web", "64MiB", PROBE_LIGHT, Some("h3"))?;
    pool.wait_probe("web", Duration::from_secs(30), "writes", |now| now.acked >= 10)?;
    let first = pool.vm_process("web")?;
    let last = probe_of(&first)?;
    first.process.kill9()?;
    let booted = pool.wait_probe("web", Duration::from_secs(40), "boots again", |now| {
        now.beat > 0 && now.disk_counter >= last.acked
    })?;
    assert!(booted.errors.is_empty(), "{booted:?}");
    let second = pool.vm_process("web")?;
    assert!(second.epoch > first.epoch, "{first:?} → {second:?}");
    assert_eq!(pool.vm_host("web")?, "h3", "a host that works keeps its VM");
    wait_for(Duration::from_secs(10), "the directory of the dead process is gone", || {
        Ok(!first.dir.exists())
    })?;
    Ok(())
}

#[test]
fn a_host_cut_off_stops_its_vm_before_it_runs_elsewhere() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).network(tests::Network::Namespaces).start()?;
    let victim = pool.host_besides(&[pool.leader()?.name()])?;
    pool.start_probe("web", "64MiB", PROBE_BUSY, Some(victim.name()))?;
    let old = pool.vm_process("web")?;
    let others: Vec<usize> = (0..3).filter(|&index| index != victim.index()).collect();
    pool.cut(&[&others, &[victim.index()]])?;
    // Read while the VM moves: the last CPU time of the old copy before anything runs elsewhere.
    let mut at_move = old.vcpu_time()?;
    wait_for(Duration::from_secs(30), "the VM has a process elsewhere", || {
        let elsewhere = others.iter().any(|&index| !pool.host(index).vm_processes().is_empty());
        if !elsewhere {
            at_move = old.vcpu_time().unwrap_or(at_move);
        }
        Ok(elsewhere)
    })?;
    pool.wait_probe("web", Duration::from_secs(30), "boots elsewhere", |now| now.beat > 2)?;
    let now = old.vcpu_time().unwrap_or(at_move);
    assert!(
        now.saturating_sub(at_move) < Duration::from_millis(5),
        "the cut-off copy ran on for {:?}",
        now - at_move
    );
    pool.heal()?;
    old.process.wait_gone(Duration::from_secs(30)).context("the old copy ends when its host is back")?;
    pool.wait_hosts_up()?;
    pool.wait_beats("web", 3, Duration::from_secs(20))?;
    Ok(())
}
