//! What is to be done about this host's links, from what the pool wants and what is there. No I/O.

use super::tap;
use crate::supervisor::ProcessKey;
use pool_state::{PoolState, state::NetworkLink};
use proto::{HostId, Ipv4Subnet, NetworkId};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

/// A link as the kernel has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Whether it is a bridge.
    pub is_bridge: bool,
    /// Number of the bridge that it is a port of.
    pub master: Option<u32>,
    /// What its maker wrote on it.
    pub alias: String,
    /// Whether it is switched on.
    pub is_up: bool,
    /// Its IPv4 addresses.
    pub addresses: Vec<(Ipv4Addr, u8)>,
}

/// Whose links are ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ours {
    /// The pool.
    pub pool_id: String,
    /// This host.
    pub host: HostId,
}

impl Ours {
    /// What our links carry as their alias.
    pub fn alias(&self) -> String {
        format!("pool {} {}", self.pool_id, self.host)
    }
}

/// Something that stands in a network's way here, with its remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// The operator's bridge is not there.
    #[error("there is no bridge {0}; make it (`ip link add {0} type bridge`) and put its uplink on it")]
    NoBridge(String),
    /// Something else has the name.
    #[error("{0} is no bridge; delete the network and make it with another")]
    NotABridge(String),
    /// The interface of a VLAN is not there.
    #[error("there is no interface {0}; plug it in or delete the network")]
    NoUplink(String),
    /// A link that is not ours has the name that ours would have.
    #[error("{0} exists and is not of this pool; remove it with `ip link delete {0}`")]
    Foreign(String),
    /// A step failed.
    #[error("{0}")]
    Failed(String),
}

/// What this host shall have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    bridges: BTreeMap<NetworkId, Bridge>,
    /// Taps by name, with their networks.
    taps: BTreeMap<String, NetworkId>,
}

/// The bridge of a network.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Bridge {
    name: String,
    made_by: MadeBy,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum MadeBy {
    Operator,
    Vlan { uplink: String, vlan: u16, link: String },
    Nat { gateway: Ipv4Addr, subnet: Ipv4Subnet },
}

impl Wanted {
    /// What the state wants, with the taps of these processes.
    pub fn of(state: &PoolState, keys: &[ProcessKey]) -> Self {
        let own = |id: NetworkId| format!("pnet{}", id.0);
        let mut wanted = Self::default();
        for network in state.networks.values() {
            let addressing = network.addressing.as_ref();
            let (name, made_by) = match &network.link {
                NetworkLink::Bridge { bridge } => (bridge.clone(), MadeBy::Operator),
                NetworkLink::Vlan { uplink, vlan } => {
                    let link = format!("pvlan{}", network.id.0);
                    (own(network.id), MadeBy::Vlan { uplink: uplink.clone(), vlan: *vlan, link })
                }
                NetworkLink::Nat => {
                    // Both are there: `apply` saw to it.
                    let Some(addressing) = addressing else { continue };
                    let Some(gateway) = addressing.gateway else { continue };
                    (own(network.id), MadeBy::Nat { gateway, subnet: addressing.subnet })
                }
            };
            wanted.bridges.insert(network.id, Bridge { name, made_by });
        }
        for key in keys {
            let nics = state.vms.get(&key.vm).map(|vm| vm.spec.nics.as_slice()).unwrap_or_default();
            for (index, nic) in nics.iter().enumerate() {
                if let Ok(name) = tap::name(*key, index) {
                    wanted.taps.insert(name, nic.network);
                }
            }
        }
        wanted
    }

    /// Whether nothing is wanted.
    pub fn is_empty(&self) -> bool {
        self.bridges.is_empty() && self.taps.is_empty()
    }

    /// Subnets behind NAT with the bridges that they are on.
    pub fn nat(&self) -> BTreeMap<NetworkId, (String, Ipv4Subnet)> {
        let nat = self.bridges.iter().filter_map(|(id, bridge)| match bridge.made_by {
            MadeBy::Nat { subnet, .. } => Some((*id, (bridge.name.clone(), subnet))),
            _ => None,
        });
        nat.collect()
    }
}

/// One change of the kernel's links.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Makes a bridge.
    AddBridge { network: NetworkId, name: String },
    /// Makes a VLAN over an interface.
    AddVlan { network: NetworkId, name: String, uplink: u32, vlan: u16 },
    /// Marks a link as ours.
    Mark { link: u32, alias: String },
    /// Puts a link on a bridge.
    Enslave { network: NetworkId, link: u32, bridge: u32 },
    /// Switches a link on.
    Up { link: u32 },
    /// Gives a link an address.
    AddAddress { network: NetworkId, link: u32, address: Ipv4Addr, prefix_len: u8 },
    /// Removes a link.
    Remove { link: u32 },
}

/// What is to be done, and what can't be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Planned {
    /// In order.
    pub steps: Vec<Step>,
    /// By network.
    pub problems: BTreeMap<NetworkId, Problem>,
}

