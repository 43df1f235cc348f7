//! Networks and network cards.

use super::words;
use crate::output::Object;
use proto::{NetworkId, v1};
use serde::Serialize;

/// A network.
#[derive(Debug, Serialize)]
pub struct NetworkView {
    id: String,
    name: String,
    kind: String,
    bridge: String,
    uplink: String,
    vlan: u32,
    subnet: String,
    gateway: String,
    dns: Vec<String>,
    vms: Vec<String>,
    revision: u64,
}

impl From<v1::Network> for NetworkView {
    fn from(network: v1::Network) -> Self {
        Self {
            id: NetworkId(network.id).to_string(),
            name: network.name,
            kind: network.kind,
            bridge: network.bridge,
            uplink: network.uplink,
            vlan: network.vlan,
            subnet: network.subnet,
            gateway: network.gateway,
            dns: network.dns,
            vms: network.vms,
            revision: network.revision,
        }
    }
}

impl NetworkView {
    /// What carries it, for people.
    fn link(&self) -> String {
        match self.kind.as_str() {
            "bridge" => format!("bridge {}", self.bridge),
            "vlan" => format!("vlan {} on {}", self.vlan, self.uplink),
            kind => kind.to_owned(),
        }
    }
}

impl Object for NetworkView {
    const KIND: &'static str = "Network";
    const COLUMNS: &'static [&'static str] = &["NAME", "LINK", "SUBNET", "GATEWAY", "VMS"];
    const WIDE: &'static [&'static str] = &["ID", "DNS"];

    fn name(&self) -> String {
        self.name.clone()
    }

    fn cells(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            self.link(),
            self.subnet.clone(),
            self.gateway.clone(),
            words(&self.vms),
            self.id.clone(),
            words(&self.dns),
        ]
    }
}

/// A network card of a VM.
#[derive(Debug, Serialize)]
pub struct NicView {
    network: String,
    mac: String,
    ip: String,
}

impl From<v1::Nic> for NicView {
    fn from(nic: v1::Nic) -> Self {
        Self { network: nic.network, mac: nic.mac, ip: nic.ip }
    }
}

impl NicView {
    /// `lan 10.7.0.2 0a:…`, without the address that the pool does not give.
    pub fn text(&self) -> String {
        let parts = [&self.network, &self.ip, &self.mac];
        parts.into_iter().filter(|part| !part.is_empty()).cloned().collect::<Vec<_>>().join(" ")
    }
}
