//! Addresses of networks as operators write them: hardware addresses and IPv4 subnets.

use serde::{Deserialize, Serialize};
use std::{fmt, net::Ipv4Addr, str::FromStr};

/// Bytes of a hardware address.
pub const MAC_BYTES: usize = 6;

/// The hardware address of a network card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MacAddress(pub [u8; MAC_BYTES]);

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            write!(f, "{}{byte:02x}", if index > 0 { ":" } else { "" })?;
        }
        Ok(())
    }
}

/// A run of IPv4 addresses: the network's address and the number of leading bits that are the same in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Ipv4Subnet {
    network: u32,
    prefix_len: u8,
}

/// The text is no subnet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is no IPv4 subnet; write an address and a number of bits from 8 to 30, such as 10.7.0.0/24"
)]
pub struct ParseSubnetError {
    /// What was given.
    pub text: String,
}

impl Ipv4Subnet {
    /// Fewest leading bits: larger networks than this are a mistake.
    pub const PREFIX_MIN: u8 = 8;
    /// Most leading bits that leave room for a gateway and a guest.
    pub const PREFIX_MAX: u8 = 30;

    /// The subnet that an address lies in; none when the number of bits makes no sense.
    #[must_use]
    pub fn of(address: Ipv4Addr, prefix_len: u8) -> Option<Self> {
        let fits = (Self::PREFIX_MIN..=Self::PREFIX_MAX).contains(&prefix_len);
        fits.then(|| Self { network: address.to_bits() & mask(prefix_len), prefix_len })
    }

    /// Number of leading bits.
    #[must_use]
    pub fn prefix_len(self) -> u8 {
        self.prefix_len
    }

    /// The mask as an address.
    #[must_use]
    pub fn mask(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(mask(self.prefix_len))
    }

    /// Addresses that a host may have, ascending: without the network's own and the one that means all.
    pub fn hosts(self) -> impl Iterator<Item = Ipv4Addr> {
        let last = self.network | !mask(self.prefix_len);
        (self.network + 1..last).map(Ipv4Addr::from_bits)
    }

    /// Whether a host in it may have this address.
    #[must_use]
    pub fn contains_host(self, address: Ipv4Addr) -> bool {
        let bits = address.to_bits();
        let own = bits & mask(self.prefix_len) == self.network;
        own && bits != self.network && bits != self.network | !mask(self.prefix_len)
    }
}

fn mask(prefix_len: u8) -> u32 {
    u32::MAX << (32 - u32::from(prefix_len))
}

impl fmt::Display for Ipv4Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from_bits(self.network), self.prefix_len)
    }
}

impl FromStr for Ipv4Subnet {
    type Err = ParseSubnetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed = || {
            let (address, bits) = text.split_once('/')?;
            Self::of(address.parse().ok()?, bits.parse().ok()?)
        };
        parsed().ok_or_else(|| ParseSubnetError { text: text.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subnet_is_read_with_its_host_bits_cleared_and_names_its_hosts() {
        let subnet: Ipv4Subnet = "10.7.0.9/29".parse().unwrap();
        assert_eq!(subnet.to_string(), "10.7.0.8/29");
        assert_eq!(subnet.mask(), Ipv4Addr::new(255, 255, 255, 248));
        let hosts: Vec<_> = subnet.hosts().map(|host| host.octets()[3]).collect();
        assert_eq!(hosts, [9, 10, 11, 12, 13, 14]);
        for (last, inside) in [(8, false), (9, true), (14, true), (15, false), (16, false)] {
            assert_eq!(subnet.contains_host(Ipv4Addr::new(10, 7, 0, last)), inside, "{last}");
        }
    }

    #[test]
    fn what_is_no_subnet_is_refused() {
        for bad in ["", "10.7.0.0", "10.7.0.0/31", "10.7.0.0/7", "10.7.0/24", "10.7.0.0/x", "fd00::/64"] {
            assert!(bad.parse::<Ipv4Subnet>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_hardware_address_prints_with_colons() {
        assert_eq!(MacAddress([0x0a, 0, 1, 2, 0xff, 9]).to_string(), "0a:00:01:02:ff:09");
    }
}
