//! Networks that VMs are on, and their cards.

use proto::{Ipv4Subnet, MacAddress, NetworkId};
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;

/// A network: the same on every host of the pool, so that a VM keeps its place in it wherever it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Index of the entry that created it.
    pub id: NetworkId,
    /// Unique among networks.
    pub name: String,
    /// What carries its frames at each host.
    pub link: NetworkLink,
    /// Addresses that the pool gives; none where the network has its own DHCP server.
    pub addressing: Option<NetworkAddressing>,
}

/// What carries the frames of a network at each host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum NetworkLink {
    /// A bridge that every host has already.
    Bridge {
        /// Its name.
        bridge: String,
    },
    /// A bridge of the pool's own over a VLAN of a network interface that every host has.
    Vlan {
        /// The interface.
        uplink: String,
        /// The tag.
        vlan: u16,
    },
    /// A bridge of the pool's own at each host, with the gateway on it, behind the host's address: for a lab. It reaches out
    /// and not from host to host.
    Nat,
}

/// The addresses of a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkAddressing {
    /// All of them.
    pub subnet: Ipv4Subnet,
    /// The way out, if there is one.
    pub gateway: Option<Ipv4Addr>,
    /// Name servers.
    pub dns: Vec<Ipv4Addr>,
}

/// A network card of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// What it is on.
    pub network: NetworkId,
    /// Unique in the pool, and locally administered.
    pub mac: MacAddress,
    /// Its address, where the pool gives them.
    pub ip: Option<Ipv4Addr>,
}

impl NetworkLink {
    /// The word that operators see.
    #[must_use]
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Bridge { .. } => "bridge",
            Self::Vlan { .. } => "vlan",
            Self::Nat => "nat",
        }
    }
}
