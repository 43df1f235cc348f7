//! A pool forms, and a host that may not join doesn't.

use anyhow::Result;
use std::time::Duration;
use tests::wait::wait_for;
use tests::{Pool, in_turn, pool::Timing};

/// Hosts and tokens as the operator sees them: what must not change by a refused join.
fn members(pool: &Pool) -> Result<(Vec<String>, String)> {
    let hosts = pool.items(&["host", "list"])?;
    let names = hosts.iter().map(|host| format!("{} {}", host["name"], host["state"])).collect();
    Ok((names, pool.json(&["pool", "status"])?["voters"].to_string()))
}

#[test]
fn three_hosts_form_a_pool_that_any_of_them_serves() -> Result<()> {
    let _turn = in_turn();
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
            let created = pool.poolctl(&["volume", "create", &name, "--size", "1MiB", "--replicas", "1"])?;
            // One whose answer was lost is there all the same, and its name is taken.
            Ok(created.code == 0 || pool.poolctl(&["volume", "show", &name])?.code == 0)
        })?;
        pool.host(index).start_daemon()?;
        pool.wait_hosts_up()?;
    }
    assert_eq!(pool.items(&["volume", "list"])?.len(), 3);
    Ok(())
}

#[test]
fn a_host_with_a_bad_token_is_refused_and_changes_nothing() -> Result<()> {
    let _turn = in_turn();
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
    refuse(&good[..good.len() - 2], 2, "a token that was cut")?;
    refuse(&with_wrong_secret(&good), 7, "a wrong secret")?;
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

/// The contents of a token, changed by `change`, with a checksum that fits: a forgery, not a typing error.
fn forged(token: &str, change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> String {
    const PREFIX: &str = "pool1-";
    const CHECKSUM_BYTES: usize = 4;
    let digits = &token[PREFIX.len()..];
    let bytes = (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap());
    let mut bytes: Vec<u8> = bytes.collect();
    bytes.truncate(bytes.len() - CHECKSUM_BYTES);
    let mut bytes = change(bytes);
    let sum = blake3::hash(&bytes);
    bytes.extend_from_slice(&sum.as_bytes()[..CHECKSUM_BYTES]);
    bytes.iter().fold(PREFIX.to_owned(), |text, byte| format!("{text}{byte:02x}"))
}

/// A forgery with another secret: its last 32 bytes.
fn with_wrong_secret(token: &str) -> String {
    forged(token, |mut bytes| {
        *bytes.last_mut().unwrap() ^= 1;
        bytes
    })
}

/// A forgery that leads to another address; texts in a token come after their length in one byte.
fn with_address(token: &str, old: &str, new: &str) -> String {
    let text = |address: &str| [&[u8::try_from(address.len()).unwrap()], address.as_bytes()].concat();
    let (old, new) = (text(old), text(new));
    forged(token, |bytes| {
        let at = bytes
            .windows(old.len())
            .position(|window| window == old)
            .expect("the token names its pool's address");
        [&bytes[..at], &new, &bytes[at + old.len()..]].concat()
    })
}

#[test]
fn a_token_of_another_pool_joins_that_pool_only() -> Result<()> {
    let _turn = in_turn();
    let mut ours = Pool::builder().hosts(1).timing(Timing::Fast).start()?;
    let other = Pool::builder().name("other").hosts(1).timing(Timing::Fast).start()?;
    let before = (members(&ours)?, members(&other)?);
    // A token that leads to us, but was made by the other pool: as if an operator had mixed up two of them.
    let (there, here) = (other.host(0).address().to_string(), ours.host(0).address().to_string());
    let mixed_up = with_address(&other.create_token(&[])?, &there, &here);
    ours.prepare_host()?;
    let output = ours.join(1, &mixed_up)?.expect_code(7)?;
    assert!(output.stderr.contains("pool"), "{}", output.stderr);
    assert_eq!((members(&ours)?, members(&other)?), before);
    Ok(())
}
