//! Ethernet frames: what the device must understand of those that pass, and those that it makes itself.

use proto::MacAddress;
use std::net::Ipv4Addr;

/// Bytes of an Ethernet header: two addresses and a type.
pub const ETHERNET_BYTES: usize = 14;

/// The address of all.
pub const BROADCAST: MacAddress = MacAddress([0xff; 6]);

pub const TYPE_IPV4: u16 = 0x0800;
pub const TYPE_ARP: u16 = 0x0806;
pub const TYPE_RARP: u16 = 0x8035;
pub const TYPE_IPV6: u16 = 0x86dd;

/// Numbers of protocols in IP headers.
pub const PROTOCOL_UDP: u8 = 17;
pub const PROTOCOL_ICMPV6: u8 = 58;

/// Bytes of an ARP packet for IPv4 on Ethernet, and of its fixed beginning.
const ARP_BYTES: usize = 28;
const ARP_HEAD: [u8; 6] = [0, 1, 8, 0, 6, 4];

/// A 16-bit number in network order; none beyond the end.
pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let pair = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes([pair[0], pair[1]]))
}

/// An IPv4 address; none beyond the end.
pub fn ipv4_at(bytes: &[u8], at: usize) -> Option<Ipv4Addr> {
    let four = bytes.get(at..at.checked_add(4)?)?;
    Some(Ipv4Addr::new(four[0], four[1], four[2], four[3]))
}

/// A hardware address; none beyond the end.
pub fn mac_at(bytes: &[u8], at: usize) -> Option<MacAddress> {
    bytes.get(at..at.checked_add(6)?)?.try_into().ok().map(MacAddress)
}

/// The UDP header and payload of an IPv4 packet; none when it is no unfragmented UDP.
pub fn udp_of(packet: &[u8]) -> Option<&[u8]> {
    let header = usize::from(*packet.first()? & 0xf) * 4;
    let fragment = u16_at(packet, 6)? & 0x3fff;
    let is_udp = *packet.get(9)? == PROTOCOL_UDP;
    if is_udp && fragment == 0 && header >= 20 { packet.get(header..) } else { None }
}

/// An Ethernet header.
pub fn ethernet(to: MacAddress, from: MacAddress, kind: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(ETHERNET_BYTES + ARP_BYTES);
    frame.extend(to.0);
    frame.extend(from.0);
    frame.extend(kind.to_be_bytes());
    frame
}

fn arp_frame(kind: u16, operation: u16, mac: MacAddress, ip: Ipv4Addr) -> Vec<u8> {
    let mut frame = ethernet(BROADCAST, mac, kind);
    frame.extend(ARP_HEAD);
    frame.extend(operation.to_be_bytes());
    for _ in 0..2 {
        frame.extend(mac.0);
        frame.extend(ip.octets());
    }
    frame
}

/// What tells every switch on the way where a card is now: a reverse ARP request, which no host answers (QEMU does the same),
/// and for a known address a gratuitous ARP request.
pub fn announcements(mac: MacAddress, ip: Option<Ipv4Addr>) -> Vec<Vec<u8>> {
    const REVERSE_REQUEST: u16 = 3;
    const REQUEST: u16 = 1;
    let reverse = arp_frame(TYPE_RARP, REVERSE_REQUEST, mac, Ipv4Addr::UNSPECIFIED);
    let gratuitous = ip.map(|ip| arp_frame(TYPE_ARP, REQUEST, mac, ip));
    std::iter::once(reverse).chain(gratuitous).collect()
}

/// The sum that IPv4 headers and UDP carry (RFC 1071), over all parts.
pub fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u32;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
        // Folded for each part: parts are at most 64 KiB long.
        sum = (sum & 0xffff) + (sum >> 16);
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // Masked to 16 bits above.
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announcements_come_from_the_card_and_go_to_all() {
        let mac = MacAddress([0x0a, 1, 2, 3, 4, 5]);
        let frames = announcements(mac, Some(Ipv4Addr::new(10, 7, 0, 2)));
        assert_eq!(frames.len(), 2);
        for frame in &frames {
            assert_eq!((mac_at(frame, 0), mac_at(frame, 6)), (Some(BROADCAST), Some(mac)));
            assert_eq!(frame.len(), ETHERNET_BYTES + ARP_BYTES);
        }
        assert_eq!((u16_at(&frames[0], 12), u16_at(&frames[1], 12)), (Some(TYPE_RARP), Some(TYPE_ARP)));
        // Sender and target of a gratuitous request are the same.
        assert_eq!(ipv4_at(&frames[1], 28), ipv4_at(&frames[1], 38));
        assert_eq!(announcements(mac, None).len(), 1);
    }

    #[test]
    fn a_header_with_its_checksum_sums_to_zero() {
        let mut header = [0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 10, 7, 0, 1, 10, 7, 0, 2];
        let sum = checksum(&[&header]);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(checksum(&[&header]), 0);
    }

    #[test]
    fn only_whole_udp_packets_are_taken_for_udp() {
        let mut packet =
            vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 0, 68, 0, 67, 0, 8, 0, 0];
        assert_eq!(udp_of(&packet).map(<[u8]>::len), Some(8));
        packet[7] = 1;
        assert_eq!(udp_of(&packet), None, "a fragment");
        packet[7] = 0;
        packet[0] = 0x44;
        assert_eq!(udp_of(&packet), None, "a header that is too short");
        packet[0] = 0x4f;
        assert_eq!(udp_of(&packet), None, "a header beyond the end");
        for len in 0..28 {
            // No length panics.
            let _ = udp_of(&packet[..len]);
        }
    }
}
