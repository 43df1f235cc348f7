//! What a guest may send: nothing in another's name, nothing that takes a network over.
//!
//! ```text
//!  source is its own hardware address? ─no─▶ drop        802.1Q tags, STP, LLDP, everything else by type ─▶ drop
//!    ├─ ARP    the sender is itself: its hardware address, and its own IPv4 address or none
//!    ├─ IPv4   from its own address, or DHCP from none; no answers of a DHCP server
//!    └─ IPv6   link-local or none where the pool gives the addresses; no router advertisements, no DHCPv6 answers
//! ```
//! Without an address of the pool (a network that has its own DHCP server) only hardware addresses are held to.

use super::frame::{
    ETHERNET_BYTES, PROTOCOL_ICMPV6, PROTOCOL_UDP, TYPE_ARP, TYPE_IPV4, TYPE_IPV6, ipv4_at, mac_at, u16_at,
    udp_of,
};
use proto::MacAddress;
use std::net::Ipv4Addr;

/// UDP ports of DHCP: server and client.
pub const DHCP_SERVER: u16 = 67;
pub const DHCP_CLIENT: u16 = 68;

/// The port that DHCPv6 servers send from.
const DHCPV6_SERVER: u16 = 547;

/// The ICMPv6 type of a router advertisement.
const ROUTER_ADVERTISEMENT: u8 = 134;

/// Bytes of an ARP packet, and of the shortest IPv4 header.
const ARP_BYTES: usize = 28;
const IPV4_BYTES: usize = 20;

/// Bytes of an IPv6 header.
const IPV6_BYTES: usize = 40;

/// Who the guest is on this network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Its hardware address.
    pub mac: MacAddress,
    /// Its address out of the pool.
    pub ip: Option<Ipv4Addr>,
}

/// What becomes of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It goes out.
    Pass,
    /// It is a request to the pool's DHCP.
    Dhcp,
    /// It is dropped, for this reason.
    Drop(&'static str),
}

/// Judges a frame that the guest sends.
pub fn judge(frame: &[u8], identity: Identity) -> Verdict {
    let (Some(from), Some(kind)) = (mac_at(frame, 6), u16_at(frame, 12)) else {
        return Verdict::Drop("shorter than a header");
    };
    if from != identity.mac {
        return Verdict::Drop("sent in the name of another card");
    }
    let packet = &frame[ETHERNET_BYTES..];
    let judged = match kind {
        TYPE_ARP => arp(packet, identity),
        TYPE_IPV4 => ipv4(packet, identity.ip),
        TYPE_IPV6 => ipv6(packet, identity.ip),
        _ => Some(Verdict::Drop("neither IP nor ARP")),
    };
    judged.unwrap_or(Verdict::Drop("shorter than its header says"))
}

fn arp(packet: &[u8], identity: Identity) -> Option<Verdict> {
    packet.get(..ARP_BYTES)?;
    let (mac, ip) = (mac_at(packet, 8)?, ipv4_at(packet, 14)?);
    let own_ip = identity.ip.is_none_or(|own| ip == own || ip.is_unspecified());
    Some(if mac == identity.mac && own_ip { Verdict::Pass } else { Verdict::Drop("ARP in another's name") })
}

fn ipv4(packet: &[u8], own: Option<Ipv4Addr>) -> Option<Verdict> {
    packet.get(..IPV4_BYTES)?;
    let from = ipv4_at(packet, 12)?;
    if packet.first()? >> 4 != 4 {
        return Some(Verdict::Drop("no IPv4 inside"));
    }
    if let Some(udp) = udp_of(packet) {
        let (source, destination) = (u16_at(udp, 0)?, u16_at(udp, 2)?);
        if source == DHCP_SERVER {
            return Some(Verdict::Drop("a DHCP server's answer"));
        }
        let from_itself = own.is_some_and(|own| from == own || from.is_unspecified());
        if from_itself && (source, destination) == (DHCP_CLIENT, DHCP_SERVER) {
            return Some(Verdict::Dhcp);
        }
        if own.is_none() && from.is_unspecified() && destination == DHCP_SERVER {
            return Some(Verdict::Pass);
        }
    }
    Some(match own {
        Some(own) if from != own => Verdict::Drop("IPv4 in another's name"),
        _ => Verdict::Pass,
    })
}

fn ipv6(packet: &[u8], own: Option<Ipv4Addr>) -> Option<Verdict> {
    let from = packet.get(8..24)?;
    if packet.first()? >> 4 != 6 {
        return Some(Verdict::Drop("no IPv6 inside"));
    }
    let (next, rest) = (*packet.get(6)?, packet.get(IPV6_BYTES..)?);
    if next == PROTOCOL_ICMPV6 && rest.first() == Some(&ROUTER_ADVERTISEMENT) {
        return Some(Verdict::Drop("a router's advertisement"));
    }
    if next == PROTOCOL_UDP && u16_at(rest, 0) == Some(DHCPV6_SERVER) {
        return Some(Verdict::Drop("a DHCPv6 server's answer"));
    }
    let is_link_local = from[0] == 0xfe && from[1] & 0xc0 == 0x80;
    let is_unspecified = from.iter().all(|byte| *byte == 0);
    Some(if own.is_none() || is_link_local || is_unspecified {
        Verdict::Pass
    } else {
        Verdict::Drop("IPv6 in another's name")
    })
}

