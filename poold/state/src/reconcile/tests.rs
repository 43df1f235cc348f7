//! One host's actions from states and sightings.

mod moves;
mod placed;
mod services;

use super::*;
use crate::{
    fixture::Pool,
    state::{CertificateFingerprint, HaPolicy},
};

/// A process as it is after a plain start.
fn process(pool: &Pool, vm: VmId, state: ProcessState) -> ObservedVm {
    ObservedVm {
        vm,
        epoch: pool.epoch(vm),
        state,
        guest_exit: GuestExit::None,
        error: String::new(),
        certificate: Some(CertificateFingerprint([3; 32])),
        migration: None,
        volumes: Some(VolumesDigest::of(&pool.state, pool.vm(vm))),
    }
}

fn actions(pool: &Pool, me: HostId, observed: &[ObservedVm]) -> Vec<HostAction> {
    let first = reconcile(&pool.state, me, pool.now_ms, observed);
    assert_eq!(first, reconcile(&pool.state, me, pool.now_ms, observed), "equal inputs give equal actions");
    first
}

/// The only report among the actions.
fn report(pool: &Pool, me: HostId, observed: &[ObservedVm]) -> Command {
    match &actions(pool, me, observed)[..] {
        [HostAction::Report(command)] => command.clone(),
        other => panic!("one report was expected, not {other:?}"),
    }
}

/// A pool of three with a VM that runs at the first host.
fn with_vm(ha: HaPolicy) -> (Pool, HostId, VmId) {
    let mut pool = Pool::new(3);
    let host = pool.hosts()[0];
    let vm = pool.running_vm("web", host, ha);
    (pool, host, vm)
}
