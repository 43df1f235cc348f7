//! A kernel of values: steps are carried out on a list of links, until nothing is left to do.

use super::*;
use pool_state::state::{Network, NetworkAddressing};

const LAN: NetworkId = NetworkId(7);

fn ours() -> Ours {
    Ours { pool_id: "p1".to_owned(), host: HostId(2) }
}

fn wanted(link: NetworkLink) -> Wanted {
    let subnet: Ipv4Subnet = "10.7.0.0/24".parse().unwrap();
    let gateway = Some(Ipv4Addr::new(10, 7, 0, 1));
    let addressing = Some(NetworkAddressing { subnet, gateway, dns: Vec::new() });
    let mut state = PoolState::default();
    state.networks.insert(LAN, Network { id: LAN, name: "lan".to_owned(), link, addressing });
    Wanted::of(&state, &[])
}

fn link(index: u32, name: &str) -> Link {
    Link { index, name: name.to_owned(), is_up: true, ..Link::default() }
}

fn bridge(index: u32, name: &str) -> Link {
    Link { is_bridge: true, ..link(index, name) }
}

/// Carries steps out as the kernel does.
fn carry_out(links: &mut Vec<Link>, step: &Step) {
    let next = links.iter().map(|link| link.index).max().unwrap_or(0) + 1;
    let mut change = |index: u32, change: &dyn Fn(&mut Link)| {
        change(links.iter_mut().find(|link| link.index == index).expect("it is there"));
    };
    match step {
        Step::AddBridge { name, .. } => {
            let made = Link { is_up: false, ..bridge(next, name) };
            links.push(made);
        }
        Step::AddVlan { name, .. } => {
            let made = Link { is_up: false, ..link(next, name) };
            links.push(made);
        }
        Step::Mark { link, alias } => change(*link, &|link| link.alias.clone_from(alias)),
        Step::Enslave { link, bridge, .. } => change(*link, &|link| link.master = Some(*bridge)),
        Step::Up { link } => change(*link, &|link| link.is_up = true),
        Step::AddAddress { link, address, prefix_len, .. } => {
            change(*link, &|link| link.addresses.push((*address, *prefix_len)));
        }
        Step::Remove { link } => links.retain(|other| other.index != *link),
    }
}

fn converge(wanted: &Wanted, links: &mut Vec<Link>) -> BTreeMap<NetworkId, Problem> {
    for _ in 0..6 {
        let planned = plan(&ours(), wanted, links);
        if planned.steps.is_empty() {
            return planned.problems;
        }
        planned.steps.iter().for_each(|step| carry_out(links, step));
    }
    panic!("never at rest: {links:?}");
}

fn named<'a>(links: &'a [Link], name: &str) -> &'a Link {
    links.iter().find(|link| link.name == name).unwrap_or_else(|| panic!("no {name} in {links:?}"))
}

#[test]
fn a_vlan_gets_its_bridge_and_goes_with_its_network() {
    let vlan = wanted(NetworkLink::Vlan { uplink: "eth1".to_owned(), vlan: 5 });
    let mut links = vec![link(1, "lo"), link(2, "eth1")];
    assert!(converge(&vlan, &mut links).is_empty());
    let (net, port) = (named(&links, "pnet7"), named(&links, "pvlan7"));
    assert!(net.is_bridge && net.is_up && port.is_up && port.master == Some(net.index));
    assert_eq!((net.alias.as_str(), port.alias.as_str()), ("pool p1 host-2", "pool p1 host-2"));
    assert!(converge(&Wanted::default(), &mut links).is_empty());
    assert_eq!(links.len(), 2, "the operator's links stay");
}

#[test]
fn nat_has_the_gateway_on_its_bridge_and_what_is_taken_away_comes_back() {
    let nat = wanted(NetworkLink::Nat);
    let mut links = vec![link(1, "lo")];
    assert!(converge(&nat, &mut links).is_empty());
    assert_eq!(named(&links, "pnet7").addresses, [(Ipv4Addr::new(10, 7, 0, 1), 24)]);
    assert_eq!(nat.nat()[&LAN].0, "pnet7");
    links[1].addresses.clear();
    links[1].is_up = false;
    assert!(converge(&nat, &mut links).is_empty());
    assert!(links[1].is_up && links[1].addresses.len() == 1);
}

#[test]
fn what_an_operator_must_do_is_a_problem_and_touches_nothing() {
    let on_bridge = wanted(NetworkLink::Bridge { bridge: "br0".to_owned() });
    let mut links = vec![link(1, "lo")];
    assert_eq!(converge(&on_bridge, &mut links)[&LAN], Problem::NoBridge("br0".to_owned()));
    links.push(link(2, "br0"));
    assert_eq!(converge(&on_bridge, &mut links)[&LAN], Problem::NotABridge("br0".to_owned()));
    let vlan = wanted(NetworkLink::Vlan { uplink: "eth1".to_owned(), vlan: 5 });
    assert_eq!(converge(&vlan, &mut links)[&LAN], Problem::NoUplink("eth1".to_owned()));
    let foreign = Link { alias: "somebody's".to_owned(), ..bridge(9, "pnet7") };
    let mut links = vec![foreign];
    assert_eq!(converge(&vlan, &mut links)[&LAN], Problem::Foreign("pnet7".to_owned()));
    assert!(converge(&Wanted::default(), &mut links).is_empty());
    assert_eq!(links.len(), 1, "what is not ours is not removed");
}

#[test]
fn taps_are_put_on_their_bridge_and_another_pools_links_are_left() {
    let mut on_bridge = wanted(NetworkLink::Bridge { bridge: "br0".to_owned() });
    on_bridge.taps.insert("pv1-1-0".to_owned(), LAN);
    on_bridge.taps.insert("pv2-1-0".to_owned(), LAN);
    let other = Link { alias: "pool p2 host-2".to_owned(), ..bridge(5, "pnet9") };
    let tap = Link { is_up: false, ..link(4, "pv1-1-0") };
    let mut links = vec![bridge(3, "br0"), tap, other];
    assert!(converge(&on_bridge, &mut links).is_empty());
    assert!(named(&links, "pv1-1-0").is_up);
    assert_eq!(named(&links, "pv1-1-0").master, Some(3));
    named(&links, "pnet9");
}