#[cfg(test)]
mod tests {
    use super::super::frame::{announcements, ethernet};
    use super::*;

    const MAC: MacAddress = MacAddress([0x0a, 0, 0, 0, 0, 7]);
    const OTHER: MacAddress = MacAddress([0x0a, 0, 0, 0, 0, 8]);
    const IP: Ipv4Addr = Ipv4Addr::new(10, 7, 0, 2);
    const OTHER_IP: Ipv4Addr = Ipv4Addr::new(10, 7, 0, 3);
    const MANAGED: Identity = Identity { mac: MAC, ip: Some(IP) };
    const FREE: Identity = Identity { mac: MAC, ip: None };

    fn udp(mac: MacAddress, from: Ipv4Addr, ports: (u16, u16)) -> Vec<u8> {
        let mut frame = ethernet(OTHER, mac, TYPE_IPV4);
        frame.extend([0x45, 0, 0, 28, 0, 0, 0, 0, 64, PROTOCOL_UDP, 0, 0]);
        frame.extend(from.octets());
        frame.extend([255; 4]);
        frame.extend(ports.0.to_be_bytes());
        frame.extend(ports.1.to_be_bytes());
        frame.extend([0, 8, 0, 0]);
        frame
    }

    fn ipv6(from: [u8; 16], next: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = ethernet(OTHER, MAC, TYPE_IPV6);
        frame.extend([0x60, 0, 0, 0, 0, payload.len() as u8, next, 255]);
        frame.extend(from);
        frame.extend([2; 16]);
        frame.extend(payload);
        frame
    }

    fn drops(frame: &[u8], identity: Identity) -> bool {
        matches!(judge(frame, identity), Verdict::Drop(_))
    }

    #[test]
    fn its_own_traffic_passes() {
        assert_eq!(judge(&udp(MAC, IP, (7, 7)), MANAGED), Verdict::Pass);
        assert_eq!(judge(&udp(MAC, OTHER_IP, (7, 7)), FREE), Verdict::Pass);
        let arp = &announcements(MAC, Some(IP))[1];
        assert_eq!(judge(arp, MANAGED), Verdict::Pass);
        let mut link_local = [0; 16];
        link_local[..2].copy_from_slice(&[0xfe, 0x80]);
        assert_eq!(judge(&ipv6(link_local, 6, &[0; 20]), MANAGED), Verdict::Pass);
    }

    #[test]
    fn anothers_name_is_never_taken() {
        assert!(drops(&udp(OTHER, IP, (7, 7)), MANAGED));
        assert!(drops(&udp(OTHER, IP, (7, 7)), FREE));
        assert!(drops(&udp(MAC, OTHER_IP, (7, 7)), MANAGED));
        assert!(drops(&announcements(MAC, Some(OTHER_IP))[1], MANAGED));
        let mut arp = announcements(MAC, Some(IP))[1].clone();
        arp[22..28].copy_from_slice(&OTHER.0);
        assert!(drops(&arp, MANAGED) && drops(&arp, FREE), "the sender inside is another");
        assert!(drops(&ipv6([0x20; 16], 6, &[0; 20]), MANAGED));
    }

    #[test]
    fn networks_are_not_taken_over() {
        assert!(drops(&udp(MAC, IP, (67, 68)), MANAGED) && drops(&udp(MAC, IP, (67, 68)), FREE));
        let mut link_local = [0; 16];
        link_local[..2].copy_from_slice(&[0xfe, 0x80]);
        assert!(drops(&ipv6(link_local, PROTOCOL_ICMPV6, &[134, 0, 0, 0]), FREE));
        assert!(drops(&ipv6(link_local, PROTOCOL_UDP, &547_u16.to_be_bytes()), FREE));
        for kind in [0x8100, 0x88cc, 0x0026, 0x8847] {
            let mut frame = ethernet(OTHER, MAC, kind);
            frame.extend([0; 46]);
            assert!(drops(&frame, FREE), "{kind:x}");
        }
    }

    #[test]
    fn requests_for_an_address_go_to_the_pool_if_it_gives_addresses() {
        let request = udp(MAC, Ipv4Addr::UNSPECIFIED, (68, 67));
        assert_eq!(judge(&request, MANAGED), Verdict::Dhcp);
        assert_eq!(judge(&request, FREE), Verdict::Pass);
        assert_eq!(judge(&udp(MAC, IP, (68, 67)), MANAGED), Verdict::Dhcp, "a renewal");
        assert!(drops(&udp(MAC, OTHER_IP, (68, 67)), MANAGED));
    }

    #[test]
    fn torn_frames_are_dropped() {
        let mut frames = vec![udp(MAC, IP, (7, 7)), announcements(MAC, Some(IP))[1].clone()];
        frames.push(ipv6([0; 16], 6, &[]));
        for frame in frames {
            let whole = judge(&frame, MANAGED);
            assert_eq!(whole, Verdict::Pass);
            for len in 0..34 {
                assert!(drops(&frame[..len.min(frame.len() - 1)], MANAGED), "{len} of {frame:?}");
            }
        }
    }
}
