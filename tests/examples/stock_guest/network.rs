//! Two guests on a bridge of all hosts and on a VLAN: addresses, offloads, a stream that outlives moves, and no other's name.

use crate::guest::{Guest, PATIENCE};
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use std::process::Command;
use tests::{Pool, wait_until};

/// The networks that each VM has a card on, in this order.
pub const NETWORKS: [&str; 2] = ["lan", "tagged"];

/// The tag of the second one.
const VLAN: u16 = 5;

/// Where the receiving guest listens.
const PORT: u16 = 7000;

/// Bits of a card's features that a driver has taken: checksums and segments, in both directions (virtio 1.2, 5.1.3).
const OFFLOADS: [(&str, usize); 4] =
    [("VIRTIO_NET_F_CSUM", 0), ("GUEST_CSUM", 1), ("GUEST_TSO4", 7), ("HOST_TSO4", 11)];

/// Makes the networks, the same at every host.
pub fn create(pool: &Pool) -> Result<()> {
    pool.connect_guests()?;
    pool.json(&["net", "create", NETWORKS[0], "--bridge", "guest0", "--subnet", "10.7.0.0/24"])?;
    let tag = VLAN.to_string();
    let tagged = ["net", "create", NETWORKS[1], "--vlan", &tag, "--uplink", "eth1"];
    pool.json(&[&tagged[..], &["--subnet", "10.8.0.0/24"]].concat()).map(drop)
}

/// Addresses of a VM's cards as the pool knows them; the guest must have them by DHCP.
pub fn addresses(guest: &mut Guest<'_>) -> Result<Vec<String>> {
    let vm = guest.pool.vm(guest.name)?;
    let nics = vm["nics"].as_array().context("the VM has cards")?;
    let mut addresses = Vec::new();
    for nic in nics {
        let word = |key: &str| nic[key].as_str().with_context(|| format!("no {key} in {nic}"));
        let (ip, mac) = (word("ip")?, word("mac")?);
        let card = guest.run(&format!("grep -l {mac} /sys/class/net/*/address"))?;
        let card = card.trim_start_matches("/sys/class/net/").trim_end_matches("/address");
        guest.wait_for(&format!("ip -o addr show dev {card} | grep -q 'inet {ip}/24'"))?;
        let features = guest.run(&format!("cat /sys/class/net/{card}/device/features"))?;
        for (name, bit) in OFFLOADS {
            ensure!(
                features.as_bytes().get(bit) == Some(&b'1'),
                "the driver of {card} has no {name}: {features}"
            );
        }
        addresses.push(ip.to_owned());
    }
    ensure!(addresses.len() == NETWORKS.len(), "{} has other cards: {vm}", guest.name);
    Ok(addresses)
}

/// A TCP connection from one guest to another that carries numbers, one after the other, for as long as both run.
pub struct Stream {
    received: u64,
}

impl Stream {
    /// Opens it.
    pub fn open(from: &mut Guest<'_>, to: &mut Guest<'_>, address: &str) -> Result<Self> {
        // Its input stays open: at the end of that it would end its half of the connection, and the other side all of it.
        to.leave_running(&format!("sh -c 'sleep 100000 | nc -l -p {PORT} > /run/got'"))?;
        to.wait_for(&format!("netstat -ltn | grep -q :{PORT}"))?;
        // Never again: a connection that breaks ends it.
        let numbers = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done";
        from.leave_running(&format!("sh -c '({numbers}) | nc {address} {PORT}'"))?;
        let mut stream = Self { received: 0 };
        stream.check(to)?;
        Ok(stream)
    }

    /// It gets on, and what has come is every number in its order.
    pub fn check(&mut self, to: &mut Guest<'_>) -> Result<()> {
        let (before, name) = (self.received, to.name);
        let more = wait_until(PATIENCE, "the stream between the guests gets on", || {
            let lines: u64 = to.run("grep -c . /run/got || true")?.parse()?;
            Ok((lines > before + 4).then_some(lines))
        });
        self.received = more.with_context(|| to.tail())?;
        // The last line may be half of one.
        let whole = self.received - 1;
        to.run(&format!("seq 1 {whole} > /run/wanted; head -n {whole} /run/got | cmp - /run/wanted"))
            .with_context(|| format!("what came to {name} is not what was sent"))?;
        Ok(())
    }

    /// Numbers that have come.
    pub fn received(&self) -> u64 {
        self.received
    }
}

/// The guest hears the other one on this address.
pub fn hears(guest: &mut Guest<'_>, address: &str) -> Result<()> {
    guest.wait_for(&format!("ping -c 1 -W 2 {address} > /dev/null"))
}

/// A guest that takes another address than the pool's is heard by nobody.
pub fn has_no_other_name(guest: &mut Guest<'_>, peer: &str) -> Result<()> {
    let card = guest.run("ip -o addr show | grep 'inet 10.7.0' | cut -d' ' -f2")?;
    guest.run(&format!("ip addr add 10.7.0.99/24 dev {card}"))?;
    let (output, code) = guest.try_run(&format!("ping -c 2 -W 2 -I 10.7.0.99 {peer}"))?;
    ensure!(code != "0" && output.contains("100% packet loss"), "somebody answers a foreign name:\n{output}");
    guest.run(&format!("ip addr del 10.7.0.99/24 dev {card}"))?;
    hears(guest, peer)
}

/// At the hosts of both guests the frames of the second network have gone through a VLAN interface with its tag.
pub fn is_tagged(pool: &Pool) -> Result<()> {
    for host in 0..2 {
        let (namespace, _) = pool.namespaces(host)?;
        let output = Command::new("ip").args(["-n", &namespace, "-j", "-d", "-s", "link"]).output()?;
        let links: Vec<Value> = serde_json::from_slice(&output.stdout).context("what `ip` says")?;
        let vlans: Vec<_> = links.iter().filter(|link| link["linkinfo"]["info_kind"] == "vlan").collect();
        let [vlan] = vlans.as_slice() else { bail!("h{} has {} VLANs", host + 1, vlans.len()) };
        ensure!(
            vlan["linkinfo"]["info_data"]["id"] == VLAN && vlan["link"] == "eth1",
            "another VLAN: {vlan}"
        );
        for way in ["rx", "tx"] {
            let packets = vlan["stats64"][way]["packets"].as_u64();
            ensure!(packets.is_some_and(|count| count > 0), "no {way} packets on the VLAN: {vlan}");
        }
    }
    Ok(())
}
