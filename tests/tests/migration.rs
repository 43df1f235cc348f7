//! A VM moves while it runs; whatever happens to the move, it is at exactly one host.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs::File;
use std::io::{self, Read as _};
use std::time::Duration;
use tests::process::{ProcessId, Signal};
use tests::vms::{PROBE_IMAGE, PROBE_LIGHT};
use tests::wait::{wait_for, wait_until};
use tests::{Host, Network, Pool, Traffic, alone, in_turn, machine::Machine, pool::Timing};

/// Number of processes of any VM in the pool.
fn vm_processes(pool: &Pool) -> usize {
    pool.hosts().iter().map(|host| host.vm_processes().len()).sum()
}

fn wait_one_process(pool: &Pool) -> Result<()> {
    wait_for(Duration::from_secs(20), "one process is left", || Ok(vm_processes(pool) == 1))
}

#[test]
fn a_vm_of_512_mib_moves_there_and_back_and_its_record_accounts_for_the_blackout() -> Result<()> {
    let _turn = alone();
    let pool = Pool::builder().timing(Timing::Default).start()?;
    pool.start_probe("web", "512MiB", "wss=64M rate=20M disk=1", Some("h1"))?;
    // The whole working set has been written once before the move.
    pool.wait_probe("web", Duration::from_secs(90), "one pass over its memory", |now| now.pass >= 1)?;
    let epoch = pool.vm("web")?["epoch"].as_u64().context("an epoch")?;
    let before = pool.probe("web")?;

    let record = pool.json(&["vm", "migrate", "web", "--to", "h2"])?;
    assert_eq!(record["outcome"], "done", "{record}");
    assert_eq!(record["memory_proved"], true, "{record}");
    let blackout = record["blackout_ms"].as_f64().context("a blackout")?;
    assert!(blackout > 0.0, "{record}");
    let parts = record["blackout_parts"].as_object().context("parts of the blackout")?;
    let sum: f64 = parts.values().filter_map(serde_json::Value::as_f64).sum();
    assert!((sum - blackout).abs() < 1.0, "the parts add up to {sum}: {record}");
    assert_eq!(record["memory_bytes"], 512 << 20, "{record}");

    let vm = pool.vm("web")?;
    assert_eq!((vm["host"].as_str(), vm["epoch"].as_u64()), (Some("h2"), Some(epoch + 1)), "{vm}");
    let after = pool.wait_beats("web", 5, Duration::from_secs(20))?;
    assert!(after.beat > before.beat && after.acked > before.acked, "{before:?} → {after:?}");
    wait_one_process(&pool)?;

    // Its first host has kept what it left behind, and is not sent that again.
    let back = pool.json(&["vm", "migrate", "web", "--to", "h1"])?;
    assert_eq!(back["outcome"], "done", "{back}");
    let kept = |record: &serde_json::Value| record["pages"]["reference"].as_u64().unwrap_or(0);
    assert!(kept(&back) > kept(&record), "there: {record}, and back: {back}");
    let after = pool.wait_beats("web", 5, Duration::from_secs(20))?;
    wait_one_process(&pool)?;

    // A boot reads the whole disk back.
    pool.json(&["vm", "stop", "web"])?;
    pool.start_vm("web", None)?;
    let booted = pool.wait_probe("web", Duration::from_secs(60), "boots again", |now| now.verified > 0)?;
    assert!(booted.disk_counter >= after.acked, "{after:?} → {booted:?}");
    Ok(())
}

