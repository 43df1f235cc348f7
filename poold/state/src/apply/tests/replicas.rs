//! Replicas that are lost for good, missing, or behind.

use crate::command::VolumeCommand;
use crate::{
    Command,
    command::{RemoveMode, ServiceEnd},
    fixture::{Pool, incarnation},
    planner::{LeaderView, plan},
    state::{HaPolicy, Volume},
};
use proto::{HostId, VolumeId};
use std::collections::BTreeMap;

fn volume(pool: &Pool, id: VolumeId) -> &Volume {
    pool.state.volume(id).expect("the test created it")
}

/// Carries out what the leader plans until nothing is left, with owners that resync at once.
pub(super) fn settle(pool: &mut Pool) {
    for _ in 0..32 {
        let mut commands = plan(&pool.state, &LeaderView::at(pool.now_ms));
        for (id, service) in pool.state.volumes.values().filter_map(|it| Some((it.id, it.service.clone()?))) {
            let (data, epoch) = (volume(pool, id), volume(pool, id).epoch);
            if service.wanted == crate::state::ServiceWanted::Closed {
                commands.push(Command::Volume(VolumeCommand::VolumeServiceEnded {
                    volume: id,
                    epoch,
                    end: ServiceEnd::Closed,
                }));
            } else if let Some(host) = data.replicas.iter().find(|host| pool.state.is_behind(data, **host)) {
                commands.push(Command::AddToIsr(crate::command::IsrChange {
                    volume: id,
                    epoch,
                    isr_version: data.isr_version,
                    host: *host,
                    incarnation: incarnation(*host, 0),
                }));
            }
        }
        if commands.is_empty() {
            return;
        }
        for command in commands {
            // An owner whose proposal comes too late tries again.
            if let Err(rejection) = pool.apply(command.clone()) {
                assert!(matches!(command, Command::AddToIsr(_)), "{command:?}: {rejection}");
            }
        }
    }
    panic!("the pool does not come to rest");
}

fn zone(pool: &mut Pool, host: HostId, zone: &str) {
    let labels = BTreeMap::from([("zone".to_owned(), Some(zone.to_owned()))]);
    pool.accept(Command::SetHostLabels { host, labels });
}

#[test]
fn a_replica_of_a_host_that_stays_away_is_made_anew_and_brought_up_to_date() {
    let mut pool = Pool::new(4);
    let (id, hosts) = (pool.volume("data"), pool.hosts());
    assert_eq!(volume(&pool, id).replicas, hosts[..3]);
    pool.accept(Command::HostLost { host: hosts[0] });
    settle(&mut pool);
    assert_eq!(volume(&pool, id).replicas, hosts[..3], "it may come back");
    let early =
        Command::Volume(VolumeCommand::PlaceReplica { volume: id, host: hosts[3], replaces: Some(hosts[0]) });
    assert_eq!(pool.reject(early), "REPLICA_NOT_WANTED");
    pool.now_ms += pool.state.settings.timing.replica_replace_ms;
    settle(&mut pool);
    let data = volume(&pool, id);
    assert_eq!((&data.replicas[..], data.isr.len(), &data.owner), (&hosts[1..], 3, &None));
    assert_eq!(data.service, None, "closed when the work was done");
    // The host that comes back has no replica any more.
    pool.accept(Command::HostReturned { host: hosts[0] });
    settle(&mut pool);
    assert_eq!(volume(&pool, id).replicas, hosts[1..]);
}

#[test]
fn nothing_is_copied_while_the_brake_is_on_and_the_last_copy_is_never_given_up() {
    let mut pool = Pool::new(4);
    let (id, hosts) = (pool.volume("data"), pool.hosts());
    pool.accept(Command::HostLost { host: hosts[0] });
    pool.accept(Command::SetBrake);
    pool.now_ms += pool.state.settings.timing.replica_replace_ms;
    settle(&mut pool);
    assert_eq!(volume(&pool, id).replicas, hosts[..3]);
    pool.accept(Command::HaResume);
    pool.accept(Command::HostLost { host: hosts[1] });
    pool.accept(Command::HostLost { host: hosts[2] });
    let last =
        Command::Volume(VolumeCommand::PlaceReplica { volume: id, host: hosts[3], replaces: Some(hosts[0]) });
    assert_eq!(pool.reject(last), "LAST_IN_SYNC_REPLICA");
}

#[test]
fn a_missing_replica_comes_with_the_next_host() {
    let mut pool = Pool::new(3);
    let (id, hosts) = (pool.volume("data"), pool.hosts());
    pool.accept(Command::HostLost { host: hosts[2] });
    pool.accept(Command::RemoveHost { host: hosts[2], mode: RemoveMode::ConfirmDead });
    assert_eq!(volume(&pool, id).replicas, hosts[..2]);
    let new = pool.join(4);
    pool.serve(new, 0);
    settle(&mut pool);
    let data = volume(&pool, id);
    assert_eq!((&data.replicas[..], data.isr.len()), (&[hosts[0], hosts[1], new][..], 3));
}

#[test]
fn a_zone_gets_a_second_replica_only_when_there_is_no_better_place() {
    let mut pool = Pool::new(5);
    let hosts = pool.hosts();
    for (host, name) in hosts.iter().zip(["a", "b", "c", "a", "c"]) {
        zone(&mut pool, *host, name);
    }
    let id = pool.volume("data");
    assert_eq!(volume(&pool, id).replicas, hosts[..3]);
    pool.accept(Command::HostLost { host: hosts[2] });
    pool.now_ms += pool.state.settings.timing.replica_replace_ms;
    let crowded =
        Command::Volume(VolumeCommand::PlaceReplica { volume: id, host: hosts[3], replaces: Some(hosts[2]) });
    assert_eq!(pool.reject(crowded.clone()), "ZONE_HAS_REPLICA");
    pool.accept(Command::HostLost { host: hosts[4] });
    pool.accept(crowded);
}

#[test]
fn work_makes_way_for_a_vm_and_waits_while_one_runs() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let vm = pool.stopped_vm("web", HaPolicy::Restart);
    let id = pool.disk(vm).id;
    // The third host lost power: its store lives another life.
    pool.serve(hosts[2], 1);
    let work = Command::Volume(VolumeCommand::WorkOnVolume { volume: id, host: hosts[0] });
    pool.accept(work.clone());
    assert!(volume(&pool, id).service.is_some());
    let epoch = volume(&pool, id).epoch;
    pool.start(vm, Some(hosts[0]));
    assert!(volume(&pool, id).service.is_none() && volume(&pool, id).epoch > epoch);
    assert_eq!(pool.reject(work), "REPLICA_NOT_WANTED");
}
