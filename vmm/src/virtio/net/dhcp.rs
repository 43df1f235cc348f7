//! The pool's DHCP (RFC 2131), answered by the card itself: it needs no server on any host, goes on while a daemon is away,
//! moves with the VM, and gives out one address, which the pool has chosen.
//!
//! ```text
//!  DISCOVER ─▶ OFFER      REQUEST of the address ─▶ ACK     of another ─▶ NAK      INFORM ─▶ ACK without an address
//! ```

use super::frame::{
    ETHERNET_BYTES, PROTOCOL_UDP, TYPE_IPV4, checksum, ethernet, ipv4_at, mac_at, u16_at, udp_of,
};
use super::guard::{DHCP_CLIENT, DHCP_SERVER};
use proto::{Ipv4Subnet, MacAddress};
use std::net::Ipv4Addr;

/// The hardware address that answers come from; no card of the pool has it, for their numbers begin at 1.
const SERVER_MAC: MacAddress = MacAddress([0x0a, 0, 0, 0, 0, 0]);

/// How long an address is given for, in seconds: it is the VM's for good, so this only sets how often a guest asks.
const LEASE_SECONDS: u32 = 24 * 3600;

/// Name servers that fit into an answer.
pub const DNS_MAX: usize = 4;

/// Bytes of a BOOTP message before its options.
const BOOTP_BYTES: usize = 236;
const COOKIE: [u8; 4] = [99, 130, 83, 99];

const OPTION_PAD: u8 = 0;
const OPTION_MASK: u8 = 1;
const OPTION_ROUTER: u8 = 3;
const OPTION_DNS: u8 = 6;
const OPTION_HOST_NAME: u8 = 12;
const OPTION_REQUESTED: u8 = 50;
const OPTION_LEASE_TIME: u8 = 51;
const OPTION_KIND: u8 = 53;
const OPTION_SERVER: u8 = 54;
const OPTION_END: u8 = 255;

const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;
const NAK: u8 = 6;
const INFORM: u8 = 8;

/// What a guest is told of its network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Addressing {
    /// Its address.
    pub ip: Ipv4Addr,
    /// The network around it.
    pub subnet: Ipv4Subnet,
    /// The way out, if there is one.
    pub gateway: Option<Ipv4Addr>,
    /// Name servers.
    pub dns: Vec<Ipv4Addr>,
    /// The name of the VM.
    pub host_name: String,
}

impl Addressing {
    /// The address that answers come from: the gateway's, else the network's first.
    fn server(&self) -> Ipv4Addr {
        self.gateway.or_else(|| self.subnet.hosts().next()).unwrap_or(self.ip)
    }
}

/// A request, as far as it matters.
struct Request<'a> {
    message: &'a [u8],
    kind: u8,
    /// The address that the client speaks of.
    wanted: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
}

/// The answer to a frame that the guard took for a request; none when it deserves none.
pub fn answer(frame: &[u8], mac: MacAddress, addressing: &Addressing) -> Option<Vec<u8>> {
    let request = parse(frame, mac)?;
    let kind = match request.kind {
        DISCOVER => OFFER,
        // Meant for another server, which the guest has heard elsewhere: it must not be confirmed.
        REQUEST if request.server.is_some_and(|server| server != addressing.server()) => return None,
        REQUEST if request.wanted == Some(addressing.ip) => ACK,
        REQUEST => NAK,
        INFORM => ACK,
        _ => return None,
    };
    let given = if matches!((request.kind, kind), (INFORM, _) | (_, NAK)) {
        Ipv4Addr::UNSPECIFIED
    } else {
        addressing.ip
    };
    let mut message = request.message[..BOOTP_BYTES].to_vec();
    // A reply; hops and seconds are zero; the transaction, the flags and the client's hardware address stay.
    message[0] = 2;
    message[3] = 0;
    message[8..10].fill(0);
    message[12..28].fill(0);
    message[16..20].copy_from_slice(&given.octets());
    message[44..BOOTP_BYTES].fill(0);
    message.extend(COOKIE);
    message.extend(options(kind, request.kind, addressing));
    Some(envelope(mac, addressing.server(), &message))
}

