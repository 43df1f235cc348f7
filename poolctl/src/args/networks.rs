//! Commands of networks.

use clap::{Args, Subcommand};
use proto::Ipv4Subnet;
use std::net::Ipv4Addr;

/// `poolctl net …`
#[derive(Debug, Subcommand)]
pub enum NetCommand {
    /// Makes a network, the same on every host
    Create(NetArguments),
    /// All networks
    List,
    /// One network
    Show {
        /// The network
        network: String,
    },
    /// Deletes a network that no VM is on
    Delete {
        /// The network
        network: String,
    },
}

/// A network to be.
#[derive(Debug, Args)]
pub struct NetArguments {
    /// Its name
    pub name: String,
    /// What carries it
    #[command(flatten)]
    pub link: LinkArguments,
    /// The interface that carries the VLAN at every host
    #[arg(long, value_name = "INTERFACE", requires = "vlan")]
    pub uplink: Option<String>,
    /// Addresses that the pool gives by DHCP [default: none, the network has a DHCP server of its own]
    #[arg(long, value_name = "CIDR", conflicts_with = "nat")]
    pub subnet: Option<Ipv4Subnet>,
    /// The way out [default: none; with --nat the first address]
    #[arg(long, value_name = "IP")]
    pub gateway: Option<Ipv4Addr>,
    /// A name server that guests are told of; may be repeated
    #[arg(long, value_name = "IP")]
    pub dns: Vec<Ipv4Addr>,
}

/// What carries a network.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct LinkArguments {
    /// A bridge that every host has
    #[arg(long, value_name = "BRIDGE")]
    pub bridge: Option<String>,
    /// A VLAN, over --uplink
    #[arg(long, value_name = "ID", requires = "uplink", value_parser = clap::value_parser!(u16).range(1..4095))]
    pub vlan: Option<u16>,
    /// For a lab: addresses behind each host's own
    #[arg(long, value_name = "CIDR")]
    pub nat: Option<Ipv4Subnet>,
}
