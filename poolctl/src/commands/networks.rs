//! `poolctl net`.

use super::Session;
use crate::{
    args::{NetArguments, NetCommand},
    client::{call, new_meta},
    failure::Failure,
    view::NetworkView,
};
use proto::v1::{
    CreateNetworkRequest, DeleteNetworkRequest, ListNetworksRequest, NetworkRef,
    network_service_client::NetworkServiceClient,
};

/// Runs a command of networks.
///
/// # Errors
/// As the pool answers.
pub async fn run(command: NetCommand, session: &mut Session) -> Result<(), Failure> {
    match command {
        NetCommand::Create(arguments) => {
            let request = request(arguments);
            let network = call!(session.client, NetworkServiceClient, create, request).await?;
            let name = &network.name;
            let sentence = format!(
                "network {name} made; give a VM a card on it with `poolctl vm create … --net {name}`"
            );
            session.output.changed(&NetworkView::from(network), &sentence)
        }
        NetCommand::List => {
            let list = call!(session.client, NetworkServiceClient, list, ListNetworksRequest {}).await?;
            let views: Vec<NetworkView> = list.networks.into_iter().map(NetworkView::from).collect();
            session.output.list(list.revision, &views)
        }
        NetCommand::Show { network } => {
            let network =
                call!(session.client, NetworkServiceClient, show, NetworkRef { r#ref: network }).await?;
            session.output.show(&NetworkView::from(network))
        }
        NetCommand::Delete { network } => {
            let request = DeleteNetworkRequest { meta: new_meta(), network };
            let network = call!(session.client, NetworkServiceClient, delete, request).await?;
            let sentence = format!("network {} deleted", network.name);
            session.output.changed(&NetworkView::from(network), &sentence)
        }
    }
}

fn request(arguments: NetArguments) -> CreateNetworkRequest {
    let NetArguments { name, link, uplink, subnet, gateway, dns } = arguments;
    CreateNetworkRequest {
        meta: new_meta(),
        name,
        bridge: link.bridge.unwrap_or_default(),
        uplink: uplink.unwrap_or_default(),
        vlan: link.vlan.map_or(0, u32::from),
        nat: link.nat.is_some(),
        subnet: link.nat.or(subnet).map(|subnet| subnet.to_string()).unwrap_or_default(),
        gateway: gateway.map(|gateway| gateway.to_string()).unwrap_or_default(),
        dns: dns.iter().map(ToString::to_string).collect(),
    }
}
