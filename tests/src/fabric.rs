//! The network under a pool: loopback addresses, or a namespace for each host around a switch.
//!
//! ```text
//!   namespace TAG-h1        namespace TAG-sw                       namespace TAG-h2
//!   eth0 10.99.0.1 ──veth── p1 ─┐                         ┌─ p2 ──veth── eth0 10.99.0.2
//!                               ├── bridge br0 10.99.0.254 ┤        poolctl runs in TAG-sw
//!                               └── bridge cut1, cut2 … while the network is cut
//! ```
//!
//! A cut moves ports to bridges of their own: links stay up, packets go nowhere, as behind a broken switch. `poolctl` stays
//! with the first group. Everything lives in namespaces named after the run, so deleting those deletes all of it.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::process::{Command, Stdio};

/// Port of every host: each has an address of its own.
const PORT: u16 = 7443;

/// Loopback addresses tried for a pool before giving up; each is one that another pool may hold.
const LOOPBACK_TRIES: u32 = 64;

/// What hosts say to each other, by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Traffic {
    /// gRPC between the daemons: Raft, leases, agents.
    Control,
    /// Owners of volumes and replicas.
    Storage,
    /// VM processes during a migration.
    Migration,
}

impl Traffic {
    /// The matches of nftables that choose it.
    pub(crate) fn matches(self) -> &'static [&'static str] {
        match self {
            Self::Control => &["meta l4proto tcp"],
            Self::Storage => &["udp dport 7443", "udp sport 7443"],
            Self::Migration => &["udp dport != 7443 udp sport != 7443"],
        }
    }
}

/// A hardware address of nobody.
const NOBODY: &str = "02:00:00:00:00:01";

/// How the hosts of a pool reach each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// Addresses in 127/8; needs no privilege.
    Loopback,
    /// A network namespace for each host; needs root and iproute2, and can be cut.
    Namespaces,
}

/// The network of one pool.
#[derive(Debug)]
pub(crate) enum Fabric {
    Loopback {
        network: u32,
    },
    /// Somebody else's; clients reach it from here.
    Elsewhere,
    Namespaces {
        tag: String,
    },
}

impl Fabric {
    /// Sets up the shared part.
    pub(crate) fn new(network: Network, tag: &str) -> Result<Self> {
        match network {
            Network::Loopback => Ok(Self::Loopback { network: free_loopback_network()? }),
            Network::Namespaces => {
                check_namespaces_work()?;
                let switch = format!("{tag}-sw");
                ip(&["netns", "add", &switch])?;
                ip(&["-n", &switch, "link", "set", "lo", "up"])?;
                ip(&["-n", &switch, "link", "add", "br0", "type", "bridge"])?;
                ip(&["-n", &switch, "addr", "add", "10.99.0.254/24", "dev", "br0"])?;
                ip(&["-n", &switch, "link", "set", "br0", "up"])?;
                Ok(Self::Namespaces { tag: tag.to_owned() })
            }
        }
    }

    /// Sets up host `index` (from 0) and returns the address that it listens on.
    pub(crate) fn add_host(&self, index: usize) -> Result<SocketAddr> {
        let number = u8::try_from(index + 1).context("a test pool has at most 250 hosts")?;
        match self {
            Self::Elsewhere => bail!("hosts of a pool elsewhere are not made here"),
            Self::Loopback { network } => {
                Ok(SocketAddr::from((Ipv4Addr::from_bits(network + u32::from(number)), PORT)))
            }
            Self::Namespaces { tag } => {
                let (switch, host, port) =
                    (format!("{tag}-sw"), host_namespace(tag, index), format!("p{number}"));
                ip(&["netns", "add", &host])?;
                ip(&[
                    "link", "add", &port, "netns", &switch, "type", "veth", "peer", "name", "eth0", "netns",
                    &host,
                ])?;
                ip(&["-n", &switch, "link", "set", &port, "master", "br0", "up"])?;
                ip(&["-n", &host, "link", "set", "lo", "up"])?;
                ip(&["-n", &host, "addr", "add", &format!("10.99.0.{number}/24"), "dev", "eth0"])?;
                ip(&["-n", &host, "link", "set", "eth0", "up"])?;
                Ok(SocketAddr::from((Ipv4Addr::new(10, 99, 0, number), PORT)))
            }
        }
    }

