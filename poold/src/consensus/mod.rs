//! Consensus: the pool's replicated state, by openraft with its log on sled.
//!
//! ```text
//!  Consensus (handle) ──propose──▶ openraft ──append──▶ LogStore ──▶ Flusher (one thread: flush, fdatasync, call back)
//!        ▲                           │ apply
//!        └──── watch: PoolState ── StateStore ──▶ snapshot files (checked by blake3, written by rename)
//! ```
//!
//! Invariants: nothing is acknowledged before it is on disk; a vote is durable before it is answered; an fsync error ends the
//! daemon; a message for another node id is not obeyed.
//!
//! Absent on purpose: the rules of the pool, which are `pool_state`'s.

pub mod backup;
mod clients;
mod codec;
mod flusher;
mod handle;
mod log_store;
mod membership;
mod network;
mod propose;
mod quorum;
mod reached;
mod read;
pub mod recover;
mod service;
mod snapshot_file;
mod state_store;

#[cfg(test)]
mod tests;

pub use clients::{ClientError, HostClients};
pub use handle::{Consensus, StartError, StartOptions};
pub use log_store::LogOpenError;
pub use membership::MembershipTask;
pub use propose::{ProposeError, ProposeMeta};
pub use read::ReadError;
pub use service::RaftApi;

use pool_state::{Entry, Outcome, Rejection};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// The answer to an applied entry.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Applied {
    /// A blank or membership entry, which changes nothing in the pool's state.
    Nothing,
    /// What `PoolState::apply` said.
    Entry(Result<Outcome, Rejection>),
}

openraft::declare_raft_types!(
    /// The types that openraft works with.
    pub TypeConfig:
        D = Entry,
        R = Applied,
        NodeId = u64,
        Node = openraft::BasicNode,
        SnapshotData = std::io::Cursor<Vec<u8>>,
        AsyncRuntime = Runtime,
);

/// What openraft's tasks and timers run on.
#[cfg(not(test))]
type Runtime = openraft::TokioRuntime;
#[cfg(test)]
type Runtime = tests::runtime::TestRuntime;

/// openraft, as the pool uses it.
pub type PoolRaft = openraft::Raft<TypeConfig>;

/// Reads the payload of a message of `RaftService`.
fn payload<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, postcard::Error> {
    match postcard::take_from_bytes(bytes)? {
        (value, []) => Ok(value),
        // A newer version says more than this one understands.
        _ => Err(postcard::Error::DeserializeBadEncoding),
    }
}
