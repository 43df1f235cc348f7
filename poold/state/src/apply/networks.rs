//! Networks, and the cards of VMs on them.

use super::{Applied, Change, check_name, check_room};
use crate::{
    command::CreateNetwork,
    limits::{DNS_MAX, INTERFACE_BYTES_MAX, NETWORKS_MAX, VM_NICS_MAX},
    outcome::Outcome,
    rejection::{NetworkRejection, ObjectKind, Rejection},
    state::{EventKind, Network, NetworkAddressing, NetworkLink, Nic},
};
use proto::{MacAddress, NetworkId, VmId};
use std::{collections::BTreeSet, net::Ipv4Addr};

/// First byte of every card's address: locally administered, for one receiver.
const MAC_FIRST: u8 = 0x0a;

impl Change<'_> {
    pub(super) fn create_network(&mut self, create: &CreateNetwork) -> Applied {
        let names = self.state.networks.values().map(|network| network.name.as_str());
        check_name(ObjectKind::Network, &create.name, names)?;
        check_room(ObjectKind::Network, self.state.networks.len(), NETWORKS_MAX)?;
        check_link(&create.link)?;
        self.check_link_is_free(&create.link)?;
        let addressing = complete(&create.link, create.addressing.clone())?;
        let network = Network {
            id: NetworkId(self.index),
            name: create.name.clone(),
            link: create.link.clone(),
            addressing,
        };
        let id = network.id;
        let message = format!("created: {}", network.link.as_str());
        self.event(EventKind::Network, format!("network {}", network.name), message);
        self.state.networks.insert(id, network);
        Ok(Outcome::Network(id))
    }

    pub(super) fn delete_network(&mut self, id: NetworkId) -> Applied {
        let name = self.state.network(id)?.name.clone();
        let user = self.state.vms.values().find(|vm| vm.spec.nics.iter().any(|nic| nic.network == id));
        if let Some(vm) = user {
            return Err(NetworkRejection::InUse { network: name, vm: vm.name.clone() }.into());
        }
        self.state.networks.remove(&id);
        self.event(EventKind::Network, format!("network {name}"), "deleted".into());
        Ok(Outcome::Network(id))
    }

    fn check_link_is_free(&self, link: &NetworkLink) -> Result<(), Rejection> {
        let same = |other: &NetworkLink| *link != NetworkLink::Nat && other == link;
        match self.state.networks.values().find(|network| same(&network.link)) {
            None => Ok(()),
            Some(network) => {
                let link = match link {
                    NetworkLink::Bridge { bridge } => format!("bridge {bridge}"),
                    NetworkLink::Vlan { uplink, vlan } => format!("VLAN {vlan} of {uplink}"),
                    NetworkLink::Nat => "NAT".to_owned(),
                };
                Err(NetworkRejection::LinkTaken { network: network.name.clone(), link }.into())
            }
        }
    }

    /// Cards for a new VM, with addresses that nobody else has.
    pub(super) fn new_nics(&self, vm: VmId, networks: &[NetworkId]) -> Result<Vec<Nic>, Rejection> {
        let (count, max) = (networks.len(), VM_NICS_MAX);
        if count > max {
            return Err(NetworkRejection::TooManyCards { count: count as u64, max: max as u64 }.into());
        }
        let mut nics: Vec<Nic> = Vec::with_capacity(count);
        for network in networks {
            let network = self.state.network(*network)?;
            let mac = self.free_mac(vm, &nics);
            let ip = match &network.addressing {
                None => None,
                Some(addressing) => Some(self.free_address(network, addressing, &nics)?),
            };
            nics.push(Nic { network: network.id, mac, ip });
        }
        Ok(nics)
    }

    fn cards(&self) -> impl Iterator<Item = &Nic> {
        self.state.vms.values().flat_map(|vm| &vm.spec.nics)
    }

    /// A hardware address from the pool's id, so that pools on one wire differ, and from the VM's.
    fn free_mac(&self, vm: VmId, new: &[Nic]) -> MacAddress {
        let pool = blake3::hash(self.state.settings.pool_id.as_bytes()).as_bytes()[0];
        let taken: BTreeSet<MacAddress> = self.cards().chain(new).map(|nic| nic.mac).collect();
        // Numbers begin at 1: none has the address that DHCP answers from.
        let first = vm.0.wrapping_mul(VM_NICS_MAX as u64).wrapping_add(new.len() as u64);
        let mac = |number: u64| {
            let low = (number % u64::from(u32::MAX)) as u32 + 1;
            let [a, b, c, d] = low.to_be_bytes();
            MacAddress([MAC_FIRST, pool, a, b, c, d])
        };
        let mut candidates = (0..).map(|step: u64| mac(first.wrapping_add(step)));
        candidates.find(|mac| !taken.contains(mac)).expect("there are more addresses than cards")
    }

    fn free_address(
        &self,
        network: &Network,
        addressing: &NetworkAddressing,
        new: &[Nic],
    ) -> Result<Ipv4Addr, Rejection> {
        let here = |nic: &&Nic| nic.network == network.id;
        let taken: BTreeSet<Ipv4Addr> =
            self.cards().chain(new).filter(here).filter_map(|nic| nic.ip).chain(addressing.gateway).collect();
        // The first one is the gateway's by custom, or what the pool's DHCP answers from.
        let free = addressing.subnet.hosts().skip(1).find(|address| !taken.contains(address));
        free.ok_or_else(|| {
            NetworkRejection::NoFreeAddress { network: network.name.clone(), subnet: addressing.subnet }
                .into()
        })
    }
}

fn check_link(link: &NetworkLink) -> Result<(), NetworkRejection> {
    let (interface, vlan) = match link {
        NetworkLink::Bridge { bridge } => (bridge, 1),
        NetworkLink::Vlan { uplink, vlan } => (uplink, *vlan),
        NetworkLink::Nat => return Ok(()),
    };
    let is_fine = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let length = (1..=INTERFACE_BYTES_MAX).contains(&interface.len());
    if !length || !interface.bytes().all(is_fine) || interface.starts_with(['.', '-']) {
        return Err(NetworkRejection::BadInterface { name: super::cut(interface) });
    }
    if (1..=4094).contains(&vlan) { Ok(()) } else { Err(NetworkRejection::BadVlan { vlan }) }
}

/// Checks addresses, and gives a network behind NAT its gateway.
fn complete(
    link: &NetworkLink,
    addressing: Option<NetworkAddressing>,
) -> Result<Option<NetworkAddressing>, NetworkRejection> {
    let Some(mut addressing) = addressing else {
        return if *link == NetworkLink::Nat { Err(NetworkRejection::NatWithoutSubnet) } else { Ok(None) };
    };
    if *link == NetworkLink::Nat && addressing.gateway.is_none() {
        addressing.gateway = addressing.subnet.hosts().next();
    }
    if let Some(gateway) = addressing.gateway
        && !addressing.subnet.contains_host(gateway)
    {
        return Err(NetworkRejection::GatewayOutside { gateway, subnet: addressing.subnet });
    }
    let (count, max) = (addressing.dns.len(), DNS_MAX);
    if count > max {
        return Err(NetworkRejection::TooManyDns { count: count as u64, max: max as u64 });
    }
    Ok(Some(addressing))
}