    /// Gives a host a bridge `guest0` for VMs; those of all hosts are on one switch, apart from the hosts' own.
    pub(crate) fn add_guest_bridge(&self, index: usize) -> Result<()> {
        let Self::Namespaces { tag } = self else {
            bail!("only a pool in namespaces has bridges for guests")
        };
        let (switch, host) = (guest_switch(tag), host_namespace(tag, index));
        if ip(&["-n", &switch, "link", "show", "dev", GUEST_SWITCH]).is_err() {
            ip(&["-n", &switch, "link", "add", "name", GUEST_SWITCH, "type", "bridge"])?;
            ip(&["-n", &switch, "addr", "add", GUEST_SWITCH_ADDRESS, "dev", GUEST_SWITCH])?;
            ip(&["-n", &switch, "link", "set", "dev", GUEST_SWITCH, "up"])?;
        }
        let port = format!("g{}", index + 1);
        ip(&[
            "link", "add", "name", &port, "netns", &switch, "type", "veth", "peer", "name", "eth1", "netns",
            &host,
        ])?;
        ip(&["-n", &switch, "link", "set", "dev", &port, "master", GUEST_SWITCH, "up"])?;
        ip(&["-n", &host, "link", "add", "name", "guest0", "type", "bridge"])?;
        ip(&["-n", &host, "link", "set", "dev", "guest0", "up"])?;
        ip(&["-n", &host, "link", "set", "dev", "eth1", "master", "guest0", "up"])
    }

    /// The network namespace of a host, and of the switch that guests of all hosts are on.
    pub(crate) fn namespaces(&self, index: usize) -> Result<(String, String)> {
        let Self::Namespaces { tag } = self else { bail!("a pool on loopback has no namespaces") };
        Ok((host_namespace(tag, index), guest_switch(tag)))
    }

    /// A command that runs `program` at a host.
    pub(crate) fn at_host(&self, index: usize, program: &std::path::Path) -> Command {
        match self {
            Self::Loopback { .. } | Self::Elsewhere => Command::new(program),
            Self::Namespaces { tag } => in_namespace(&host_namespace(tag, index), program),
        }
    }

    /// A command that runs `program` where the operator sits.
    pub(crate) fn at_operator(&self, program: &std::path::Path) -> Command {
        match self {
            Self::Loopback { .. } | Self::Elsewhere => Command::new(program),
            Self::Namespaces { tag } => in_namespace(&format!("{tag}-sw"), program),
        }
    }

    /// Lets only hosts of one group reach each other; the operator is with the first group.
    pub(crate) fn cut(&self, groups: &[&[usize]]) -> Result<()> {
        let Self::Namespaces { tag } = self else { bail!("only a pool in namespaces can be cut") };
        let switch = format!("{tag}-sw");
        for (group, hosts) in groups.iter().enumerate() {
            let bridge = if group == 0 { "br0".to_owned() } else { format!("cut{group}") };
            if group > 0 && ip(&["-n", &switch, "link", "show", &bridge]).is_err() {
                ip(&["-n", &switch, "link", "add", &bridge, "type", "bridge"])?;
                ip(&["-n", &switch, "link", "set", &bridge, "up"])?;
            }
            for host in *hosts {
                ip(&["-n", &switch, "link", "set", &format!("p{}", host + 1), "master", &bridge])?;
            }
        }
        Ok(())
    }

    /// Loses what `from` sends to `to` (hosts by position), until [`Fabric::mend`].
    pub(crate) fn cut_one_way(&self, from: usize, to: usize) -> Result<()> {
        let Self::Namespaces { tag } = self else { bail!("only a pool in namespaces can be cut") };
        let (name, address) = (host_namespace(tag, from), host_address(to)?);
        // A neighbour whose hardware address nobody has: packets leave and arrive nowhere, as with a one-way link.
        ip(&["-n", &name, "neigh", "replace", &address, "lladdr", NOBODY, "dev", "eth0", "nud", "permanent"])
    }

    /// Undoes [`Fabric::cut_one_way`] for everything that the host sends.
    pub(crate) fn mend(&self, from: usize) -> Result<()> {
        let Self::Namespaces { tag } = self else { return Ok(()) };
        ip(&["-n", &host_namespace(tag, from), "neigh", "flush", "dev", "eth0", "nud", "permanent"])
    }

