//! What governs a pool changes while it works: versions, settings, the certificate authority.

use anyhow::{Context, Result};
use std::fs;
use std::time::Duration;
use tests::wait::wait_for;
use tests::{Pool, in_turn, pool::Timing};

/// A host that is back has told its facts within this, on two busy cores.
const SOON: Duration = Duration::from_secs(30);

fn level(pool: &Pool) -> Result<u64> {
    pool.json(&["upgrade", "status"])?["feature_level"].as_u64().context("the level is a number")
}

#[test]
fn a_pool_is_upgraded_host_by_host_and_then_gets_another_authority() -> Result<()> {
    let _turn = in_turn();
    // Daemons that support level 2 only, as the version before did.
    let pool = Pool::builder().timing(Timing::Fast).feature_level(2).start()?;
    let volume = ["volume", "create", "old", "--size", "1MiB"];
    pool.json(&volume)?;
    let cluster = ["cluster", "create", "fast"];
    let snapshot = ["volume", "snapshot", "old", "first"];
    for host in pool.hosts() {
        assert_eq!(level(&pool)?, 2, "{} is behind", host.name());
        // Old and new daemons side by side: what only the new ones know is refused by whichever is asked.
        for new in [&cluster[..], &snapshot] {
            let refused = pool.poolctl(new)?.expect_code(4)?;
            assert!(refused.stderr.contains("feature level 3"), "{}", refused.stderr);
            assert!(refused.stderr.contains("poolctl upgrade status"), "{}", refused.stderr);
        }
        let path = host.data_dir().join("poold.toml");
        let config = fs::read_to_string(&path)?;
        let upgraded: Vec<&str> =
            config.lines().filter(|line| !line.starts_with("feature_level_max")).collect();
        assert_ne!(upgraded.len(), config.lines().count(), "{config}");
        fs::write(&path, upgraded.join("\n"))?;
        host.restart_daemon()?;
        wait_for(SOON, "the host has told its level", || {
            let hosts = pool.json(&["upgrade", "status"])?["hosts"].clone();
            let told = hosts.as_array().and_then(|all| all.iter().find(|it| it["host"] == host.name()));
            Ok(told.is_some_and(|told| told["feature_level"] == 4))
        })?;
    }
    wait_for(SOON, "the level is raised", || Ok(level(&pool)? == 4))?;
    for new in [&cluster[..], &snapshot] {
        pool.poolctl(new)?.ok()?;
    }
    let token = ["user", "token", "create", "admin", "--role", "viewer", "-o", "json"];
    let made = pool.poolctl(&token)?.ok()?.json()?;
    settings(&pool)?;
    authority(&pool, made["token"].as_str().context("a token")?)?;

    // There is no way back for a single host.
    let last = pool.host(2);
    last.kill9_daemon()?;
    let path = last.data_dir().join("poold.toml");
    let config = fs::read_to_string(&path)?;
    fs::write(&path, format!("feature_level_max = 2\n{config}"))?;
    let data = last.data_dir().to_string_lossy().into_owned();
    let refused = pool.poold_at(2, &["serve", "--data", &data])?.expect_code(4)?;
    assert!(refused.stderr.contains("feature level 4"), "{}", refused.stderr);
    configuration(&pool, &path, &config)
}

/// What is in force can be read, and a slip of the pen is named; `config` is a good one.
fn configuration(pool: &Pool, path: &std::path::Path, config: &str) -> Result<()> {
    let data = path.parent().context("a folder")?.to_string_lossy().into_owned();
    fs::write(path, config)?;
    let told = pool.poold_at(2, &["config", "check", "--data", &data])?.ok()?.stdout;
    for word in ["host_name = \"h3\"", "lease_ttl_ms = 2000", "vms_max = 10000"] {
        assert!(told.contains(word), "{word}: {told}");
    }
    fs::write(path, format!("log_fromat = \"json\"\n{config}"))?;
    for arguments in [&["config", "check", "--data", &data][..], &["serve", "--data", &data]] {
        let refused = pool.poold_at(2, arguments)?.expect_code(2)?;
        assert!(refused.stderr.contains("`log_fromat`, did you mean `log_format`?"), "{}", refused.stderr);
    }
    Ok(())
}

fn settings(pool: &Pool) -> Result<()> {
    pool.json(&["pool", "set", "replicas-default=2", "cpu-overcommit=8"])?;
    let volume = pool.json(&["volume", "create", "two", "--size", "1MiB"])?;
    assert_eq!(volume["replicas"].as_array().map(Vec::len), Some(2), "{volume}");
    pool.poolctl(&["pool", "set", "replicas-default=9"])?.expect_code(2)?;
    Ok(())
}

fn authority(pool: &Pool, token: &str) -> Result<()> {
    let before = pool.json(&["pool", "show"])?["ca_fingerprint"].clone();
    pool.json(&["pool", "ca", "rotate"])?;
    wait_for(SOON, "every host shows the new authority", || {
        let shown = pool.json(&["pool", "show"])?;
        Ok(shown["ca_rotating"] == true && shown["ca_pending"] == serde_json::json!([]))
    })?;
    // Who shows a certificate of the old one would lock itself out.
    let refused = pool.poolctl(&["pool", "ca", "finish"])?.expect_code(4)?;
    assert!(refused.stderr.contains("poolctl user renew"), "{}", refused.stderr);
    let old = fs::read(pool.admin_config())?;
    pool.json(&["user", "renew"])?;
    pool.json(&["pool", "ca", "finish"])?;
    let after = pool.json(&["pool", "show"])?;
    assert!(after["ca_rotating"] == false && after["ca_fingerprint"] != before, "{after}");
    let folder = tempfile::tempdir()?;
    let with = |name: &str, contents: &[u8], arguments: &[&str]| -> Result<tests::Output> {
        let path = folder.path().join(name);
        fs::write(&path, contents)?;
        let mut command = pool.poolctl_command(arguments);
        tests::output::run(command.arg("--config").arg(path), Duration::from_secs(60))
    };
    assert_ne!(with("old.toml", &old, &["host", "list"])?.code, 0, "the old certificate is void");
    // A token needs no certificate, only to know whom it talks to.
    let admin: toml::Table = fs::read_to_string(pool.admin_config())?.parse()?;
    let mut config = toml::Table::new();
    for key in ["addresses", "ca_pem"] {
        config.insert(key.to_owned(), admin[key].clone());
    }
    config.insert("token".to_owned(), token.into());
    let config = config.to_string();
    with("token.toml", config.as_bytes(), &["host", "list"])?.ok()?;
    with("token.toml", config.as_bytes(), &["host", "cordon", "h1"])?.expect_code(7)?;
    // New connections among the hosts, too.
    pool.host(1).restart_daemon()?;
    pool.host(0).restart_daemon()?;
    wait_for(SOON, "the hosts find together", || Ok(pool.poolctl(&["host", "uncordon", "h3"])?.code == 0))
}
