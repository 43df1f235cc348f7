//! Networks and cards: addresses are unique, and nothing in use goes away.

use crate::{
    Command, Outcome,
    command::{CreateNetwork, CreateVm},
    fixture::Pool,
    state::{HaPolicy, NetworkAddressing, NetworkLink, Nic},
};
use proto::{NetworkId, VmId};
use std::{collections::BTreeSet, net::Ipv4Addr};

fn addressing(subnet: &str) -> NetworkAddressing {
    NetworkAddressing { subnet: subnet.parse().unwrap(), gateway: None, dns: Vec::new() }
}

fn create(name: &str, link: NetworkLink, addressing: Option<NetworkAddressing>) -> Command {
    Command::CreateNetwork(CreateNetwork { name: name.to_owned(), link, addressing })
}

fn bridge(name: &str) -> NetworkLink {
    NetworkLink::Bridge { bridge: name.to_owned() }
}

fn network(pool: &mut Pool, command: Command) -> NetworkId {
    match pool.accept(command) {
        Outcome::Network(network) => network,
        other => panic!("{other:?}"),
    }
}

fn vm_on(pool: &Pool, name: &str, nets: &[NetworkId]) -> Command {
    let Command::CreateVm(create) = pool.create_vm(name, Vec::new(), HaPolicy::Restart) else {
        panic!("the fixture makes VMs")
    };
    Command::CreateVm(CreateVm { nets: nets.to_vec(), ..create })
}

fn nics(pool: &Pool, vm: VmId) -> Vec<Nic> {
    pool.state.vms.get(&vm).unwrap().spec.nics.clone()
}

fn made(outcome: Outcome) -> VmId {
    match outcome {
        Outcome::Vm(vm) => vm,
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_card_has_addresses_of_its_own_until_the_network_is_full() {
    let mut pool = Pool::new(1);
    // Six host addresses, of which the first and the gateway are not for guests.
    let lan = NetworkAddressing { gateway: Some(Ipv4Addr::new(10, 7, 0, 3)), ..addressing("10.7.0.0/29") };
    let lan = network(&mut pool, create("lan", bridge("br0"), Some(lan)));
    let wild = network(&mut pool, create("wild", bridge("br1"), None));
    let (mut macs, mut ips) = (BTreeSet::new(), BTreeSet::new());
    for number in 0..4 {
        let create = vm_on(&pool, &format!("vm{number}"), &[lan, wild]);
        let vm = made(pool.accept(create));
        let cards = nics(&pool, vm);
        assert_eq!((cards[0].network, cards[1].network, cards[1].ip), (lan, wild, None));
        ips.insert(cards[0].ip.unwrap());
        for card in cards {
            assert_eq!(card.mac.0[0] & 3, 2, "locally administered, for one receiver");
            macs.insert(card.mac);
        }
    }
    let expected: BTreeSet<_> = [2, 4, 5, 6].map(|last| Ipv4Addr::new(10, 7, 0, last)).into();
    assert_eq!((macs.len(), ips), (8, expected));
    let create = vm_on(&pool, "late", &[lan]);
    assert_eq!(pool.reject(create), "NO_FREE_ADDRESS");
}

#[test]
fn a_deleted_vm_gives_its_address_back_and_frees_its_network() {
    let mut pool = Pool::new(1);
    let lan = network(&mut pool, create("lan", NetworkLink::Nat, Some(addressing("10.7.0.0/30"))));
    assert_eq!(
        pool.state.network(lan).unwrap().addressing.as_ref().unwrap().gateway,
        Some(Ipv4Addr::new(10, 7, 0, 1))
    );
    let create = vm_on(&pool, "one", &[lan]);
    let vm = made(pool.accept(create));
    assert_eq!(pool.reject(Command::DeleteNetwork { network: lan }), "NETWORK_IN_USE");
    pool.accept(Command::DeleteVm { vm });
    let create = vm_on(&pool, "two", &[lan]);
    let again = made(pool.accept(create));
    assert_eq!(nics(&pool, again)[0].ip, Some(Ipv4Addr::new(10, 7, 0, 2)));
    pool.accept(Command::DeleteVm { vm: again });
    pool.accept(Command::DeleteNetwork { network: lan });
    let create = vm_on(&pool, "three", &[lan]);
    assert_eq!(pool.reject(create), "NETWORK_NOT_FOUND");
}

#[test]
fn what_makes_no_sense_is_refused_with_its_reason() {
    let mut pool = Pool::new(1);
    network(&mut pool, create("lan", bridge("br0"), None));
    let vlan = |uplink: &str, vlan| NetworkLink::Vlan { uplink: uplink.to_owned(), vlan };
    let outside =
        NetworkAddressing { gateway: Some(Ipv4Addr::new(10, 8, 0, 1)), ..addressing("10.7.0.0/24") };
    let crowded = NetworkAddressing { dns: vec![Ipv4Addr::LOCALHOST; 5], ..addressing("10.7.0.0/24") };
    for (command, expected) in [
        (create("lan", bridge("br9"), None), "NAME_TAKEN"),
        (create("net-7", bridge("br9"), None), "BAD_NAME"),
        (create("two", bridge("br0"), None), "LINK_TAKEN"),
        (create("two", bridge("a/b"), None), "BAD_INTERFACE"),
        (create("two", bridge("sixteen-letters-"), None), "BAD_INTERFACE"),
        (create("two", vlan("eth1", 0), None), "BAD_VLAN"),
        (create("two", vlan("eth1", 4095), None), "BAD_VLAN"),
        (create("two", vlan("", 7), None), "BAD_INTERFACE"),
        (create("two", NetworkLink::Nat, None), "NAT_WITHOUT_SUBNET"),
        (create("two", vlan("eth1", 7), Some(outside)), "GATEWAY_OUTSIDE"),
        (create("two", NetworkLink::Nat, Some(crowded)), "TOO_MANY_DNS"),
    ] {
        assert_eq!(pool.reject(command), expected);
    }
    let lan = pool.state.resolve_network("lan").unwrap().id;
    let create = vm_on(&pool, "many", &[lan; 9]);
    assert_eq!(pool.reject(create), "TOO_MANY_CARDS");
}