fn parse(frame: &[u8], mac: MacAddress) -> Option<Request<'_>> {
    let udp = udp_of(frame.get(ETHERNET_BYTES..)?)?;
    let len = usize::from(u16_at(udp, 4)?);
    let message = udp.get(8..len.min(udp.len()))?;
    let mut options = message.get(BOOTP_BYTES..)?.strip_prefix(&COOKIE)?;
    // A request over Ethernet, of this card.
    if message[0] != 1 || message[1] != 1 || mac_at(message, 28) != Some(mac) {
        return None;
    }
    let renewing = ipv4_at(message, 12).filter(|ip| !ip.is_unspecified());
    let mut request = Request { message, kind: 0, wanted: renewing, server: None };
    while let [code, rest @ ..] = options {
        match *code {
            OPTION_PAD => options = rest,
            OPTION_END => break,
            code => {
                let (len, rest) = rest.split_first()?;
                let (value, rest) = rest.split_at_checked(usize::from(*len))?;
                match code {
                    OPTION_KIND => request.kind = *value.first()?,
                    OPTION_REQUESTED => request.wanted = ipv4_at(value, 0),
                    OPTION_SERVER => request.server = ipv4_at(value, 0),
                    _ => {}
                }
                options = rest;
            }
        }
    }
    Some(request)
}

fn options(kind: u8, asked: u8, addressing: &Addressing) -> Vec<u8> {
    let mut options = Vec::new();
    let mut put = |code: u8, value: &[u8]| {
        // An option's length is a byte.
        let value = &value[..value.len().min(255)];
        options.push(code);
        options.push(value.len() as u8);
        options.extend(value);
    };
    put(OPTION_KIND, &[kind]);
    put(OPTION_SERVER, &addressing.server().octets());
    if kind != NAK {
        if asked != INFORM {
            put(OPTION_LEASE_TIME, &LEASE_SECONDS.to_be_bytes());
        }
        put(OPTION_MASK, &addressing.subnet.mask().octets());
        if let Some(gateway) = addressing.gateway {
            put(OPTION_ROUTER, &gateway.octets());
        }
        if !addressing.dns.is_empty() {
            let servers: Vec<u8> = addressing.dns.iter().take(DNS_MAX).flat_map(Ipv4Addr::octets).collect();
            put(OPTION_DNS, &servers);
        }
        if !addressing.host_name.is_empty() {
            put(OPTION_HOST_NAME, addressing.host_name.as_bytes());
        }
    }
    options.push(OPTION_END);
    options
}

