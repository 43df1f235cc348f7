//! Networks of VMs: guests of several hosts reach each other, also while they move, and nothing of a VM stays behind.

use anyhow::{Context, Result};
use nix::unistd::Uid;
use serde_json::Value;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;
use tests::fabric::Network;
use tests::links::{EchoStream, Sniffer, echo, has_carrier, links, taps};
use tests::wait::{wait_for, wait_until};
use tests::{Pool, in_turn, pool::Timing};

const PATIENCE: Duration = Duration::from_secs(60);

/// Reverse ARP: what a card that has moved announces itself with.
const RARP: u16 = 0x8035;

/// A pool in namespaces; none without root.
fn pool(hosts: usize) -> Result<Option<Pool>> {
    if !Uid::effective().is_root() {
        return Ok(None);
    }
    let pool = Pool::builder().hosts(hosts).network(Network::Namespaces).timing(Timing::Fast).start()?;
    pool.connect_guests()?;
    pool.import_probe()?;
    Ok(Some(pool))
}

fn start(pool: &Pool, name: &str, net: &str, peer: &str, host: &str) -> Result<Value> {
    let cmdline = format!("wss=2M net=1 peer={peer}");
    let arguments = ["--vcpus", "1", "--memory", "64MiB", "--kernel", "probe", "--cmdline", &cmdline];
    let vm = pool.json(&[&["vm", "create", name, "--net", net][..], &arguments].concat())?;
    pool.start_vm(name, Some(host))?;
    Ok(vm)
}

fn wait_echoes(pool: &Pool, name: &str, more: u64) -> Result<()> {
    let before = pool.probe(name)?.net_echoed;
    pool.wait_probe(name, PATIENCE, "hears its peer", |now| now.net_echoed >= before + more).map(drop)
}

#[test]
fn guests_on_two_hosts_talk_and_go_on_while_either_moves() -> Result<()> {
    let _turn = in_turn();
    let Some(pool) = pool(2)? else { return Ok(()) };
    pool.json(&["net", "create", "lan", "--bridge", "guest0", "--subnet", "10.7.0.0/24"])?;
    let one = start(&pool, "one", "lan", "10.7.0.3", "h1")?;
    start(&pool, "two", "lan", "10.7.0.2", "h2")?;
    let nic = &one["nics"][0];
    assert_eq!((nic["network"].as_str(), nic["ip"].as_str()), (Some("lan"), Some("10.7.0.2")), "{one}");
    for name in ["one", "two"] {
        wait_echoes(&pool, name, 8)?;
    }
    assert_eq!(pool.probe("one")?.address, "10.7.0.2", "by DHCP");

    let mac = nic["mac"].as_str().context("a hardware address")?;
    let mac: Vec<u8> = mac.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<_, _>>()?;
    let (first, outside) = pool.namespaces(0)?;
    // From outside of the pool, through whatever host the VM is on.
    let mut stream = EchoStream::open(&outside, SocketAddr::from(([10, 7, 0, 2], 7)))?;
    let switch = Sniffer::open(&outside, RARP)?;
    for (name, target) in [("one", "h2"), ("two", "h1"), ("one", "h1")] {
        assert_eq!(pool.json(&["vm", "migrate", name, "--to", target])?["outcome"], "done");
        wait_echoes(&pool, "one", 8)?;
        wait_echoes(&pool, "two", 8)?;
        let before = stream.echoed()?;
        wait_for(PATIENCE, "the stream goes on", || Ok(stream.echoed()? >= before + 4))?;
    }
    drop(stream);
    // Two moves of it, each announced; the switch sees them on a port of another host than before.
    let mut announced = 0;
    wait_for(PATIENCE, "the switch is told where the VM is", || {
        while let Some(frame) = switch.next()? {
            announced += usize::from(frame.get(6..12) == Some(&mac[..]));
        }
        Ok(announced >= 2)
    })?;
    let (second, _) = pool.namespaces(1)?;
    wait_for(PATIENCE, "only the taps of both VMs are left, at their host", || {
        Ok((taps(&first)?.len(), taps(&second)?.len()) == (2, 0))
    })?;

    // The process dies: its tap dies with it, and the VM comes back with its address.
    let process = pool.vm_process("one")?.process;
    let names = || -> Result<BTreeSet<String>> {
        Ok(taps(&first)?.iter().filter_map(|tap| tap["ifname"].as_str().map(ToOwned::to_owned)).collect())
    };
    let before = names()?;
    process.kill9()?;
    wait_echoes(&pool, "one", 8)?;
    assert_eq!(pool.probe("one")?.address, "10.7.0.2");
    let now = names()?;
    assert_eq!((now.len(), now.intersection(&before).count()), (2, 1), "{before:?}, now {now:?}");
    for name in ["one", "two"] {
        pool.json(&["vm", "stop", name])?;
    }
    wait_for(PATIENCE, "no tap is left", || Ok(taps(&first)?.is_empty()))?;
    Ok(())
}

