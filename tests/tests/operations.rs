//! What an operator does with hosts, users and VMs of a running pool.

use anyhow::{Context, Result};
use std::io::Write;
use std::process::Stdio;
use std::time::Duration;
use tests::vms::{PROBE_BUSY, PROBE_LIGHT};
use tests::wait::wait_for;
use tests::{Follower, Pool, in_turn, pool::Timing};

/// A VM of a test moves within this, on two busy cores.
const MOVE_DEADLINE: Duration = Duration::from_secs(60);

#[test]
fn a_drained_host_is_empty_and_gets_its_vms_back_without_a_reboot() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    for name in ["one", "two"] {
        pool.start_probe(name, "64MiB", PROBE_LIGHT, Some("h2"))?;
    }
    let revision = pool.json(&["pool", "show"])?["revision"].as_u64().context("a revision")?;
    pool.json(&["host", "drain", "h2"])?;
    assert_eq!(pool.json(&["host", "show", "h2"])?["state"], "maintenance");
    for name in ["one", "two"] {
        assert_ne!(pool.vm_host(name)?, "h2");
        pool.wait_beats(name, 3, MOVE_DEADLINE)?;
    }
    let refused = pool.poolctl(&["vm", "migrate", "one", "--to", "h2"])?.expect_code(4)?;
    assert!(refused.stderr.contains("maintenance"), "{}", refused.stderr);
    pool.json(&["host", "restore", "h2"])?;
    for name in ["one", "two"] {
        assert_eq!(pool.vm_host(name)?, "h2");
        let now = pool.wait_beats(name, 3, MOVE_DEADLINE)?;
        assert_eq!(now.boots, 1, "{name} was started anew: {now:?}");
    }
    // Who asked for it is on record, and every host's log has what it was called.
    let audit = pool.items(&["event", "audit", "--from", &revision.to_string()])?;
    let actions: Vec<&str> = audit.iter().filter_map(|record| record["action"].as_str()).collect();
    assert_eq!(actions, ["host.drain", "host.restore"]);
    assert!(audit.iter().all(|record| record["principal"] == "user-admin"), "{audit:?}");
    for request in audit.iter().filter_map(|record| record["request_id"].as_str()) {
        for host in pool.hosts() {
            let log = std::fs::read_to_string(host.log_path())?;
            assert!(log.contains(request), "{request} is not in the log of {}", host.name());
        }
    }
    // So are the tasks that came of it, at both ends of each move.
    let tasks = pool.items(&["task", "list"])?;
    let moves = tasks.iter().filter(|task| task["operation"] == "vm.migrate");
    let moves: Vec<&str> = moves.filter_map(|task| task["id"].as_str()).collect();
    assert_eq!(moves.len(), 4, "{tasks:?}");
    for task in moves {
        let named = |host: &&tests::Host| {
            std::fs::read_to_string(host.log_path()).is_ok_and(|log| log.contains(&format!("task={task} ")))
        };
        let hosts: Vec<&str> = pool.hosts().iter().filter(named).map(tests::Host::name).collect();
        assert!(hosts.len() >= 2 && hosts.contains(&"h2"), "{task} is in the logs of {hosts:?} only");
    }
    // A daemon that starts anew does not say again what it has said.
    let host = pool.host(2);
    host.restart_daemon()?;
    pool.json(&["host", "cordon", "h1"])?;
    let said = |action: &str| -> Result<usize> {
        let log = std::fs::read_to_string(host.log_path())?;
        Ok(log.lines().filter(|line| line.contains(&format!("action=\"{action}\""))).count())
    };
    wait_for(MOVE_DEADLINE, "it says what is new", || Ok(said("host.cordon")? == 1))?;
    assert_eq!(said("host.drain")?, 1);
    Ok(())
}

#[test]
fn a_paused_vm_moves_and_stays_paused() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    pool.start_probe("web", "64MiB", PROBE_BUSY, Some("h1"))?;
    pool.json(&["vm", "pause", "web"])?;
    wait_for(MOVE_DEADLINE, "it is paused", || Ok(pool.vm("web")?["state"] == "paused"))?;
    pool.json(&["vm", "migrate", "web", "--to", "h2"])?;
    assert_eq!((pool.vm_host("web")?.as_str(), &pool.vm("web")?["state"]), ("h2", &"paused".into()));
    let process = pool.vm_process("web")?;
    let used = process.vcpu_time()?;
    // It rests at the target for as long as anything might still resume it by itself.
    let rested = std::time::Instant::now() + Duration::from_secs(3);
    wait_for(Duration::from_secs(10), "three seconds at the target", || {
        Ok(std::time::Instant::now() > rested)
    })?;
    assert!(process.vcpu_time()? - used < Duration::from_millis(5), "it runs although it is paused");
    pool.json(&["vm", "resume", "web"])?;
    let now = pool.wait_beats("web", 3, MOVE_DEADLINE)?;
    assert_eq!(now.boots, 1, "{now:?}");
    Ok(())
}

#[test]
fn a_wiped_host_joins_again_after_the_dead_one_was_forgotten() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    pool.start_probe("web", "64MiB", PROBE_LIGHT, Some("h1"))?;
    let victim = pool.host_named("h3")?;
    victim.kill9_host()?;
    pool.wait_host_state("h3", "lost", Duration::from_secs(30))?;
    std::fs::remove_dir_all(victim.data_dir())?;
    std::fs::create_dir_all(victim.data_dir())?;
    let token = pool.create_token(&[])?;
    let refused = pool.join(2, &token)?.expect_code(4)?;
    assert!(refused.stderr.contains("poolctl host forget h3"), "{}", refused.stderr);
    pool.json(&["host", "forget", "h3"])?;
    pool.join(2, &token)?.ok()?;
    victim.start_daemon()?;
    pool.wait_host_state("h3", "up", Duration::from_secs(30))?;
    pool.wait_beats("web", 3, MOVE_DEADLINE)?;
    Ok(())
}

