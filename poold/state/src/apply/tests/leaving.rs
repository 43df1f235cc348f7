//! Hosts that leave with their replicas made elsewhere first, and hosts whose disks are full.

use super::replicas::settle;
use crate::command::{RemoveMode, VolumeCommand};
use crate::{
    Command, Outcome,
    fixture::Pool,
    planner::{LeaderView, plan},
    state::{Copies, HostState, StoreSpace, TaskState},
};
use proto::{ByteCount, HostId, TaskId};

fn retire(pool: &mut Pool, host: HostId, copies: Copies) -> TaskId {
    let Outcome::Task(task) = pool.accept(Command::RetireHost { host, copies }) else {
        panic!("it answers with its task")
    };
    task
}

fn fill(pool: &mut Pool, host: HostId, percent: u64) {
    let store = StoreSpace { used: ByteCount(percent), capacity: ByteCount(100) };
    pool.accept(Command::SetHostStore { host, store });
}

fn dropped(commands: &[Command]) -> bool {
    commands.iter().any(|command| matches!(command, Command::Volume(VolumeCommand::DropReplica { .. })))
}

#[test]
fn a_host_leaves_when_its_copies_are_in_sync_elsewhere_and_not_before() {
    let mut pool = Pool::new(4);
    let (id, hosts) = (pool.volume("data"), pool.hosts());
    assert_eq!(pool.state.volume(id).unwrap().replicas, hosts[..3]);
    let task = retire(&mut pool, hosts[1], Copies::AsMany);
    assert_eq!(retire(&mut pool, hosts[1], Copies::AsMany), task, "asked for again it is the same");
    let first = plan(&pool.state, &LeaderView::at(pool.now_ms));
    assert!(!dropped(&first), "nothing goes before there is another one: {first:?}");
    for command in first {
        pool.accept(command);
    }
    let volume = pool.state.volume(id).unwrap();
    assert_eq!((volume.replicas.len(), volume.isr.len()), (4, 3));
    assert_eq!(
        pool.reject(VolumeCommand::DropReplica { volume: id, host: hosts[1] }.into()),
        "REPLICA_NEEDED"
    );
    settle(&mut pool);
    let volume = pool.state.volume(id).unwrap();
    assert_eq!((&volume.replicas[..], volume.isr.len()), (&[hosts[0], hosts[2], hosts[3]][..], 3));
    assert_eq!(pool.state.task(task).unwrap().state, TaskState::Done);
    assert_eq!(pool.state.host(hosts[1]).unwrap().state, HostState::Removed);
}

#[test]
fn a_host_whose_copies_have_no_other_place_stays_unless_fewer_will_do() {
    let mut pool = Pool::new(3);
    let (id, hosts) = (pool.volume("data"), pool.hosts());
    let refused = Command::RetireHost { host: hosts[2], copies: Copies::AsMany };
    assert_eq!(pool.reject(refused), "COPIES_WOULD_BE_FEWER");
    let at_once = Command::RemoveHost { host: hosts[2], mode: RemoveMode::Drained };
    assert_eq!(pool.reject(at_once), "HOST_HAS_REPLICAS");
    let task = retire(&mut pool, hosts[2], Copies::MayBeFewer);
    settle(&mut pool);
    assert_eq!(pool.state.task(task).unwrap().state, TaskState::Done);
    let volume = pool.state.volume(id).unwrap();
    assert_eq!((&volume.replicas[..], volume.replicas_wanted), (&hosts[..2], 3));
}

#[test]
fn what_was_made_for_nothing_goes_again() {
    let mut pool = Pool::new(4);
    let (id, hosts) = (pool.volume("data"), pool.hosts());
    let task = retire(&mut pool, hosts[0], Copies::AsMany);
    for command in plan(&pool.state, &LeaderView::at(pool.now_ms)) {
        pool.accept(command);
    }
    pool.accept(Command::CancelTask { task });
    assert_eq!(pool.state.volume(id).unwrap().replicas.len(), 4);
    settle(&mut pool);
    assert_eq!(pool.state.volume(id).unwrap().replicas, hosts[..3], "the one that was not in sync goes");
    assert_eq!(pool.state.host(hosts[0]).unwrap().state, HostState::Up);
}

#[test]
fn a_served_volume_keeps_its_host() {
    let mut pool = Pool::new(4);
    let (volume, hosts) = (pool.volume("data"), pool.hosts());
    let listen = "127.0.0.1:1".parse().unwrap();
    pool.accept(VolumeCommand::ServeVolume { volume, host: hosts[0], listen }.into());
    let retire = Command::RetireHost { host: hosts[0], copies: Copies::AsMany };
    assert_eq!(pool.reject(retire), "VOLUME_SERVED");
}

#[test]
fn replicas_come_to_the_emptiest_hosts_and_not_to_full_ones() {
    let mut pool = Pool::new(5);
    let hosts = pool.hosts();
    for (host, percent) in hosts.iter().zip([70, 30, 90, 50, 35]) {
        fill(&mut pool, *host, percent);
    }
    let volume = pool.volume("data");
    assert_eq!(pool.state.volume(volume).unwrap().replicas, [hosts[1], hosts[3], hosts[4]]);
    let place = VolumeCommand::PlaceReplica { volume, host: hosts[2], replaces: Some(hosts[1]) };
    pool.accept(Command::HostLost { host: hosts[1] });
    pool.now_ms += pool.state.settings.timing.replica_replace_ms;
    assert_eq!(pool.reject(place.into()), "HOST_STORE_FULL");
    settle(&mut pool);
    assert_eq!(pool.state.volume(volume).unwrap().replicas, [hosts[0], hosts[3], hosts[4]]);
}

#[test]
fn a_volume_that_no_host_has_space_for_is_refused_and_not_made_with_fewer_copies() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    fill(&mut pool, hosts[0], 85);
    let create = || Command::CreateVolume { name: "data".into(), size: ByteCount(1 << 30), replicas: None };
    assert_eq!(pool.reject(create()), "NO_HOST_HAS_SPACE");
    fill(&mut pool, hosts[0], 84);
    pool.accept(create());
}

#[test]
fn a_volume_has_one_replica_more_at_a_time_however_many_hosts_leave() {
    let mut pool = Pool::new(9);
    let hosts = pool.hosts();
    let create = Command::CreateVolume { name: "data".into(), size: ByteCount(1 << 30), replicas: Some(5) };
    let Outcome::Volume(id) = pool.accept(create) else { panic!("a volume") };
    let tasks = [1, 2, 3].map(|at| retire(&mut pool, hosts[at], Copies::AsMany));
    for command in plan(&pool.state, &LeaderView::at(pool.now_ms)) {
        pool.accept(command);
    }
    assert_eq!(pool.state.volume(id).unwrap().replicas.len(), 6);
    settle(&mut pool);
    assert!(tasks.iter().all(|task| pool.state.task(*task).unwrap().state == TaskState::Done));
    assert_eq!(pool.state.volume(id).unwrap().replicas.len(), 5);
}

#[test]
fn a_volume_of_two_copies_goes_on_with_one_while_a_third_takes_a_place() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let create = Command::CreateVolume { name: "data".into(), size: ByteCount(1 << 30), replicas: Some(2) };
    let Outcome::Volume(id) = pool.accept(create) else { panic!("a volume") };
    retire(&mut pool, hosts[1], Copies::AsMany);
    for command in plan(&pool.state, &LeaderView::at(pool.now_ms)) {
        pool.accept(command);
    }
    let volume = pool.state.volume(id).unwrap();
    assert_eq!((volume.replicas.len(), volume.min_isr()), (3, 1));
}