impl Planned {
    /// A step failed; its network is not ready unless the next look finds it done.
    pub fn note_failure(&mut self, step: &Step, cause: &str) {
        let network = match step {
            Step::AddBridge { network, .. }
            | Step::AddVlan { network, .. }
            | Step::Enslave { network, .. }
            | Step::AddAddress { network, .. } => *network,
            Step::Mark { .. } | Step::Up { .. } | Step::Remove { .. } => return,
        };
        self.problems.insert(network, Problem::Failed(cause.to_owned()));
    }
}

/// The links that are there, by name and owner.
struct Seen<'a> {
    links: &'a [Link],
    alias: String,
}

impl<'a> Seen<'a> {
    fn named(&self, name: &str) -> Option<&'a Link> {
        self.links.iter().find(|link| link.name == name)
    }

    /// Whether a link of this name may be taken for ours: marked so, or just made and not marked yet.
    fn is_ours(&self, link: &Link) -> bool {
        link.alias == self.alias || link.alias.is_empty()
    }
}

/// What is to be done.
pub fn plan(ours: &Ours, wanted: &Wanted, links: &[Link]) -> Planned {
    let seen = Seen { links, alias: ours.alias() };
    let mut planned = Planned::default();
    let mut kept = BTreeSet::new();
    for (network, bridge) in &wanted.bridges {
        match keep_bridge(&seen, *network, bridge, &mut kept) {
            Ok(steps) => planned.steps.extend(steps),
            Err(problem) => drop(planned.problems.insert(*network, problem)),
        }
    }
    for (name, network) in &wanted.taps {
        let bridge = wanted.bridges.get(network).and_then(|bridge| seen.named(&bridge.name));
        let (Some(tap), Some(bridge)) = (seen.named(name), bridge) else { continue };
        kept.insert(name.clone());
        planned.steps.extend(keep_port(*network, tap, bridge));
    }
    let stale = links.iter().filter(|link| link.alias == seen.alias && !kept.contains(&link.name));
    planned.steps.extend(stale.map(|link| Step::Remove { link: link.index }));
    planned
}

fn keep_bridge(
    seen: &Seen<'_>,
    network: NetworkId,
    bridge: &Bridge,
    kept: &mut BTreeSet<String>,
) -> Result<Vec<Step>, Problem> {
    let found = seen.named(&bridge.name);
    if let Some(link) = found.filter(|link| !link.is_bridge) {
        return Err(Problem::NotABridge(link.name.clone()));
    }
    if bridge.made_by == MadeBy::Operator {
        return if found.is_some() { Ok(Vec::new()) } else { Err(Problem::NoBridge(bridge.name.clone())) };
    }
    let Some(found) = found else {
        return Ok(vec![Step::AddBridge { network, name: bridge.name.clone() }]);
    };
    let mut steps = keep_own(seen, found, kept)?;
    match &bridge.made_by {
        MadeBy::Operator => {}
        MadeBy::Vlan { uplink, vlan, link } => {
            let uplink = seen.named(uplink).ok_or_else(|| Problem::NoUplink(uplink.clone()))?;
            match seen.named(link) {
                None => steps.push(Step::AddVlan {
                    network,
                    name: link.clone(),
                    uplink: uplink.index,
                    vlan: *vlan,
                }),
                Some(port) => {
                    steps.extend(keep_own(seen, port, kept)?);
                    steps.extend(keep_port(network, port, found));
                }
            }
        }
        MadeBy::Nat { gateway, subnet } => {
            let (address, prefix_len) = (*gateway, subnet.prefix_len());
            if !found.addresses.contains(&(address, prefix_len)) {
                steps.push(Step::AddAddress { network, link: found.index, address, prefix_len });
            }
        }
    }
    Ok(steps)
}

/// Keeps a link of our own marked and switched on.
fn keep_own(seen: &Seen<'_>, link: &Link, kept: &mut BTreeSet<String>) -> Result<Vec<Step>, Problem> {
    if !seen.is_ours(link) {
        return Err(Problem::Foreign(link.name.clone()));
    }
    kept.insert(link.name.clone());
    let mut steps = Vec::new();
    if link.alias != seen.alias {
        steps.push(Step::Mark { link: link.index, alias: seen.alias.clone() });
    }
    if !link.is_up {
        steps.push(Step::Up { link: link.index });
    }
    Ok(steps)
}

/// Keeps a link on its bridge.
fn keep_port(network: NetworkId, port: &Link, bridge: &Link) -> Vec<Step> {
    let mut steps = Vec::new();
    if port.master != Some(bridge.index) {
        steps.push(Step::Enslave { network, link: port.index, bridge: bridge.index });
    }
    if !port.is_up {
        steps.push(Step::Up { link: port.index });
    }
    steps
}

#[cfg(test)]
mod tests;
