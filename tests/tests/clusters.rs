//! Clusters on real hosts, and the bundle that helps to help.

use anyhow::{Context, Result};
use std::time::Duration;
use tests::vms::PROBE_LIGHT;
use tests::{Pool, in_turn, pool::Timing};

/// More than a bundle of three hosts may have: what is bounded is bounded by far less for each host.
const BUNDLE_BYTES_MAX: u64 = 4 << 20;

#[test]
fn vms_stay_in_their_cluster_and_a_bundle_tells_of_all_hosts_also_of_a_dead_one() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    pool.json(&["cluster", "create", "fast", "--cpu-profile", "host"])?;
    for host in ["h2", "h3"] {
        pool.json(&["cluster", "add", "fast", "--host", host])?;
    }
    let listed = pool.items(&["cluster", "list"])?;
    let hosts: Vec<String> = listed.iter().map(|cluster| cluster["hosts"].to_string()).collect();
    assert_eq!(hosts, [r#"["h1"]"#, r#"["h2","h3"]"#]);
    pool.import_probe()?;
    pool.create_volume("web-disk", "16MiB", 3)?;
    let arguments = ["vm", "create", "web", "--vcpus", "1", "--memory", "64MiB", "--disk", "web-disk"];
    let rest = ["--kernel", "probe", "--cmdline", PROBE_LIGHT, "--cluster", "fast"];
    pool.json(&[&arguments[..], &rest].concat())?;
    let refused = pool.poolctl(&["vm", "start", "web", "--host", "h1"])?.expect_code(4)?;
    assert!(refused.stderr.contains("cluster fast"), "{}", refused.stderr);
    pool.start_vm("web", None)?;
    let first = pool.vm_host("web")?;
    assert_ne!(first, "h1");
    pool.poolctl(&["vm", "migrate", "web", "--to", "h1"])?.expect_code(4)?;
    pool.poolctl(&["vm", "migrate", "web"])?.ok()?;
    let second = pool.vm_host("web")?;
    assert!(second != "h1" && second != first, "{second}");
    let why = pool.json(&["vm", "explain", "web"])?.to_string();
    assert!(why.contains("is of cluster fast"), "{why}");
    let refused = pool.poolctl(&["cluster", "add", "default", "--host", &second])?.expect_code(4)?;
    assert!(refused.stderr.contains("web"), "{}", refused.stderr);
    pool.poolctl(&["cluster", "delete", "fast"])?.expect_code(4)?;
    pool.poolctl(&["cluster", "delete", "default"])?.expect_code(2)?;

    // Its host dies: it comes back within the cluster.
    pool.host_named(&second)?.kill9_host()?;
    pool.wait_probe("web", Duration::from_secs(40), "boots again", |now| now.beat > 2)?;
    assert_eq!(pool.vm_host("web")?, first);
    bundle(&pool, &second)
}

fn bundle(pool: &Pool, dead: &str) -> Result<()> {
    let token = pool.create_token(&[])?;
    let path = pool.dir().join("bundle.json");
    let file = path.to_string_lossy().into_owned();
    let made = pool.poolctl(&["support", "bundle", &file])?.ok()?;
    assert!(made.stderr.contains(&format!("host {dead}")), "{}", made.stderr);
    pool.poolctl(&["support", "bundle", &file])?.expect_code(1)?;
    assert!(path.metadata()?.len() < BUNDLE_BYTES_MAX, "{} bytes", path.metadata()?.len());
    let text = std::fs::read_to_string(&path)?;
    for secret in ["PRIVATE KEY", "pool1-", "pooltoken-", &token[token.len() - 32..]] {
        assert!(!text.contains(secret), "`{secret}` is in the bundle");
    }
    let bundle: serde_json::Value = serde_json::from_str(&text)?;
    for host in pool.hosts() {
        let report = &bundle["reports"][host.name()];
        if host.name() == dead {
            assert!(report["missing"].as_str().is_some_and(|why| !why.is_empty()), "{report}");
            continue;
        }
        let log = report["log"].as_str().context("a log")?;
        assert!(log.contains("serving"), "{log}");
        assert!(report["metrics"].as_str().is_some_and(|text| text.contains("pool_raft_term")), "{report}");
        assert_eq!(report["version"], env!("CARGO_PKG_VERSION"));
        assert!(report["config"].as_str().is_some_and(|text| text.contains(host.name())), "{report}");
    }
    for list in ["pool", "hosts", "vms", "volumes", "clusters", "tasks", "events", "audit"] {
        assert!(bundle[list].as_array().is_some_and(|items| !items.is_empty()), "{list}: {}", bundle[list]);
    }
    Ok(())
}