#[test]
fn a_vm_of_two_vcpus_moves_there_and_back_with_all_of_its_memory_proved() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().hosts(2).timing(Timing::Fast).start()?;
    pool.import_probe()?;
    pool.create_volume("data", "16MiB", 2)?;
    let create = ["vm", "create", "web", "--vcpus", "2", "--memory", "96MiB", "--disk", "data"];
    let boots = ["--kernel", PROBE_IMAGE, "--cmdline", "wss=16M rate=8M disk=1"];
    pool.json(&[&create[..], &boots[..]].concat())?;
    pool.start_vm("web", Some("h1"))?;
    pool.wait_probe("web", Duration::from_secs(60), "one pass over its memory", |now| now.pass >= 1)?;
    let stats = pool.json(&["vm", "stats", "web", "--interval", "500ms"])?;
    assert_eq!(stats["vcpus"].as_array().map(Vec::len), Some(2), "{stats}");
    assert!(stats["vcpus"][0]["cpu_percent"].as_f64() > Some(0.0), "it walks: {stats}");
    assert!(stats["memory_resident_bytes"].as_u64() > Some(16 << 20), "{stats}");
    assert!(stats["disks"][0]["writes"]["operations"].as_u64() > Some(0), "{stats}");
    assert_eq!(
        (&stats["disks"][0]["volume"], &stats["migration"]),
        (&"data".into(), &Value::Null),
        "{stats}"
    );
    for (to, connections) in [("h2", 1), ("h1", 2)] {
        let how = ["--connections", &connections.to_string()];
        let record = pool.json(&[&["vm", "migrate", "web", "--to", to][..], &how[..]].concat())?;
        assert_eq!(
            (&record["outcome"], &record["memory_proved"]),
            (&"done".into(), &true.into()),
            "{record}"
        );
        assert_eq!(record["connections"], connections, "{record}");
        pool.wait_beats("web", 3, Duration::from_secs(20))?;
    }
    let too_many = pool.poolctl(&["vm", "migrate", "web", "--to", "h2", "--connections", "9"])?;
    assert_eq!(too_many.code, 2, "{too_many:?}");
    wait_one_process(&pool)?;
    pool.json(&["vm", "stop", "web"])?;
    assert_eq!(pool.poolctl(&["vm", "stats", "web"])?.code, 4, "a stopped VM does nothing");
    Ok(())
}

#[test]
fn a_move_that_is_cancelled_leaves_the_vm_where_it_was() -> Result<()> {
    let _turn = alone();
    let pool = Pool::builder().hosts(2).timing(Timing::Fast).start()?;
    pool.start_probe("web", "256MiB", "wss=128M rate=100M disk=1", Some("h1"))?;
    pool.wait_probe("web", Duration::from_secs(90), "one pass over its memory", |now| now.pass >= 1)?;
    // Too slow to end by itself.
    pool.json(&["vm", "migrate", "web", "--to", "h2", "--bandwidth", "1MiB", "--async"])?;
    let id = wait_until(Duration::from_secs(20), "the move copies", || {
        let running =
            pool.items(&["migration", "list"])?.into_iter().find(|record| record["phase"] == "copying");
        Ok(running.and_then(|record| record["id"].as_str().map(ToOwned::to_owned)))
    })?;
    let stats = pool.json(&["vm", "stats", "web", "--interval", "200ms"])?;
    assert_eq!((&stats["kind"], &stats["host"]), (&"VmStats".into(), &"h1".into()), "{stats}");
    assert!(stats["migration"]["pages_remaining"].as_u64() > Some(0), "{stats}");
    pool.json(&["migration", "cancel", &id])?;
    let record = wait_until(Duration::from_secs(30), "the move is cancelled", || {
        let record = pool.json(&["migration", "show", &id])?;
        Ok((record["outcome"] != "running").then_some(record))
    })?;
    assert_eq!(record["outcome"], "cancelled", "{record}");
    assert_eq!(pool.vm_host("web")?, "h1");
    pool.wait_beats("web", 5, Duration::from_secs(20))?;
    wait_one_process(&pool)?;
    wait_for(Duration::from_secs(10), "the reservation at the target is given back", || {
        Ok(pool.json(&["host", "show", "h2"])?["vm_memory_reserved_bytes"] == 0)
    })?;
    // And it can be moved after that.
    assert_eq!(pool.json(&["vm", "migrate", "web", "--to", "h2"])?["outcome"], "done");
    Ok(())
}

