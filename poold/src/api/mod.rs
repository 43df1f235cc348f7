//! The public API and who may call it. One file per service; [`views`] turns state into messages.

pub mod access;
mod clones;
pub mod clusters;
pub mod consoles;
pub mod copies;
pub mod events;
pub mod groups;
pub mod hosts;
pub mod images;
mod known;
pub mod migrations;
pub mod nbd;
pub mod networks;
pub mod pool;
pub mod principal;
pub mod refusals;
pub mod snapshots;
mod stats;
pub mod status;
pub mod support;
pub mod tasks;
pub mod users;
pub mod views;
pub mod vms;
pub mod volumes;

pub use copies::Copies;
pub use principal::{Principal, principal_of, require_host, require_user};

use crate::consensus::ProposeMeta;
use proto::v1::RequestMeta;

/// What a client's change is stamped with.
pub fn propose_meta(principal: &Principal, meta: Option<&RequestMeta>) -> ProposeMeta {
    let request_id = meta.map(|meta| meta.request_id.clone()).filter(|id| !id.is_empty());
    ProposeMeta { request_id, principal: principal.to_string() }
}
