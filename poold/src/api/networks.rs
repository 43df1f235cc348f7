//! Service `NetworkService`.

use super::views;
use crate::{api::require_user, node::NodeContext};
use pool_state::{
    Command, Outcome, PoolState,
    command::CreateNetwork,
    state::{Network, NetworkAddressing, NetworkLink, Nic},
};
use proto::v1::{
    self, CreateNetworkRequest, DeleteNetworkRequest, ListNetworksRequest, ListNetworksResponse, NetworkRef,
    network_service_server::NetworkService,
};
use std::{fmt::Display, net::Ipv4Addr, str::FromStr};
use tonic::{Request, Response, Status};

/// gRPC service `NetworkService`.
pub struct NetworkApi {
    context: NodeContext,
}

impl NetworkApi {
    /// The service of this host.
    pub fn new(context: NodeContext) -> Self {
        Self { context }
    }
}

/// A network as a message.
pub fn network(state: &PoolState, network: &Network) -> v1::Network {
    let on_it = |vm: &&pool_state::state::Vm| vm.spec.nics.iter().any(|nic| nic.network == network.id);
    let mut view = v1::Network {
        id: network.id.0,
        name: network.name.clone(),
        kind: network.link.as_str().to_owned(),
        vms: state.vms.values().filter(on_it).map(|vm| vm.name.clone()).collect(),
        revision: state.revision,
        ..v1::Network::default()
    };
    match &network.link {
        NetworkLink::Bridge { bridge } => view.bridge.clone_from(bridge),
        NetworkLink::Vlan { uplink, vlan } => {
            view.uplink.clone_from(uplink);
            view.vlan = (*vlan).into();
        }
        NetworkLink::Nat => {}
    }
    if let Some(addressing) = &network.addressing {
        view.subnet = addressing.subnet.to_string();
        view.gateway = addressing.gateway.map(|gateway| gateway.to_string()).unwrap_or_default();
        view.dns = addressing.dns.iter().map(Ipv4Addr::to_string).collect();
    }
    view
}

/// A card as a message.
pub fn nic(state: &PoolState, nic: &Nic) -> v1::Nic {
    let network = state.networks.get(&nic.network).map(|network| network.name.clone());
    v1::Nic {
        network: network.unwrap_or_else(|| nic.network.to_string()),
        mac: nic.mac.to_string(),
        ip: nic.ip.map(|ip| ip.to_string()).unwrap_or_default(),
    }
}

fn parse<T: FromStr<Err: Display>>(what: &str, text: &str) -> Result<T, Status> {
    text.parse().map_err(|error| Status::invalid_argument(format!("{what} `{text}`: {error}")))
}

fn create_command(request: CreateNetworkRequest) -> Result<Command, Status> {
    let vlan = u16::try_from(request.vlan)
        .map_err(|_| Status::invalid_argument(format!("VLAN {} is not within 1 to 4094", request.vlan)))?;
    let link = match (request.bridge.as_str(), vlan, request.nat) {
        ("", 0, true) => NetworkLink::Nat,
        ("", vlan, false) if vlan != 0 => NetworkLink::Vlan { uplink: request.uplink, vlan },
        (bridge, 0, false) if !bridge.is_empty() => NetworkLink::Bridge { bridge: bridge.to_owned() },
        _ => {
            let text = "a network needs exactly one of a bridge, a VLAN with its uplink, and NAT";
            return Err(Status::invalid_argument(text));
        }
    };
    let addressing = if request.subnet.is_empty() {
        if !request.gateway.is_empty() || !request.dns.is_empty() {
            return Err(Status::invalid_argument("a gateway or a name server needs a subnet"));
        }
        None
    } else {
        let gateway =
            if request.gateway.is_empty() { None } else { Some(parse("gateway", &request.gateway)?) };
        let dns = request.dns.iter().map(|server| parse("name server", server)).collect::<Result<_, _>>()?;
        Some(NetworkAddressing { subnet: parse("subnet", &request.subnet)?, gateway, dns })
    };
    Ok(Command::CreateNetwork(CreateNetwork { name: request.name, link, addressing }))
}

#[tonic::async_trait]
impl NetworkService for NetworkApi {
    async fn create(&self, request: Request<CreateNetworkRequest>) -> Result<Response<v1::Network>, Status> {
        let principal = require_user(&request)?;
        let mut request = request.into_inner();
        let meta = request.meta.take();
        let command = create_command(request)?;
        let (outcome, state) = self.context.change(&principal, meta, command).await?;
        let Outcome::Network(id) = outcome else { return Err(views::unexpected(outcome)) };
        Ok(Response::new(network(&state, views::found(state.network(id))?)))
    }

    async fn list(
        &self,
        request: Request<ListNetworksRequest>,
    ) -> Result<Response<ListNetworksResponse>, Status> {
        require_user(&request)?;
        let state = self.context.fresh().await;
        let networks = state.networks.values().map(|found| network(&state, found)).collect();
        Ok(Response::new(ListNetworksResponse { revision: state.revision, networks }))
    }

    async fn show(&self, request: Request<NetworkRef>) -> Result<Response<v1::Network>, Status> {
        require_user(&request)?;
        let state = self.context.fresh().await;
        let found = views::found(state.resolve_network(&request.get_ref().r#ref))?;
        Ok(Response::new(network(&state, found)))
    }

    async fn delete(&self, request: Request<DeleteNetworkRequest>) -> Result<Response<v1::Network>, Status> {
        let principal = require_user(&request)?;
        let DeleteNetworkRequest { meta, network: name } = request.into_inner();
        let before = self.context.read().await?;
        let Some(found) = views::to_delete(&before, meta.as_ref(), before.resolve_network(&name))? else {
            return Ok(Response::new(v1::Network { name, ..v1::Network::default() }));
        };
        let view = network(&before, found);
        self.context.change(&principal, meta, Command::DeleteNetwork { network: found.id }).await?;
        Ok(Response::new(view))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> CreateNetworkRequest {
        CreateNetworkRequest { name: "lan".to_owned(), ..CreateNetworkRequest::default() }
    }

    #[test]
    fn exactly_one_kind_of_link_is_taken() {
        let bridge = CreateNetworkRequest { bridge: "br0".to_owned(), ..request() };
        assert!(create_command(bridge.clone()).is_ok());
        assert!(create_command(CreateNetworkRequest { nat: true, ..bridge.clone() }).is_err());
        assert!(create_command(CreateNetworkRequest { vlan: 7, ..bridge.clone() }).is_err());
        assert!(create_command(CreateNetworkRequest { vlan: 70_000, ..request() }).is_err());
        assert!(create_command(request()).is_err());
        let gateway = CreateNetworkRequest { gateway: "10.7.0.1".to_owned(), ..bridge };
        assert!(create_command(gateway.clone()).is_err(), "without a subnet");
        let subnet = "10.7.0.0/24".to_owned();
        assert!(create_command(CreateNetworkRequest { subnet, ..gateway.clone() }).is_ok());
        assert!(create_command(CreateNetworkRequest { subnet: "10.7".to_owned(), ..gateway }).is_err());
    }
}