#[test]
fn a_leader_that_dies_during_a_move_harms_neither_the_move_nor_the_vm() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    let leader = pool.leader()?;
    let source = pool.host_besides(&[leader.name()])?.name();
    let target = pool.host_besides(&[leader.name(), source])?.name();
    pool.start_probe("web", "128MiB", "wss=32M rate=20M disk=1", Some(source))?;
    pool.wait_probe("web", Duration::from_secs(90), "one pass over its memory", |now| now.pass >= 1)?;
    pool.json(&["vm", "migrate", "web", "--to", target, "--bandwidth", "20MiB", "--async"])?;
    wait_for(Duration::from_secs(20), "the move copies", || {
        Ok(pool.items(&["migration", "list"])?.iter().any(|record| record["phase"] == "copying"))
    })?;
    leader.kill9_daemon()?;
    let record = wait_until(Duration::from_secs(60), "the move ends without the leader", || {
        let record = pool.items(&["migration", "list"])?.pop().context("the move is listed")?;
        Ok((record["outcome"] != "running").then_some(record))
    })?;
    assert_eq!(record["outcome"], "done", "{record}");
    assert_eq!(pool.vm_host("web")?, target);
    pool.wait_beats("web", 5, Duration::from_secs(30))?;
    wait_one_process(&pool)?;
    leader.start_daemon()?;
    pool.wait_hosts_up()
}

#[test]
fn a_target_that_dies_during_a_move_leaves_the_vm_at_its_source() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    let target = pool.host_besides(&[pool.leader()?.name()])?;
    let source = pool.host_besides(&[target.name()])?;
    pool.start_probe("web", "128MiB", PROBE_LIGHT, Some(source.name()))?;
    pool.json(&["vm", "migrate", "web", "--to", target.name(), "--bandwidth", "1MiB", "--async"])?;
    wait_for(Duration::from_secs(20), "the target has a process", || Ok(!target.vm_processes().is_empty()))?;
    target.kill9_host()?;
    let record = wait_until(Duration::from_secs(60), "the move ends", || {
        let record = pool.items(&["migration", "list"])?.pop().context("the move is listed")?;
        Ok((record["outcome"] != "running").then_some(record))
    })?;
    assert_eq!(record["outcome"], "failed", "{record}");
    assert_eq!(pool.vm_host("web")?, source.name());
    pool.wait_beats("web", 5, Duration::from_secs(30))?;
    Ok(())
}

/// Moves the VM to a host whose daemon hangs from the copying on, until the pool has given the VM to it.
fn move_to_hanging(pool: &Pool, target: &Host) -> Result<ProcessId> {
    pool.json(&["vm", "migrate", "web", "--to", target.name(), "--bandwidth", "12MiB", "--async"])?;
    wait_for(Duration::from_secs(20), "the move copies", || {
        Ok(pool.items(&["migration", "list"])?.iter().any(|record| record["phase"] == "copying"))
    })?;
    let daemon = target.daemon().context("the target's daemon runs")?;
    daemon.signal(Signal::SIGSTOP)?;
    wait_for(Duration::from_secs(20), "the pool has given the VM to the target", || {
        Ok(pool.vm_host("web")? == target.name())
    })?;
    Ok(daemon)
}