#[test]
fn a_vm_without_a_lease_is_unplugged_and_a_network_behind_nat_comes_and_goes() -> Result<()> {
    let _turn = in_turn();
    let Some(pool) = pool(1)? else { return Ok(()) };
    let (host, _) = pool.namespaces(0)?;
    let net = pool.json(&["net", "create", "lab", "--nat", "10.8.0.0/24", "--dns", "10.8.0.1"])?;
    assert_eq!(net["gateway"], "10.8.0.1", "{net}");
    let bridge = format!("pnet{}", net["id"].as_str().context("an id")?.trim_start_matches("net-"));
    let find = |name: &str| -> Result<Option<Value>> {
        Ok(links(&host)?.into_iter().find(|link| link["ifname"] == name))
    };
    wait_for(PATIENCE, "the host has the gateway", || {
        Ok(find(&bridge)?.is_some_and(|link| link["addr_info"][0]["local"] == "10.8.0.1"))
    })?;
    echo(&host, "10.8.0.1:7")?;
    start(&pool, "web", "lab", "10.8.0.1", "h1")?;
    wait_echoes(&pool, "web", 8)?;
    let refused = pool.poolctl(&["net", "delete", "lab"])?;
    assert_eq!(refused.code, 4, "{refused:?}");
    assert!(rules(&host)?.contains("ip saddr 10.8.0.0/24"), "{}", rules(&host)?);

    // Nobody renews the lease: the VM stands, and its cable is out.
    let daemon = pool.host_named("h1")?;
    let tap = wait_until(PATIENCE, "the cable is in", || Ok(taps(&host)?.into_iter().find(has_carrier)))?;
    daemon.kill9_daemon()?;
    let carrier = || -> Result<bool> {
        let found = taps(&host)?.into_iter().find(|found| found["ifname"] == tap["ifname"]);
        found.as_ref().map(has_carrier).context("the VM process still has its tap")
    };
    wait_for(PATIENCE, "the cable is out", || Ok(!carrier()?))?;
    daemon.start_daemon()?;
    pool.wait_hosts_up()?;
    wait_for(PATIENCE, "the cable is in again", carrier)?;
    wait_echoes(&pool, "web", 8)?;

    pool.json(&["vm", "stop", "web"])?;
    pool.json(&["vm", "delete", "web"])?;
    pool.json(&["net", "delete", "lab"])?;
    wait_for(PATIENCE, "bridge and rules are gone", || {
        Ok(find(&bridge)?.is_none() && !rules(&host)?.contains("10.8.0.0/24"))
    })?;
    // What the host lacks is said, with the way out of it.
    pool.json(&["net", "create", "far", "--bridge", "nowhere0"])?;
    start(&pool, "lost", "far", "10.8.0.1", "h1").unwrap_err();
    let problem = pool.vm("lost")?["problem"].as_str().unwrap_or_default().to_owned();
    assert!(problem.contains("network far") && problem.contains("ip link add nowhere0"), "{problem}");
    Ok(())
}

/// The rules of nftables in a namespace.
fn rules(namespace: &str) -> Result<String> {
    let path = format!("--net=/run/netns/{namespace}");
    let output = std::process::Command::new("nsenter").args([&path, "nft", "list", "ruleset"]).output()?;
    Ok(String::from_utf8(output.stdout)?)
}
