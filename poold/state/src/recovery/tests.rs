//! Pools that lost their majority.

use super::{JUMP, Losses, Recovery, RecoveryError, recover};
use crate::{
    Command, PoolState, Seed,
    command::IsrChange,
    fixture::{Pool, incarnation},
    invariants,
    state::HaPolicy,
};
use proto::HostId;

fn recovered(pool: &Pool, survivors: &[HostId]) -> Result<(PoolState, Losses), RecoveryError> {
    recover(&pool.state, &Recovery { survivors, now_ms: pool.now_ms, seed: Seed([5; 32]) })
}

#[test]
fn the_survivors_are_the_pool_and_everything_else_is_behind_them() {
    let mut pool = Pool::new(5);
    let hosts = pool.hosts();
    let here = pool.running_vm("here", hosts[0], HaPolicy::Restart);
    let there = pool.running_vm("there", hosts[3], HaPolicy::Restart);
    pool.start_migration(here, Some(hosts[4]));
    let secret = pool.disk(here).secret.clone();
    let (state, losses) = recovered(&pool, &hosts[..2]).unwrap();
    assert_eq!(state.members().map(|host| host.id).collect::<Vec<_>>(), hosts[..2]);
    assert!(state.revision > pool.state.revision + JUMP);
    assert_eq!(losses.stopped_vms, ["there"]);
    assert_eq!(state.running_migrations().count(), 0);
    assert_eq!(state.tasks.values().filter(|task| task.is_running()).count(), 0);
    let (old, new) = (pool.disk(here), state.volume(pool.disk(here).id).unwrap());
    assert!(new.epoch.0 >= old.epoch.0 + JUMP && new.secret != secret && new.secret.is_some());
    assert_eq!(state.vm(here).unwrap().placement, Some(hosts[0]));
    assert_eq!(state.vm(there).unwrap().placement, None);
    assert_eq!(invariants::check_step(&pool.state, &state), Ok(()));
}

#[test]
fn a_survivor_that_was_not_in_sync_is_better_than_nothing_and_is_named() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let vm = pool.stopped_vm("web", HaPolicy::Restart);
    let volume = pool.disk(vm).clone();
    pool.accept(Command::RemoveFromIsr(IsrChange {
        volume: volume.id,
        epoch: volume.epoch,
        isr_version: volume.isr_version,
        host: hosts[0],
        incarnation: incarnation(hosts[0], 0),
    }));
    let (state, losses) = recovered(&pool, &hosts[..1]).unwrap();
    assert_eq!(losses.stale_volumes, ["web-disk"]);
    assert_eq!(state.volume(volume.id).unwrap().isr.len(), 1);
    let (_, losses) = recovered(&pool, &hosts[1..2]).unwrap();
    assert_eq!(losses.stale_volumes, [""; 0]);
}

#[test]
fn data_that_no_survivor_has_is_not_given_up_silently() {
    let mut pool = Pool::new(4);
    let hosts = pool.hosts();
    pool.volume("data");
    let lacking =
        hosts.iter().find(|host| !pool.state.volumes.values().any(|volume| volume.replicas.contains(host)));
    let lacking = [*lacking.expect("three of four hosts have a replica")];
    let error = recovered(&pool, &lacking).unwrap_err();
    assert_eq!(error, RecoveryError::VolumesLost { volumes: vec!["data".into()] });
    let stranger = HostId(9_999);
    assert_eq!(recovered(&pool, &[stranger]).unwrap_err(), RecoveryError::NoMember { host: stranger });
}