/// The target's daemon hangs while the pool decides, so its VM process never hears that it may run; then the host dies.
#[test]
fn a_target_that_dies_between_the_commit_and_the_first_instruction_gives_the_vm_back() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    let target = pool.host_besides(&[pool.leader()?.name()])?;
    let source = pool.host_besides(&[target.name()])?;
    pool.start_probe("web", "64MiB", "wss=8M rate=4M disk=1", Some(source.name()))?;
    pool.wait_probe("web", Duration::from_secs(60), "writes", |now| now.acked >= 10)?;
    let (process, before) = (pool.vm_process("web")?, pool.probe("web")?);
    move_to_hanging(&pool, target)?;
    target.kill9_host()?;
    wait_for(
        Duration::from_secs(40),
        "the source has it back",
        || Ok(pool.vm_host("web")? == source.name()),
    )?;
    let after = pool.wait_probe("web", Duration::from_secs(40), "goes on", |now| {
        now.beat > before.beat + 3 && now.acked > before.acked + 3
    })?;
    assert_eq!((after.boots, after.errors.is_empty()), (before.boots, true), "with its memory: {after:?}");
    assert_eq!(pool.vm_process("web")?.process, process.process, "in the same process");
    let record = pool.items(&["migration", "list"])?.pop().context("the move is listed")?;
    assert_ne!(record["outcome"], "done", "{record}");
    target.start_daemon()?;
    pool.wait_hosts_up()?;
    // And it can be moved again.
    assert_eq!(pool.json(&["vm", "migrate", "web", "--to", target.name()])?["outcome"], "done");
    pool.wait_beats("web", 3, Duration::from_secs(20))?;
    wait_one_process(&pool)
}

/// The source hangs right after the commit, as a host does whose disk or kernel stops: the pool declares it lost, and it comes back
/// with the process of the VM that it had.
#[test]
fn a_source_that_hangs_after_the_commit_never_runs_its_copy_again() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    let leader = pool.leader()?.name();
    let target = pool.host_besides(&[leader])?;
    let source = pool.host_besides(&[leader, target.name()])?;
    pool.start_probe("web", "64MiB", "wss=8M rate=4M disk=1 busy=1", Some(source.name()))?;
    pool.wait_probe("web", Duration::from_secs(60), "writes", |now| now.acked >= 10)?;
    let (old, before) = (pool.vm_process("web")?, pool.probe("web")?);
    let daemon = move_to_hanging(&pool, target)?;
    source.stop_all()?;
    let worked = old.vcpu_time()?;
    daemon.signal(Signal::SIGCONT)?;
    let after = pool.wait_probe("web", Duration::from_secs(60), "goes on at the target", |now| {
        now.beat > before.beat + 3 && now.acked > before.acked + 3
    })?;
    assert_eq!((after.boots, after.errors.is_empty()), (before.boots, true), "with its memory: {after:?}");
    pool.wait_host_state(source.name(), "lost", Duration::from_secs(40))?;
    let new = pool.vm_process("web")?;

    source.cont_all()?;
    wait_for(Duration::from_secs(40), "the old copy is gone", || {
        if let Ok(now) = old.vcpu_time() {
            // A thread that wakes up to find that it must not run takes its time for that.
            ensure!(now < worked + Duration::from_millis(50), "it ran: {worked:?} → {now:?}");
        }
        Ok(!old.process.alive())
    })?;
    pool.wait_hosts_up()?;
    wait_one_process(&pool)?;
    assert_eq!(pool.vm_process("web")?, new, "the VM was not touched");
    let record = pool.items(&["migration", "list"])?.pop().context("the move is listed")?;
    assert_eq!(record["outcome"], "done", "{record}");
    // What it wrote at the target is what it finds.
    let last = pool.wait_beats("web", 3, Duration::from_secs(20))?;
    pool.json(&["vm", "stop", "web"])?;
    pool.start_vm("web", None)?;
    let booted = pool.wait_probe("web", Duration::from_secs(60), "boots again", |now| now.verified > 0)?;
    assert!(booted.disk_counter >= last.acked, "{last:?} → {booted:?}");
    Ok(())
}

