//! A host's key was lost, or stolen.

use anyhow::{Context, Result};
use std::fs;
use std::time::{Duration, Instant};
use tests::vms::PROBE_LIGHT;
use tests::wait::wait_for;
use tests::{Pool, in_turn, pool::Timing};

/// A host that shows another key is known again within this, on two busy cores.
const SOON: Duration = Duration::from_secs(30);

#[test]
fn a_host_comes_with_another_key_and_the_old_one_is_void() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    let host = pool.host_besides(&[pool.leader()?.name()])?;
    let name = host.name().to_owned();
    pool.start_probe("web", "64MiB", PROBE_LIGHT, Some(&name))?;
    let process = pool.vm_process("web")?;

    // What a thief has: the certificate and the key of the host, which may use the whole API.
    let identity = host.data_dir().join("identity");
    let stolen = stolen_config(&pool, &identity)?;
    let as_thief = |arguments: &[&str]| {
        let mut command = pool.poolctl_command(arguments);
        tests::output::run(command.arg("--config").arg(&stolen), Duration::from_secs(60))
    };
    as_thief(&["host", "list"])?.ok()?;

    let token = pool.json(&["host", "rekey", &name])?["token"].as_str().context("a token")?.to_owned();
    let refused = rekey(&pool, pool.host_besides(&[&name])?.index(), &token)?.expect_code(7)?;
    assert!(refused.stderr.contains(&name), "another host has no use for it: {}", refused.stderr);
    let index = host.index();
    rekey(&pool, index, &token)?.ok()?;
    wait_for(SOON, "the old key is void", || Ok(as_thief(&["host", "list"])?.code == 7))?;

    // The daemon, which was never restarted, shows the new one: its lease is renewed, so its VM runs on.
    let lease_over = Instant::now() + Duration::from_secs(5);
    let before = pool.probe("web")?.beat;
    wait_for(SOON, "the VM runs when an old lease would be over", || {
        Ok(Instant::now() > lease_over && pool.probe("web")?.beat > before + 3)
    })?;
    assert_eq!(pool.vm_process("web")?, process);
    assert_eq!(pool.json(&["host", "show", &name])?["state"], "up");
    // Also after a restart, and the token is good for this key only.
    host.restart_daemon()?;
    pool.wait_beats("web", 3, SOON)?;
    rekey(&pool, index, &token)?.expect_code(7)?;
    let audit = pool.items(&["event", "audit"])?;
    assert!(audit.iter().any(|record| record["action"] == "host.rekey"), "{audit:?}");

    // One whose key is gone altogether has nothing to show, and is let in by the next token.
    host.kill9_daemon()?;
    for file in ["key.pem", "cert.pem"] {
        fs::remove_file(identity.join(file))?;
    }
    let token = pool.json(&["host", "rekey", &name])?["token"].as_str().context("a token")?.to_owned();
    rekey(&pool, index, &token)?.ok()?;
    host.start_daemon()?;
    pool.wait_host_state(&name, "up", SOON)?;
    pool.wait_beats("web", 3, SOON)?;
    Ok(())
}

/// `poold rekey` at a host.
fn rekey(pool: &Pool, index: usize, token: &str) -> Result<tests::Output> {
    let data = pool.host(index).data_dir().to_string_lossy().into_owned();
    pool.poold_at(index, &["rekey", "--data", &data, token])
}

/// A configuration for `poolctl` that shows what a host shows.
fn stolen_config(pool: &Pool, identity: &std::path::Path) -> Result<std::path::PathBuf> {
    let mut config: toml::Table = fs::read_to_string(pool.admin_config())?.parse()?;
    for (key, file) in [("cert_pem", "cert.pem"), ("key_pem", "key.pem")] {
        config.insert(key.to_owned(), fs::read_to_string(identity.join(file))?.into());
    }
    let path = pool.dir().join("stolen.toml");
    fs::write(&path, config.to_string())?;
    Ok(path)
}
