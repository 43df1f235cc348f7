//! Stops a machine whose disks have a newer owner: another copy of it runs elsewhere, or will.
//!
//! The lease does that in time for most. It can't for a VM without HA, which needs none, when an operator vouches for a host that
//! is off and is wrong. Replicas let a newer owner in before its copy boots and refuse the old one from then on; so this one
//! hears of it at its next write, and must not go on with errors of its disk and a place on the network.
//!
//! ```text
//!  volume: active ──fenced──▶ gate held ──active again (the pool gave it back)──▶ gate released
//! ```
//! Absent on purpose: a machine without disks, which nobody tells.

use crate::fence::{SharedGate, lock};
use crate::gate::{Hold, Vcpus};
use crate::volumes::VolumeSet;
use futures::future::select_all;
use std::fmt::Display;
use storage::owner::VolumeState;

/// Follows the volumes, for as long as somebody has them open.
pub async fn watch<M>(volumes: VolumeSet, gate: SharedGate<M>)
where
    M: Vcpus + Send + Sync + 'static,
    M::Error: Display + Send,
{
    let mut states = volumes.watch();
    // The handles are the watched ones' only owners: kept here, they would never end.
    drop(volumes);
    let mut held = false;
    while !states.is_empty() {
        let is_fenced = states.iter_mut().any(|state| state.borrow_and_update().state == VolumeState::Fenced);
        if is_fenced != held {
            held = is_fenced;
            set(&gate, is_fenced).await;
        }
        let changes = states.iter_mut().map(|state| Box::pin(state.changed()));
        let (changed, index, _) = select_all(changes).await;
        if changed.is_err() {
            states.remove(index);
        }
    }
}

async fn set<M>(gate: &SharedGate<M>, is_fenced: bool)
where
    M: Vcpus + Send + Sync + 'static,
    M::Error: Display + Send,
{
    let gate = gate.clone();
    let work = move || {
        let mut gate = lock(&gate);
        if is_fenced {
            tracing::warn!("a newer owner has the disks: stopping the vCPUs");
            gate.hold(Hold::Superseded)
        } else {
            gate.release(Hold::Superseded)
        }
    };
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!(%error, "a vCPU does not follow its disks"),
        Err(error) => tracing::error!(%error, "the gate was not reached"),
    }
}