/// A VM that has gone over without most of what it works on: it writes more than its link carries. Returns its source and its target.
fn move_without_its_memory(pool: &Pool) -> Result<(&Host, &Host)> {
    let leader = pool.leader()?.name();
    let target = pool.host_besides(&[leader])?;
    let source = pool.host_besides(&[leader, target.name()])?;
    pool.import_probe()?;
    // What it writes to are random bytes, which nothing compresses, in a scattered order, so that nobody can guess what it needs next.
    let random = pool.dir().join("random");
    let mut bytes = File::open("/dev/urandom")?.take(8 << 20);
    io::copy(&mut bytes, &mut File::create(&random)?)?;
    pool.json(&["image", "import", "random", random.to_str().context("a path is text")?])?;
    pool.create_volume("data", "16MiB", 3)?;
    let create = ["vm", "create", "web", "--vcpus", "1", "--memory", "64MiB", "--disk", "data"];
    let cmdline = "wss=8M initrd=1 light=1 scatter=1 disk=1";
    let boots = ["--kernel", PROBE_IMAGE, "--initrd", "random", "--cmdline", cmdline];
    pool.json(&[&create[..], &boots[..]].concat())?;
    pool.start_vm("web", Some(source.name()))?;
    pool.wait_probe("web", Duration::from_secs(60), "one pass over its memory", |now| now.pass >= 1)?;
    let how = ["--to", target.name(), "--policy", "post-copy", "--bandwidth", "3MiB", "--async"];
    pool.json(&[&["vm", "migrate", "web"][..], &how].concat())?;
    wait_for(Duration::from_secs(60), "it is at the target", || Ok(pool.vm_host("web")? == target.name()))?;
    wait_process_state(pool, "running")?;
    Ok((source, target))
}

/// Waits until the VM's process says that it is in this state.
fn wait_process_state(pool: &Pool, state: &str) -> Result<()> {
    let what = format!("its process says `{state}`");
    wait_for(Duration::from_secs(30), &what, || {
        let mut machine = Machine::connect(&pool.vm_process("web")?.dir)?;
        Ok(machine.status()?.state == state)
    })
}

/// The link breaks for longer than the pool waits for anybody; the guest waits, and goes on by itself with all of its memory.
#[test]
fn a_guest_whose_pages_come_on_demand_waits_for_its_link_and_finds_its_memory_whole() -> Result<()> {
    let _turn = alone();
    let pool = Pool::builder().timing(Timing::Fast).network(Network::Namespaces).start()?;
    let (_, target) = move_without_its_memory(&pool)?;
    pool.cut_traffic(target.index(), Traffic::Migration, "pages")?;
    wait_process_state(&pool, "paused").context("without its source it waits")?;
    pool.lift_filter("pages")?;
    wait_process_state(&pool, "running").context("the link is back")?;
    let record = wait_until(Duration::from_secs(60), "the move ends", || {
        let record = pool.items(&["migration", "list"])?.pop().context("the move is listed")?;
        Ok((record["outcome"] != "running").then_some(record))
    })?;
    assert_eq!(record["outcome"], "done", "{record}");
    assert!(record["pages"]["faulted"].as_u64() > Some(0), "{record}");
    // It visits every page of its working set and finds what it had left there.
    let before = pool.probe("web")?;
    let after =
        pool.wait_probe("web", Duration::from_secs(60), "two passes", |now| now.pass >= before.pass + 2)?;
    assert!(after.errors.is_empty() && after.boots == 1, "{after:?}");
    wait_one_process(&pool)
}

/// What its source had is lost, and nobody else has it: it boots anew, with everything that it was told is on its disk.
#[test]
fn a_guest_whose_source_dies_before_all_of_its_pages_are_there_boots_anew() -> Result<()> {
    let _turn = alone();
    let pool = Pool::builder().timing(Timing::Fast).network(Network::Namespaces).start()?;
    let (source, _) = move_without_its_memory(&pool)?;
    let (before, epoch) = (pool.probe("web")?, pool.vm("web")?["epoch"].as_u64());
    source.vm_processes().pop().context("the source serves what is missing")?.process.kill9()?;
    wait_for(Duration::from_secs(60), "it starts anew", || Ok(pool.vm("web")?["epoch"].as_u64() > epoch))?;
    let after = pool.wait_probe("web", Duration::from_secs(60), "boots", |now| now.verified > 0)?;
    assert!(after.errors.is_empty() && after.disk_counter >= before.acked, "{before:?} → {after:?}");
    wait_one_process(&pool)?;
    let record = pool.items(&["migration", "list"])?.pop().context("the move is listed")?;
    assert_ne!(record["outcome"], "running", "{record}");
    Ok(())
}