    /// Loses what a host sends to the others or gets from anybody, as far as a match of nftables chooses it. It is lost where it
    /// arrives: whoever sends it is told nothing.
    pub(crate) fn lose_all(&self, index: usize, hosts: usize, table: &str, matches: &[&str]) -> Result<()> {
        let Self::Namespaces { tag } = self else { bail!("only a pool in namespaces can be cut") };
        let victim = host_address(index)?;
        for at in 0..hosts {
            let from = if at == index { String::new() } else { format!("ip saddr {victim} ") };
            let rules: String = matches.iter().map(|rule| format!("{from}{rule} drop\n")).collect();
            let chain = "type filter hook input priority 0; policy accept;";
            nft(
                &host_namespace(tag, at),
                &format!("table ip {table} {{\nchain in {{\n{chain}\n{rules}}}\n}}\n"),
            )?;
        }
        Ok(())
    }

    /// Undoes [`Fabric::lose_all`] at a host, if it was done there.
    pub(crate) fn lift(&self, index: usize, table: &str) -> Result<()> {
        let Self::Namespaces { tag } = self else { return Ok(()) };
        // Made first, so that it can be deleted whether it was there or not.
        nft(&host_namespace(tag, index), &format!("table ip {table}\ndelete table ip {table}\n"))
    }

    /// Limits what a host sends and receives, each; `None` lifts the limit.
    pub(crate) fn limit(&self, index: usize, kbit_per_s: Option<u64>) -> Result<()> {
        let Self::Namespaces { tag } = self else { bail!("only a pool in namespaces has links to limit") };
        let ends = [
            (host_namespace(tag, index), "eth0".to_owned()),
            (format!("{tag}-sw"), format!("p{}", index + 1)),
        ];
        for (name, device) in &ends {
            let Some(rate) = kbit_per_s else {
                // No limit may be set: that is what is wanted.
                command("tc", &["-n", name, "qdisc", "del", "dev", device, "root"]).ok();
                continue;
            };
            let rate = format!("{rate}kbit");
            let shape = ["root", "tbf", "rate", &rate, "burst", "64kb", "latency", "200ms"];
            command("tc", &[&["-n", name, "qdisc", "replace", "dev", device][..], &shape].concat())?;
        }
        Ok(())
    }

    /// Deletes the namespaces.
    pub(crate) fn remove(&self) {
        if let Self::Namespaces { tag } = self {
            remove_namespaces(tag);
        }
    }
}

/// The bridge of the guests' switch.
const GUEST_SWITCH: &str = "guests0";

/// Its address, in the subnet that tests give to their guests.
const GUEST_SWITCH_ADDRESS: &str = "10.7.0.254/24";

/// The guests' switch shares a namespace with that of the hosts.
fn guest_switch(tag: &str) -> String {
    format!("{tag}-sw")
}

fn host_namespace(tag: &str, index: usize) -> String {
    format!("{tag}-h{}", index + 1)
}

fn in_namespace(name: &str, program: &std::path::Path) -> Command {
    // nsenter replaces itself by the program: the child's pid is the program's own.
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/run/netns/{name}")).arg("--").arg(program);
    command
}

/// Deletes every namespace of a run; errors are left to the next run.
pub(crate) fn remove_namespaces(tag: &str) {
    let prefix = format!("{tag}-");
    let names = std::fs::read_dir("/run/netns").into_iter().flatten().flatten();
    for name in names.filter_map(|entry| entry.file_name().into_string().ok()) {
        if name.starts_with(&prefix) {
            ip(&["netns", "delete", &name]).ok();
        }
    }
}

/// Says exactly what is missing for namespaces.
fn check_namespaces_work() -> Result<()> {
    if !nix::unistd::Uid::effective().is_root() {
        bail!("a pool in network namespaces needs root; run it with sudo, or use the loopback network");
    }
    if Command::new("ip").arg("-V").output().is_err() {
        bail!("`ip` is missing; run `apt-get install iproute2`");
    }
    if Command::new("nsenter").arg("-V").output().is_err() {
        bail!("`nsenter` is missing; run `apt-get install util-linux`");
    }
    Ok(())
}

/// Address of a host (by position) in its namespace.
fn host_address(index: usize) -> Result<String> {
    let number = u8::try_from(index + 1).context("a test pool has at most 250 hosts")?;
    Ok(Ipv4Addr::new(10, 99, 0, number).to_string())
}

