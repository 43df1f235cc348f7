//! Why a change of networks or cards was refused.

use super::RejectionClass;
use proto::Ipv4Subnet;
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;

/// A network or a card can't be as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum NetworkRejection {
    /// The kernel takes no such name for an interface.
    #[error("`{name}` is no name of a network interface")]
    BadInterface {
        /// As given.
        name: String,
    },
    /// No such tag.
    #[error("VLAN {vlan} is not within 1 to 4094")]
    BadVlan {
        /// As given.
        vlan: u16,
    },
    /// NAT gives addresses, so it needs some.
    #[error("a network behind NAT needs a subnet")]
    NatWithoutSubnet,
    /// The gateway must be reachable without a gateway.
    #[error("gateway {gateway} is no host address of {subnet}")]
    GatewayOutside {
        /// As given.
        gateway: Ipv4Addr,
        /// Where it should be.
        subnet: Ipv4Subnet,
    },
    /// More name servers than fit into an answer of DHCP.
    #[error("{count} name servers are more than {max}")]
    TooManyDns {
        /// As given.
        count: u64,
        /// The limit.
        max: u64,
    },
    /// Another network is carried by the same.
    #[error("network {network} is already {link}")]
    LinkTaken {
        /// Which.
        network: String,
        /// By what it is carried.
        link: String,
    },
    /// VMs have cards on it.
    #[error("network {network} is in use by vm {vm}")]
    InUse {
        /// Which.
        network: String,
        /// One of them.
        vm: String,
    },
    /// All addresses are given away.
    #[error("network {network} has no free address in {subnet}")]
    NoFreeAddress {
        /// Which.
        network: String,
        /// Its subnet.
        subnet: Ipv4Subnet,
    },
    /// More cards than a VM may have.
    #[error("{count} network cards are more than {max}")]
    TooManyCards {
        /// As given.
        count: u64,
        /// The limit.
        max: u64,
    },
}

impl NetworkRejection {
    /// A stable code for programs.
    #[must_use]
    pub fn reason_code(&self) -> &'static str {
        match self {
            Self::BadInterface { .. } => "BAD_INTERFACE",
            Self::BadVlan { .. } => "BAD_VLAN",
            Self::NatWithoutSubnet => "NAT_WITHOUT_SUBNET",
            Self::GatewayOutside { .. } => "GATEWAY_OUTSIDE",
            Self::TooManyDns { .. } => "TOO_MANY_DNS",
            Self::LinkTaken { .. } => "LINK_TAKEN",
            Self::InUse { .. } => "NETWORK_IN_USE",
            Self::NoFreeAddress { .. } => "NO_FREE_ADDRESS",
            Self::TooManyCards { .. } => "TOO_MANY_CARDS",
        }
    }

    /// What kind of refusal it is.
    #[must_use]
    pub fn class(&self) -> RejectionClass {
        match self {
            Self::InUse { .. } | Self::NoFreeAddress { .. } | Self::LinkTaken { .. } => {
                RejectionClass::Precondition
            }
            _ => RejectionClass::Invalid,
        }
    }

    /// The object that it is about; empty when that is not there yet.
    #[must_use]
    pub fn object(&self) -> String {
        match self {
            Self::InUse { network, .. }
            | Self::NoFreeAddress { network, .. }
            | Self::LinkTaken { network, .. } => format!("network {network}"),
            _ => String::new(),
        }
    }

    /// What to do next.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::BadInterface { .. } => "use 1 to 15 of a-z A-Z 0-9 . _ -, as `ip link` shows it".into(),
            Self::BadVlan { .. } => "choose a tag from 1 to 4094".into(),
            Self::NatWithoutSubnet => "name one, such as `--nat 10.7.0.0/24`".into(),
            Self::GatewayOutside { .. } => "choose a gateway inside of the subnet".into(),
            Self::TooManyDns { max, .. } => format!("name at most {max}"),
            Self::LinkTaken { network, .. } => format!("use it: `poolctl net show {network}`"),
            Self::InUse { vm, .. } => format!("delete the VM first: `poolctl vm delete {vm}`"),
            Self::NoFreeAddress { .. } => "delete VMs that are not needed, or make a larger network".into(),
            Self::TooManyCards { max, .. } => format!("give it at most {max}"),
        }
    }
}