#[test]
fn a_change_without_a_majority_says_so() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    pool.start_probe("web", "64MiB", PROBE_LIGHT, Some("h1"))?;
    pool.host_named("h2")?.kill9_daemon()?;
    pool.host_named("h3")?.kill9_daemon()?;
    for arguments in [&["vm", "stop", "web"][..], &["host", "cordon", "h1"], &["vm", "where", "web"]] {
        let refused = pool.poolctl(arguments)?.expect_code(5)?;
        assert!(!refused.stderr.is_empty(), "{arguments:?}");
    }
    Ok(())
}

#[test]
fn a_user_may_do_what_its_role_says_until_it_is_deleted() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().hosts(1).timing(Timing::Fast).start()?;
    let folder = tempfile::tempdir()?;
    let config = |name: &str| folder.path().join(format!("{name}.toml")).to_string_lossy().into_owned();
    let as_user = |name: &str, arguments: &[&str]| {
        let mut command = pool.poolctl_command(arguments);
        command.arg("--config").arg(config(name));
        tests::output::run(&mut command, Duration::from_secs(60))
    };
    for (name, role) in [("vera", "viewer"), ("otto", "operator")] {
        pool.poolctl(&["user", "create", name, "--role", role, "--out", &config(name)])?.ok()?;
    }
    as_user("vera", &["vm", "list"])?.ok()?;
    as_user("vera", &["volume", "create", "x", "--size", "1MiB"])?.expect_code(7)?;
    as_user("otto", &["volume", "create", "x", "--size", "1MiB"])?.ok()?;
    as_user("otto", &["user", "list"])?.expect_code(7)?;
    pool.poolctl(&["user", "rotate", "otto", "--out", &config("otto2")])?.ok()?;
    as_user("otto", &["vm", "list"])?.expect_code(7)?;
    as_user("otto2", &["vm", "list"])?.ok()?;
    pool.poolctl(&["user", "delete", "vera"])?.ok()?;
    as_user("vera", &["vm", "list"])?.expect_code(7)?;
    pool.poolctl(&["user", "delete", "admin"])?.expect_code(4)?;
    Ok(())
}

#[test]
fn groups_keep_vms_apart_and_plans_say_what_would_happen() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().hosts(2).timing(Timing::Fast).start()?;
    for name in ["one", "two"] {
        pool.start_probe(name, "64MiB", PROBE_LIGHT, Some("h1"))?;
    }
    pool.json(&["group", "create", "spread", "--rule", "apart", "--vm", "one", "--vm", "two"])?;
    let moves = pool.items(&["balance", "plan"])?;
    assert_eq!((moves.len(), &moves[0]["reason"]), (1, &"group spread".into()), "{moves:?}");
    pool.json(&["balance", "run"])?;
    assert_ne!(pool.vm_host("one")?, pool.vm_host("two")?);
    // Each has nowhere to go: the other host has the other one.
    let plan = pool.poolctl(&["ha", "plan", "--fail", "1", "-o", "json"])?.expect_code(4)?.json()?;
    assert_eq!(plan["unplaced"].as_array().map(Vec::len), Some(1), "{plan}");
    let why = pool.json(&["vm", "explain", "one"])?;
    let text = why.to_string();
    assert!(text.contains("it is here") && text.contains("spread"), "{text}");
    Ok(())
}

#[test]
fn what_is_typed_reaches_the_guest_also_after_it_has_moved() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().hosts(2).timing(Timing::Fast).start()?;
    pool.start_probe("web", "64MiB", PROBE_LIGHT, Some("h2"))?;
    let heard = |words: &str| -> Result<()> {
        let mut typing = pool.poolctl_command(&["console", "serial", "web"]);
        let mut typing = typing.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        typing.stdin.take().context("its input")?.write_all(words.as_bytes())?;
        let answer = typing.wait_with_output()?;
        assert!(answer.status.success(), "{answer:?}");
        wait_for(Duration::from_secs(20), "the guest says what it heard", || {
            let log = pool.poolctl(&["console", "log", "web"])?.ok()?.stdout;
            let heard: String = log.lines().filter_map(|line| line.strip_prefix("PROBE typed ")).collect();
            Ok(heard.contains(words))
        })
    };
    // More than the port's FIFO holds.
    heard("the quick brown fox jumps over the lazy dog")?;
    pool.poolctl(&["vm", "migrate", "web", "--to", "h1"])?.ok()?;
    heard("and over the next one")?;
    pool.poolctl(&["vm", "stop", "web"])?.ok()?;
    let refused = pool.poolctl(&["console", "serial", "web"])?.expect_code(4)?;
    assert!(refused.stderr.contains("stopped"), "{}", refused.stderr);
    Ok(())
}

#[test]
fn whoever_follows_a_console_misses_nothing_of_a_vm_that_moves() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    // It says something many times a second, so also while nobody follows it.
    pool.start_probe("web", "64MiB", "wss=64K rate=2M disk=1", Some("h1"))?;
    let follower = Follower::open(&pool, "web")?;
    for to in ["h2", "h3", "h1", "h2"] {
        pool.wait_beats("web", 3, MOVE_DEADLINE)?;
        pool.json(&["vm", "migrate", "web", "--to", to])?;
    }
    pool.wait_beats("web", 3, MOVE_DEADLINE)?;
    let log = pool.console("web")?;
    let all_seen = wait_for(MOVE_DEADLINE, "all of it is seen", || Ok(follower.text().starts_with(&log)));
    all_seen.with_context(|| format!("the log:\n{log}\nwhat was followed:\n{}", follower.text()))
}
