//! Memory in huge pages: who may have it where, and what a move needs.

use crate::{
    Command,
    command::CreateVm,
    fixture::{GIB, Pool},
    outcome::Outcome,
    rejection::{MemoryRejection, Rejection},
    state::{HaPolicy, MigrationOptions, MigrationPolicy},
};
use proto::{ByteCount, HostId, MemoryPages, VmId};

fn create(pool: &Pool, name: &str, memory: ByteCount) -> Command {
    let Command::CreateVm(create) = pool.create_vm(name, Vec::new(), HaPolicy::Restart) else {
        panic!("it is a creation")
    };
    Command::CreateVm(CreateVm { memory, pages: MemoryPages::Huge, ..create })
}

fn vm(pool: &mut Pool, name: &str) -> VmId {
    let create = create(pool, name, ByteCount(2 * GIB));
    let Outcome::Vm(vm) = pool.accept(create) else { panic!("a creation answers with its VM") };
    vm
}

fn keeps(host: HostId, memory: u64) -> Command {
    Command::SetHostHugeMemory { host, memory: ByteCount(memory) }
}

#[test]
fn a_vm_with_huge_pages_comes_to_hosts_that_have_enough_of_them_free() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    assert_eq!(pool.reject(create(&pool, "odd", ByteCount(2 * GIB + 4096))), "NOT_WHOLE_HUGE_PAGES");
    let (web, more) = (vm(&mut pool, "web"), vm(&mut pool, "more"));
    let start = |vm, host| Command::StartVm { vm, host };
    assert_eq!(pool.reject(start(web, Some(hosts[1]))), "NOT_ENOUGH_HUGE_PAGES");
    assert_eq!(pool.reject(start(web, None)), "NO_HOST_FITS");
    pool.accept(keeps(hosts[1], 3 * GIB));
    pool.start(web, None);
    pool.runs(web);
    assert_eq!(pool.host_of(web), Some(hosts[1]), "the only one that has them");
    let refused = pool.apply(start(more, Some(hosts[1]))).expect_err("one of three GiB is free");
    let expected = MemoryRejection::HugePagesShort {
        vm: "more".into(),
        host: "h2".into(),
        total: ByteCount(3 * GIB),
        free: ByteCount(GIB),
        needed: ByteCount(2 * GIB),
    };
    assert_eq!(refused, Rejection::Memory(expected));
    assert!(refused.remedy().contains("vm.nr_hugepages=2048"), "{}", refused.remedy());
    // Others don't care.
    let small = pool.stopped_vm("small", HaPolicy::Restart);
    pool.start(small, Some(hosts[0]));
}

#[test]
fn a_move_needs_huge_pages_at_its_target_and_never_brings_them_on_demand() {
    let mut pool = Pool::new(3);
    let hosts = pool.hosts();
    for host in &hosts[..2] {
        pool.accept(keeps(*host, 2 * GIB));
    }
    let web = vm(&mut pool, "web");
    pool.start(web, Some(hosts[0]));
    pool.runs(web);
    let codes = |pool: &Pool, target: Option<HostId>| -> Vec<&'static str> {
        pool.state.migration_blockers(web, target).iter().map(Rejection::reason_code).collect()
    };
    assert_eq!(codes(&pool, Some(hosts[2])), ["NOT_ENOUGH_HUGE_PAGES"]);
    assert!(codes(&pool, Some(hosts[1])).is_empty());
    let on_demand = MigrationOptions { policy: MigrationPolicy::PostCopy, ..MigrationOptions::default() };
    assert_eq!(pool.state.option_blockers(web, &on_demand).len(), 1);
    let start = Command::StartMigration { vm: web, target: Some(hosts[1]), options: on_demand };
    assert_eq!(pool.reject(start), "HUGE_PAGES_ON_DEMAND");
    // While it moves it has its pages at both ends.
    let (migration, _) = pool.start_migration(web, None);
    let other = vm(&mut pool, "other");
    assert_eq!(pool.reject(Command::StartVm { vm: other, host: Some(hosts[1]) }), "NOT_ENOUGH_HUGE_PAGES");
    pool.finish(migration);
    assert_eq!(pool.host_of(web), Some(hosts[1]));
    pool.start(other, Some(hosts[0]));
}
