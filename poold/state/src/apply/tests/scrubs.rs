//! Scrubs: asked for, due by themselves, done by whoever has the volume open.

use super::snapshots::open;
use crate::command::{ScrubEnd, VolumeCommand};
use crate::{
    Command, Outcome,
    fixture::Pool,
    planner::{LeaderView, plan},
    reconcile::{HostAction, ObservedScrub, ObservedScrubState, reconcile_scrubs},
    state::{ScrubCounts, TaskState},
};
use proto::{HostId, TaskId, VolumeId};

fn scrub(pool: &mut Pool, volume: VolumeId, replica: Option<HostId>) -> TaskId {
    let command = VolumeCommand::ScrubVolume { volume, replica, bytes_per_s: None };
    let Outcome::Task(task) = pool.accept(command.into()) else { panic!("it answers with its task") };
    task
}

fn planned(pool: &Pool) -> Vec<Command> {
    plan(&pool.state, &LeaderView::at(pool.now_ms))
}

fn seen(pool: &Pool, volume: VolumeId, task: TaskId, state: ObservedScrubState) -> ObservedScrub {
    ObservedScrub { volume, epoch: pool.state.volume(volume).unwrap().epoch, task, state }
}

#[test]
fn a_closed_volume_is_opened_scrubbed_and_closed_again() {
    let mut pool = Pool::new(3);
    let volume = pool.volume("data");
    let task = scrub(&mut pool, volume, None);
    assert_eq!(scrub(&mut pool, volume, None), task, "one is enough");
    open(&mut pool, volume);
    let owner = pool.state.volume(volume).unwrap().owner.unwrap().host;
    let acts = |pool: &Pool, observed: &[ObservedScrub]| reconcile_scrubs(&pool.state, owner, observed);
    let begun = acts(&pool, &[]);
    assert!(matches!(begun[..], [HostAction::Scrub { scrub, .. }] if scrub.task == task), "{begun:?}");
    let running = seen(&pool, volume, task, ObservedScrubState::Running);
    assert_eq!(acts(&pool, std::slice::from_ref(&running)), []);
    let counts = ScrubCounts { checked: 10, damaged: 2, repaired: 2 };
    let done = seen(&pool, volume, task, ObservedScrubState::Done(counts));
    let [HostAction::Report(report)] = &acts(&pool, &[done])[..] else { panic!("it is reported") };
    pool.accept(report.clone());
    assert_eq!(pool.state.task(task).unwrap().state, TaskState::Done);
    let found = pool.state.volume(volume).unwrap().last_scrub.unwrap();
    assert_eq!((found.task, found.counts), (task, counts));
    assert!(matches!(planned(&pool)[..], [Command::Volume(VolumeCommand::FinishVolumeWork { .. })]));
    // Cancelled, the owner is told to end it.
    let second = scrub(&mut pool, volume, None);
    pool.accept(Command::CancelTask { task: second });
    let running = seen(&pool, volume, second, ObservedScrubState::Running);
    assert!(matches!(acts(&pool, &[running])[..], [HostAction::EndScrub { .. }]));
}

#[test]
fn what_can_not_be_repaired_fails_the_task_and_is_remembered() {
    let mut pool = Pool::new(3);
    let volume = pool.volume("data");
    let task = scrub(&mut pool, volume, None);
    open(&mut pool, volume);
    let epoch = pool.state.volume(volume).unwrap().epoch;
    let counts = ScrubCounts { checked: 10, damaged: 3, repaired: 2 };
    let end = ScrubEnd::Done(counts);
    let report = VolumeCommand::VolumeScrubbed { volume, epoch, task, end };
    pool.accept(report.clone().into());
    let TaskState::Failed { problem } = &pool.state.task(task).unwrap().state else { panic!("it failed") };
    assert!(problem.starts_with("1 of 10 blocks are damaged"), "{problem}");
    assert_eq!(pool.state.volume(volume).unwrap().last_scrub.unwrap().counts, counts);
    assert_eq!(pool.reject(report.into()), "WORK_NOT_WANTED");
}

#[test]
fn only_a_replica_that_is_in_sync_is_scrubbed_alone() {
    let mut pool = Pool::new(4);
    let volume = pool.volume("data");
    let replicas = pool.state.volume(volume).unwrap().replicas.clone();
    let other = pool.hosts().into_iter().find(|host| !replicas.contains(host)).unwrap();
    let of = |host| VolumeCommand::ScrubVolume { volume, replica: Some(host), bytes_per_s: None }.into();
    assert_eq!(pool.reject(of(other)), "NOT_A_REPLICA");
    pool.accept(Command::HostLost { host: replicas[0] });
    assert_eq!(pool.reject(of(replicas[0])), "REPLICA_NOT_IN_SYNC");
    pool.accept(of(replicas[1]));
}

#[test]
fn volumes_are_scrubbed_by_themselves_and_no_disk_for_two_at_a_time() {
    let mut pool = Pool::new(3);
    let (first, second) = (pool.volume("first"), pool.volume("second"));
    let scrubs = |pool: &Pool| -> Vec<VolumeId> {
        let scrubbed = |command| match command {
            Command::Volume(VolumeCommand::ScrubVolume { volume, bytes_per_s: Some(_), .. }) => Some(volume),
            _ => None,
        };
        planned(pool).into_iter().filter_map(scrubbed).collect()
    };
    assert_eq!(scrubs(&pool), []);
    pool.now_ms += pool.state.settings.scrub_interval_ms;
    assert_eq!(scrubs(&pool), [first]);
    let task = scrub(&mut pool, first, None);
    assert_eq!(scrubs(&pool), [], "its hosts are busy");
    open(&mut pool, first);
    let epoch = pool.state.volume(first).unwrap().epoch;
    let end = ScrubEnd::Done(ScrubCounts::default());
    pool.accept(VolumeCommand::VolumeScrubbed { volume: first, epoch, task, end }.into());
    assert_eq!(scrubs(&pool), [second]);
    pool.state.settings.scrub_interval_ms = 0;
    assert_eq!(scrubs(&pool), [], "switched off");
}
