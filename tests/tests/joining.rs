//! A pool forms, and a host that may not join doesn't.

use anyhow::Result;
use std::time::Duration;
use tests::wait::wait_for;
use tests::{Pool, pool::Timing, serial};

/// Hosts and tokens as the operator sees them: what must not change by a refused join.
fn members(pool: &Pool) -> Result<(Vec<String>, String)> {
    let hosts = pool.items(&["host", "list"])?;
    let names = hosts.iter().map(|host| format!("{} {}", host["name"], host["state"])).collect();
    Ok((names, pool.json(&["pool", "status"])?["voters"].to_string()))
}

#[test]
fn three_hosts_form_a_pool_that_any_of_them_serves() -> Result<()> {
    let _turn = serial();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    let status = pool.json(&["pool", "status"])?;
    assert_eq!(status["hosts"], 3, "{status}");
    wait_for(Duration::from_secs(20), "three hosts vote", || {
        Ok(pool.json(&["pool", "status"])?["voters"].as_array().is_some_and(|voters| voters.len() == 3))
    })?;
    // Without the host that the configuration names, and whichever leads, the rest still answers and accepts changes.
    for index in 0..3 {
        pool.host(index).kill9_daemon()?;
        let name = format!("made-without-h{}", index + 1);
        wait_for(Duration::from_secs(30), "two hosts accept a change", || {
            Ok(pool.poolctl(&["volume", "create", &name, "--size", "1MiB", "--replicas", "1"])?.code == 0)
        })?;
        pool.host(index).start_daemon()?;
        pool.wait_hosts_up()?;
    }
    assert_eq!(pool.items(&["volume", "list"])?.len(), 3);
    Ok(())
}

#[test]
fn a_host_with_a_bad_token_is_refused_and_changes_nothing() -> Result<()> {
    let _turn = serial();
    let mut pool = Pool::builder().hosts(1).timing(Timing::Fast).start()?;
    let used = pool.create_token(&[])?;
    pool.prepare_host()?;
    pool.join(1, &used)?.ok()?;
    pool.host(1).start_daemon()?;
    pool.wait_hosts_up()?;

    pool.prepare_host()?;
    let before = members(&pool)?;
    let refuse = |token: &str, code: i32, what: &str| -> Result<()> {
        let output = pool.join(2, token)?.expect_code(code)?;
        assert!(!output.stderr.trim().is_empty(), "{what}: no reason given");
        assert!(!output.stderr.contains("panicked"), "{what}: {}", output.stderr);
        assert_eq!(members(&pool)?, before, "{what}");
        Ok(())
    };
    refuse("nonsense", 2, "garbage")?;
    refuse("", 2, "nothing")?;
    refuse(&"A".repeat(100_000), 2, "a long token")?;
    refuse(&used, 7, "a token that was used by another host")?;
    let good = pool.create_token(&[])?;
    refuse(&damaged(&good), 7, "a wrong secret")?;
    let short = pool.create_token(&["--ttl", "1s"])?;
    wait_for(Duration::from_secs(20), "the token expires", || {
        let tokens = pool.items(&["host", "token", "list"])?;
        Ok(tokens.iter().any(|token| token["state"] == "expired"))
    })?;
    refuse(&short, 7, "an expired token")?;
    // After all that the good one still works: nothing was used up.
    pool.join(2, &good)?.ok()?;
    Ok(())
}

/// The token with one character of its secret, its last part, changed.
fn damaged(token: &str) -> String {
    let (rest, last) = token.split_at(token.len() - 1);
    format!("{rest}{}", if last == "0" { "1" } else { "0" })
}

#[test]
fn a_token_of_another_pool_joins_that_pool_only() -> Result<()> {
    let _turn = serial();
    let mut ours = Pool::builder().hosts(1).timing(Timing::Fast).start()?;
    let other = Pool::builder().name("other").hosts(1).timing(Timing::Fast).start()?;
    let before = (members(&ours)?, members(&other)?);
    // A token that names our address, but was made by the other pool: as if an operator had mixed up two of them.
    let forged = other
        .create_token(&[])?
        .replace(&other.host(0).address().to_string(), &ours.host(0).address().to_string());
    ours.prepare_host()?;
    let output = ours.join(1, &forged)?;
    assert_ne!(output.code, 0, "{output:?}");
    assert_eq!((members(&ours)?, members(&other)?), before);
    Ok(())
}