/// Gives nftables of a namespace a text.
fn nft(namespace: &str, text: &str) -> Result<()> {
    let mut command = in_namespace(namespace, std::path::Path::new("nft"));
    command.args(["-f", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().context("start `nft`; is nftables installed?")?;
    child.stdin.take().context("it was given a pipe")?.write_all(text.as_bytes())?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("nft in {namespace}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn ip(arguments: &[&str]) -> Result<()> {
    command("ip", arguments)
}

fn command(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program).args(arguments).output();
    let output = output.with_context(|| format!("start `{program}`; is iproute2 installed?"))?;
    if !output.status.success() {
        bail!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// A /24 in 127/8 of which the first address is free, so that all are: pools take whole networks.
fn free_loopback_network() -> Result<u32> {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    for _ in 0..LOOPBACK_TRIES {
        let turn = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        // 127.64.0.0/10 holds 16384 networks; the pid spreads concurrent runs over them.
        let slot = (std::process::id().wrapping_mul(LOOPBACK_TRIES) + turn) % 16384;
        let network = Ipv4Addr::new(127, 64, 0, 0).to_bits() + (slot << 8);
        let first = (Ipv4Addr::from_bits(network + 1), PORT);
        if TcpListener::bind(first).is_ok() && UdpSocket::bind(first).is_ok() {
            return Ok(network);
        }
    }
    bail!("no free loopback network in {LOOPBACK_TRIES} tries; are other pools running?")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::run;
    use crate::wait::wait_for;
    use std::path::Path;
    use std::time::Duration;

    /// Whether host 1 can open a connection to the listener at host 2.
    fn connects(fabric: &Fabric) -> bool {
        let mut command = fabric.at_host(0, Path::new("bash"));
        run(command.args(["-c", "exec 3<>/dev/tcp/10.99.0.2/7443"]), Duration::from_millis(600))
            .is_ok_and(|output| output.code == 0)
    }

    #[test]
    fn a_cut_keeps_hosts_apart_until_it_heals() {
        if !nix::unistd::Uid::effective().is_root() {
            // Without root there are no namespaces, and nothing of this can be used either.
            return;
        }
        let fabric = Fabric::new(Network::Namespaces, &format!("ptfab{:x}", std::process::id())).unwrap();
        for host in 0..2 {
            fabric.add_host(host).unwrap();
        }
        // A listener inside the namespace of host 2: a thread of its own enters it, so this one stays outside.
        let path = format!("/run/netns/ptfab{:x}-h2", std::process::id());
        let listener = std::thread::spawn(move || {
            nix::sched::setns(std::fs::File::open(path).unwrap(), nix::sched::CloneFlags::CLONE_NEWNET)
                .unwrap();
            TcpListener::bind(("10.99.0.2", PORT)).unwrap()
        });
        let listener = listener.join().unwrap();
        let deadline = Duration::from_secs(10);
        wait_for(deadline, "hosts reach each other", || Ok(connects(&fabric))).unwrap();
        fabric.cut(&[&[0], &[1]]).unwrap();
        assert!(!connects(&fabric), "the cut lets packets through");
        fabric.cut(&[&[0, 1]]).unwrap();
        wait_for(deadline, "hosts reach each other again", || Ok(connects(&fabric))).unwrap();
        fabric.cut_one_way(0, 1).unwrap();
        assert!(!connects(&fabric), "one direction is cut and packets get through");
        fabric.mend(0).unwrap();
        wait_for(deadline, "both directions work again", || Ok(connects(&fabric))).unwrap();
        // Only what is meant is lost, and only as long as it is.
        fabric.lose_all(0, 2, "cut1", Traffic::Storage.matches()).unwrap();
        fabric.lose_all(0, 2, "cut2", Traffic::Migration.matches()).unwrap();
        assert!(connects(&fabric), "more than one kind of traffic is lost");
        fabric.lose_all(0, 2, "cut3", Traffic::Control.matches()).unwrap();
        assert!(!connects(&fabric), "what should be lost gets through");
        (0..2).for_each(|host| fabric.lift(host, "cut3").unwrap());
        wait_for(deadline, "control gets through again", || Ok(connects(&fabric))).unwrap();
        fabric.lose_all(0, 2, "lossy", &["numgen random mod 100 <= 99"]).unwrap();
        assert!(!connects(&fabric), "everything is lost and something gets through");
        (0..2).for_each(|host| fabric.lift(host, "lossy").unwrap());
        // A link that carries next to nothing; then one without a limit.
        fabric.limit(0, Some(1)).unwrap();
        fabric.limit(0, None).unwrap();
        wait_for(deadline, "the limit is lifted", || Ok(connects(&fabric))).unwrap();
        drop(listener);
        fabric.remove();
        assert!(!Path::new(&format!("/run/netns/ptfab{:x}-h2", std::process::id())).exists());
    }
}