/// The message in UDP, IPv4 and Ethernet, to the card and to every address.
fn envelope(mac: MacAddress, from: Ipv4Addr, message: &[u8]) -> Vec<u8> {
    let udp_len = u16::try_from(8 + message.len()).expect("an answer is a few hundred bytes");
    let mut udp = Vec::from(DHCP_SERVER.to_be_bytes());
    udp.extend(DHCP_CLIENT.to_be_bytes());
    udp.extend(udp_len.to_be_bytes());
    udp.extend([0, 0]);
    udp.extend(message);
    let mut ip = vec![0x45, 0];
    ip.extend((20 + udp_len).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, PROTOCOL_UDP, 0, 0]);
    ip.extend(from.octets());
    ip.extend(Ipv4Addr::BROADCAST.octets());
    let sum = checksum(&[&ip]);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let pseudo = [0, PROTOCOL_UDP];
    let sum = checksum(&[&ip[12..20], &pseudo, &udp_len.to_be_bytes(), &udp]);
    // Zero would mean that there is none.
    udp[6..8].copy_from_slice(&if sum == 0 { 0xffff } else { sum }.to_be_bytes());
    let mut frame = ethernet(mac, SERVER_MAC, TYPE_IPV4);
    frame.extend(ip);
    frame.extend(udp);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: MacAddress = MacAddress([0x0a, 0, 0, 0, 0, 7]);
    const IP: Ipv4Addr = Ipv4Addr::new(10, 7, 0, 2);

    fn addressing() -> Addressing {
        Addressing {
            ip: IP,
            subnet: "10.7.0.0/24".parse().unwrap(),
            gateway: Some(Ipv4Addr::new(10, 7, 0, 1)),
            dns: vec![Ipv4Addr::new(9, 9, 9, 9)],
            host_name: "web1".to_owned(),
        }
    }

    fn request(kind: u8, more: &[u8]) -> Vec<u8> {
        let mut message = vec![1, 1, 6, 0, 0xca, 0xfe, 0xba, 0xbe, 0, 9, 0x80, 0];
        message.resize(28, 0);
        message.extend(MAC.0);
        message.resize(BOOTP_BYTES, 0);
        message.extend(COOKIE);
        message.extend([OPTION_PAD, OPTION_KIND, 1, kind]);
        message.extend(more);
        message.push(OPTION_END);
        let mut frame = envelope(MacAddress([0xff; 6]), Ipv4Addr::UNSPECIFIED, &message);
        // Client to server.
        frame[34..38].copy_from_slice(&[0, 68, 0, 67]);
        frame
    }

    /// The options of an answer, and the address that it gives.
    fn read(answer: &[u8]) -> (Ipv4Addr, Vec<(u8, Vec<u8>)>) {
        let message = &answer[ETHERNET_BYTES + 28..];
        assert_eq!((message[0], &message[4..8]), (2, &[0xca, 0xfe, 0xba, 0xbe][..]));
        let mut options = message[BOOTP_BYTES..].strip_prefix(&COOKIE).unwrap();
        let mut found = Vec::new();
        while options[0] != OPTION_END {
            let (value, rest) = options[2..].split_at(usize::from(options[1]));
            found.push((options[0], value.to_vec()));
            options = rest;
        }
        (ipv4_at(message, 16).unwrap(), found)
    }

    #[test]
    fn a_guest_is_offered_and_then_given_its_address_with_all_it_needs() {
        let offer = answer(&request(DISCOVER, &[]), MAC, &addressing()).unwrap();
        let (given, options) = read(&offer);
        assert_eq!(given, IP);
        assert!(options.contains(&(OPTION_KIND, vec![OFFER])));
        let wanted = [&[OPTION_REQUESTED, 4][..], &IP.octets(), &[OPTION_SERVER, 4, 10, 7, 0, 1]].concat();
        let (given, options) = read(&answer(&request(REQUEST, &wanted), MAC, &addressing()).unwrap());
        assert_eq!(given, IP);
        for expected in [
            (OPTION_KIND, vec![ACK]),
            (OPTION_MASK, vec![255, 255, 255, 0]),
            (OPTION_ROUTER, vec![10, 7, 0, 1]),
            (OPTION_DNS, vec![9, 9, 9, 9]),
            (OPTION_HOST_NAME, b"web1".to_vec()),
        ] {
            assert!(options.contains(&expected), "{expected:?} in {options:?}");
        }
    }

    #[test]
    fn sums_of_an_answer_are_right() {
        let offer = answer(&request(DISCOVER, &[]), MAC, &addressing()).unwrap();
        let (ip, udp) = offer[ETHERNET_BYTES..].split_at(20);
        assert_eq!(checksum(&[ip]), 0);
        let len = u16::try_from(udp.len()).unwrap().to_be_bytes();
        assert_eq!(checksum(&[&ip[12..20], &[0, PROTOCOL_UDP], &len, udp]), 0);
        assert_eq!(u16_at(ip, 2).map(usize::from), Some(offer.len() - ETHERNET_BYTES));
    }

    #[test]
    fn another_address_is_refused_and_another_server_not_answered() {
        let other = [OPTION_REQUESTED, 4, 10, 7, 0, 9];
        let (given, options) = read(&answer(&request(REQUEST, &other), MAC, &addressing()).unwrap());
        assert_eq!((given, options[0].clone()), (Ipv4Addr::UNSPECIFIED, (OPTION_KIND, vec![NAK])));
        let elsewhere = [OPTION_SERVER, 4, 10, 7, 0, 9];
        assert_eq!(answer(&request(REQUEST, &elsewhere), MAC, &addressing()), None);
        assert_eq!(answer(&request(7, &[]), MAC, &addressing()), None, "a release");
    }

    #[test]
    fn what_is_torn_or_of_another_card_gets_no_answer() {
        let frame = request(DISCOVER, &[]);
        assert_eq!(answer(&frame, MacAddress([1; 6]), &addressing()), None);
        for len in 0..frame.len() - 4 {
            assert_eq!(answer(&frame[..len], MAC, &addressing()), None, "{len}");
        }
        let torn = request(DISCOVER, &[OPTION_REQUESTED, 200]);
        assert_eq!(answer(&torn, MAC, &addressing()), None);
    }

    proptest::proptest! {
        #[test]
        fn no_frame_panics(mut frame in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..400), kind: u8) {
            let _ = answer(&frame, MAC, &addressing());
            let whole = request(kind, &frame);
            let _ = answer(&whole, MAC, &addressing());
            let len = frame.len().min(42);
            frame[..len].copy_from_slice(&whole[..len]);
            let _ = answer(&frame, MAC, &addressing());
        }
    }
}
