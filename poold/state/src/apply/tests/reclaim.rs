//! VMs that were handed over and never arrived.

use crate::{
    Command,
    command::IsrChange,
    fixture::Pool,
    state::{EpochStart, HaPolicy, StartCause},
};
use proto::{HostId, MigrationId, Sequence, VmId};

struct Handed {
    pool: Pool,
    vm: VmId,
    id: MigrationId,
    hosts: Vec<HostId>,
}

fn handed_over() -> Handed {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let vm = pool.running_vm("web", hosts[0], HaPolicy::Restart);
    let id = pool.committed(vm, hosts[1]);
    Handed { pool, vm, id, hosts }
}

fn reclaim(migration: MigrationId) -> Command {
    Command::MigrationReclaim { migration }
}

#[test]
fn a_vm_whose_target_is_lost_before_it_ran_goes_back_at_the_next_epoch() {
    let Handed { mut pool, vm, id, hosts } = handed_over();
    let (epoch, disk) = (pool.epoch(vm), pool.disk(vm).clone());
    pool.accept(Command::HostLost { host: hosts[1] });
    assert_eq!((pool.host_of(vm), pool.epoch(vm)), (Some(hosts[0]), epoch.next()));
    let back = pool.disk(vm);
    assert_eq!((back.epoch, back.owner.map(|owner| owner.host)), (disk.epoch.next(), Some(hosts[0])));
    let start = EpochStart { epoch: back.epoch, start_seq: Some(Sequence(42)) };
    assert_eq!(back.epoch_history.last(), Some(&start), "it goes on where it was");
    assert!(back.isr.iter().all(|member| member.host != hosts[1]), "the lost replica is not waited for");
    let migration = pool.migration(id);
    assert_eq!((migration.phase.as_str(), migration.outcome.as_str()), ("reclaimed", "failed"));
    assert_eq!(pool.task_state(migration.task), "failed");
    let process = migration.source_process;
    assert_eq!((pool.vm(vm).older_process, pool.vm(vm).start_cause), (Some(process), StartCause::Reclaim));
    assert!(pool.state.may_run(hosts[0], vm, process), "its old process is the one");
    assert!(!pool.state.may_run(hosts[0], vm, pool.epoch(vm)));
    assert_eq!(pool.vm_state(vm), "recovering");
    assert_eq!(pool.reject(reclaim(id)), "MIGRATION_ENDED");
    pool.runs(vm);
    assert_eq!(pool.vm_state(vm), "running");
}

#[test]
fn a_vm_that_may_have_run_at_the_target_does_not_go_back() {
    let Handed { mut pool, vm, id, .. } = handed_over();
    pool.runs(vm);
    assert_eq!(pool.reject(reclaim(id)), "MAY_HAVE_ARRIVED");
    // An owner that changes the in-sync set is active.
    let Handed { mut pool, vm, id, hosts } = handed_over();
    let disk = pool.disk(vm).clone();
    let member = disk.isr.iter().find(|member| member.host != hosts[1]).cloned().unwrap();
    pool.accept(Command::RemoveFromIsr(IsrChange {
        volume: disk.id,
        epoch: disk.epoch,
        isr_version: disk.isr_version,
        host: member.host,
        incarnation: member.incarnation,
    }));
    assert_eq!(pool.reject(reclaim(id)), "MAY_HAVE_ARRIVED");
    let epoch = pool.epoch(vm);
    pool.accept(Command::HostLost { host: hosts[1] });
    assert_eq!(pool.epoch(vm), epoch, "it waits for its recovery, which boots it");
}

#[test]
fn a_vm_goes_back_only_after_the_commit_and_to_a_host_that_is_up() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    let vm = pool.running_vm("web", hosts[0], HaPolicy::Restart);
    let id = pool.copying(vm, hosts[1]);
    assert_eq!(pool.reject(reclaim(id)), "WRONG_PHASE");
    let commit = pool.commit(id);
    pool.accept(commit);
    pool.accept(Command::HostLost { host: hosts[0] });
    assert_eq!(pool.reject(reclaim(id)), "HOST_NOT_UP");
}

#[test]
fn a_process_that_has_a_vm_back_is_older_only_until_the_next_placement() {
    let Handed { mut pool, vm, id, hosts } = handed_over();
    pool.accept(reclaim(id));
    pool.runs(vm);
    let next = pool.committed(vm, hosts[2]);
    assert_eq!(pool.vm(vm).older_process, None);
    pool.runs(vm);
    assert_eq!(pool.reject(reclaim(next)), "MAY_HAVE_ARRIVED");
}
